"""The probabilities of a classifier's labels for texts of any number and lengths.

Shape letters: B rows of a call, T tokens, L labels.
"""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.buckets import bucket_length, bucket_rows, power_of_two
from gpt2_jax.generation.devices import on_devices
from gpt2_jax.generation.prompts import check_prompt
from gpt2_jax.generation.scoring import TOKENS_PER_CALL, TOKENS_PER_CALL_ELSEWHERE
from gpt2_jax.jax_defaults import with_own_arrays
from gpt2_jax.model import GPT2, check_params
from gpt2_jax.params import Params
from gpt2_jax.sharding import platform


@with_own_arrays
def classify(
    config: GPT2Config,
    params: Params,
    texts: Sequence[Sequence[int]],
    *,
    track: Callable[[list], Iterable] = iter,
) -> np.ndarray:
    """Return the probability of each label for each text, [n, labels]; `config.labels` has the names of the columns.

    Texts of similar lengths run together. Lengths and row counts are rounded up to a few sizes; each size compiles
    once. A text gives the same result with and without others, up to rounding.

    Args:
      config: the config of a classifier, from `load`: it has labels.
      params: its params.
      texts: a list of token-id sequences, as a tokenizer's `encode` returns them, without an end-of-text id.
      track: takes the list of batches and yields them one by one, such as rich.progress.track.

    Returns:
      float32 (float64 under a float64 `compute_dtype`). The rows sum to 1, and are in the order of the texts.

    Raises:
      ValueError: the model is no classifier; a text is empty, or has more than n_ctx tokens or an id outside of the
        vocabulary; or logits are NaN or infinite.
    """
    if not config.labels:
        raise ValueError("this model is no classifier: its config has no labels")
    if isinstance(texts, str) or not hasattr(texts, "__len__"):
        raise ValueError(f"texts must be a list of token-id lists, not {reprlib.repr(texts)}")
    rows = [check_prompt(config, f"texts[{i}]", text) for i, text in enumerate(texts)]
    for i, row in enumerate(rows):
        if len(row) > config.n_ctx:
            raise ValueError(f"texts[{i}] has {len(row):,} tokens, but the model's n_ctx is {config.n_ctx:,}: cut it")
    check_params(config, params, dtypes=False)
    model, params = on_devices(config, params)
    wide = jnp.promote_types(config.compute_dtype, jnp.float32)
    found = np.empty((len(rows), len(config.labels)), wide)
    most_tokens = TOKENS_PER_CALL.get(platform(params), TOKENS_PER_CALL_ELSEWHERE)
    for n_tokens, batch in track(list(_batches(rows, config.n_ctx, most_tokens))):
        tokens_BT, length_B = _arrays([rows[i] for i in batch], n_tokens)
        found[batch] = jax.device_get(_probabilities(model, params, tokens_BT, length_B))[: len(batch)]
    if not (finite := np.isfinite(found).all(1)).all():
        raise ValueError(f"texts[{int(np.argmin(finite))}]: the logits are NaN or infinite")
    return found


@functools.partial(jax.jit, static_argnames=("model",))
def _probabilities(model: GPT2, params: Params, tokens_BT: jax.Array, length_B: jax.Array) -> jax.Array:
    """Return the probabilities [B, L] of rows that are padded at the end."""
    mask_BT = jnp.arange(tokens_BT.shape[1]) < length_B[:, None]
    h_BTD, _ = model.apply({"params": params}, tokens_BT, mask_BT, right_padded=True, method="hidden")
    return jax.nn.softmax(model.apply({"params": params}, h_BTD, mask_BT, method="classify_hidden"))


def _batches(rows: Sequence[np.ndarray], n_ctx: int, most_tokens: int) -> Iterator[tuple[int, list[int]]]:
    """Yield the texts of each call, with the length to pad them to."""
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_length.setdefault(min(bucket_length(len(row)), n_ctx), []).append(i)
    for n_tokens, group in sorted(by_length.items()):
        n_rows = power_of_two(max(1, most_tokens // n_tokens))
        for start in range(0, len(group), n_rows):
            yield n_tokens, group[start : start + n_rows]


def _arrays(rows: Sequence[np.ndarray], n_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens_BT and length_B: rows padded at the end, then rows of one token that are not read."""
    n_rows = bucket_rows(len(rows))
    tokens_BT, length_B = np.zeros((n_rows, n_tokens), np.int32), np.ones(n_rows, np.int32)
    for b, row in enumerate(rows):
        tokens_BT[b, : len(row)], length_B[b] = row, len(row)
    return tokens_BT, length_B
