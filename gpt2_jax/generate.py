"""Decoding: one compiled prefill, then one `lax.while_loop` on the device over a KV cache.

Shape letters: B batch, P padded prompt, M most new tokens, V vocab.
"""

from __future__ import annotations

import functools
import math
import operator
import reprlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from gpt2_jax.config import GPT2Config
from gpt2_jax.kv_cache import KVCache, extend_cache, init_cache
from gpt2_jax.model import GPT2, check_params
from gpt2_jax.params import Params
from gpt2_jax.sampling import Sampling, pick

SMALLEST_BUCKET = 32


@struct.dataclass
class DecodeState:
    """The decoding loop's state.

    Attributes:
      step: int32 scalar, new tokens so far in every row.
      new_BM: int32, the new tokens; [:, step:] is not written yet.
      key_B: a key for each row; step t of row b draws with fold_in(key_B[b], t).
      cache: what the model has seen: the prompt and all new tokens but the last.

    """

    step: jax.Array
    new_BM: jax.Array
    key_B: jax.Array
    cache: KVCache


def generate(
    config: GPT2Config,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continue each prompt by `max_new_tokens` tokens; as in the original, not even `<|endoftext|>` stops earlier.

    Row i's ids depend on the seed, on i and on its prompt alone: not on the other rows, their number, padding or
    earlier calls. (Products of another batch size may round differently. In float32 that is never seen in practice; in
    bfloat16, or TF32 on a GPU, it now and then tips a close choice, and the row goes another way from there.)
    Compiles once for each config, number of rows, bucket of prompt lengths and bucket of new tokens; the other settings
    are traced.

    Args:
      config: the model's hyperparameters.
      params: its parameters, as `load` gives them.
      prompts: a list of token-id sequences, each of at least one id, of any lengths.
      max_new_tokens: tokens to add to every prompt; prompt and new tokens must fit in n_ctx together.
      temperature: the logits are divided by it; 0 always takes the most likely token (greedy).
      top_k: draw from the k most likely tokens and all ties with the k-th; 0 means all.
      top_p: of those, draw from the longest prefix, most likely first, whose probabilities add up to at most p, at
        least one token, and all ties with the last; 1 means all.
      seed: in [0, 2**32).

    Returns:
      The new ids, one list for each prompt.

    Raises:
      ValueError: a bad argument, before anything is traced; or, after, logits that are NaN: the params hold one.

    """
    rows, sampling = check_arguments(config, prompts, max_new_tokens, temperature, top_k, top_p, seed)
    check_params(config, params, dtypes=False)
    max_new_tokens, seed = operator.index(max_new_tokens), operator.index(seed)
    if max_new_tokens == 0:
        return [[] for _ in rows]
    tokens_BP, mask_BP = _pad_left(rows)
    model = GPT2(config)
    state = prefill(model, params, tokens_BP, mask_BP, sampling, np.uint32(seed), n_new_slots=_bucket(max_new_tokens))
    state = decode(model, params, state, sampling, np.int32(max_new_tokens))
    new_BM = np.asarray(state.new_BM)[:, :max_new_tokens]
    if (new_BM < 0).any():
        row, step = np.argwhere(new_BM < 0)[0]
        raise ValueError(f"prompts[{row}] got NaN for logits at its new token {step}: look for NaN in the params")
    return new_BM.tolist()


def check_arguments(
    config: GPT2Config,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> tuple[list[np.ndarray], Sampling]:
    """Check all of `generate`'s arguments but the params, which need not be loaded yet.

    Returns:
      The prompts as arrays, and the sampling knobs.

    Raises:
      ValueError: the argument that is wrong, its value, and what would be right.

    """
    if not isinstance(config, GPT2Config):
        raise ValueError(f"config must be a GPT2Config, not a {type(config).__name__}")
    max_new_tokens = _whole_number("max_new_tokens", max_new_tokens, 0, math.inf)
    _whole_number("seed", seed, 0, 2**32 - 1)
    top_k = _whole_number("top_k", top_k, 0, math.inf)
    if not 0 <= _real(temperature) <= float(np.finfo(np.float32).max):
        raise ValueError(f"temperature must be a finite float32 number, 0 (greedy) or more, not {temperature!r}")
    if not 0 < _real(top_p) <= 1:
        raise ValueError(f"top_p must be a number above 0 and at most 1 (all), not {top_p!r}")
    rows = _check_prompts(config, prompts, max_new_tokens)
    return rows, Sampling(np.float32(temperature), np.int32(min(top_k, config.n_vocab)), np.float32(top_p))


@functools.partial(jax.jit, static_argnames=("model", "n_new_slots"))
def prefill(
    model: GPT2,
    params: Params,
    tokens_BP: jax.Array,
    mask_BP: jax.Array,
    sampling: Sampling,
    seed: jax.Array,
    n_new_slots: int,
) -> DecodeState:
    """Run the prompts through the model, pick each row's first new token, and make room for `n_new_slots` tokens."""
    n_rows, n_prompt = tokens_BP.shape
    key = jax.random.key(seed, impl="threefry2x32")
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n_rows))
    cache = init_cache(model.config, n_rows, n_prompt)
    h_BPD, cache = model.apply({"params": params}, tokens_BP, mask_BP, cache, method="hidden")
    logits_BV = model.apply({"params": params}, h_BPD[:, -1], method="unembed")
    new_BM = jnp.zeros((n_rows, n_new_slots), jnp.int32)
    return _append(DecodeState(jnp.int32(0), new_BM, key_B, extend_cache(cache, n_new_slots)), logits_BV, sampling)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def decode(model: GPT2, params: Params, state: DecodeState, sampling: Sampling, n_new: jax.Array) -> DecodeState:
    """Take steps until every row has `n_new` new tokens."""

    def step(state: DecodeState) -> DecodeState:
        tokens_B1 = lax.dynamic_slice_in_dim(state.new_BM, state.step - 1, 1, axis=1)
        out = model.apply({"params": params}, tokens_B1, cache=state.cache)
        return _append(state.replace(cache=out.cache), out.logits[:, -1], sampling)

    return lax.while_loop(lambda state: state.step < n_new, step, state)


def _append(state: DecodeState, logits_BV: jax.Array, sampling: Sampling) -> DecodeState:
    key_B = jax.vmap(jax.random.fold_in, (0, None))(state.key_B, state.step)
    token_B1 = pick(logits_BV, key_B, sampling)[:, None]
    new_BM = lax.dynamic_update_slice_in_dim(state.new_BM, token_B1, state.step, axis=1)
    return state.replace(step=state.step + 1, new_BM=new_BM)


def _pad_left(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens_BP and mask_BP: prompts end in the last column, so that all rows write the same slot at a step."""
    n_prompt = _bucket(max(len(row) for row in rows))
    tokens_BP = np.zeros((len(rows), n_prompt), np.int32)
    mask_BP = np.zeros((len(rows), n_prompt), bool)
    for b, row in enumerate(rows):
        tokens_BP[b, n_prompt - len(row) :] = row
        mask_BP[b, n_prompt - len(row) :] = True
    return tokens_BP, mask_BP


def _bucket(n: int) -> int:
    """Round a length up to one of a few, so that few programs are compiled: 32, 48, 64, 96, 128, 192, ..."""
    power = 1 << (n - 1).bit_length()
    return max(SMALLEST_BUCKET, power * 3 // 4 if n <= power * 3 // 4 else power)


def _check_prompts(config: GPT2Config, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[np.ndarray]:
    if isinstance(prompts, str) or not hasattr(prompts, "__len__") or getattr(prompts, "ndim", 1) == 0:
        raise ValueError(f"prompts must be a list of token-id lists, not {reprlib.repr(prompts)}")
    if len(prompts) == 0:
        raise ValueError("prompts is empty: give at least one list of token ids")
    rows = [_check_prompt(config, f"prompts[{b}]", prompt) for b, prompt in enumerate(prompts)]
    for b, row in enumerate(rows):
        if len(row) + max_new_tokens > config.n_ctx:
            raise ValueError(
                f"prompts[{b}] has {len(row)} tokens, and max_new_tokens={max_new_tokens} more make "
                f"{len(row) + max_new_tokens}: the model's n_ctx is {config.n_ctx}"
            )
    return rows


def _check_prompt(config: GPT2Config, name: str, prompt: Sequence[int]) -> np.ndarray:
    try:
        row = np.asarray(prompt)
    except ValueError:  # a list of lists of several lengths
        row = np.asarray(None)
    if row.ndim == 1 and row.size == 0:
        raise ValueError(f"{name} is empty: a prompt needs at least one token id")
    if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
        raise ValueError(f"{name} must be a list of token ids, not {reprlib.repr(prompt)}")
    wrong = row[(row < 0) | (row >= config.n_vocab)]
    if wrong.size:
        raise ValueError(f"{name} holds the id {wrong[0]}, outside the vocabulary of {config.n_vocab} ids")
    return row


def _whole_number(name: str, value: int, low: int, high: float) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        limits = f"{low} or more" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name} must be a whole number, {limits}, not {value!r}")
    return number


def _real(value: float) -> float:
    """Return a number as a Python float, and NaN, which is in no range, for anything else."""
    try:
        return math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
