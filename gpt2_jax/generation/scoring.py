"""How likely a model finds a text: the log-probability of every token. Texts beyond n_ctx are read in windows.

Shape letters: B batch, T query, D n_embd, V vocab, C positions unembedded at a time, P all positions of a call.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpt2_jax.activations import Tap
from gpt2_jax.changes import Changes, Edits, check_changes
from gpt2_jax.checks import whole_number
from gpt2_jax.config import GPT2Config
from gpt2_jax.edits import END
from gpt2_jax.generation.buckets import bucket_length, bucket_rows, power_of_two
from gpt2_jax.generation.devices import on_devices
from gpt2_jax.generation.memory import is_out_of_memory, out_of_memory
from gpt2_jax.generation.non_finite import NoLogits, cause
from gpt2_jax.generation.prompts import check_prompt, check_prompts
from gpt2_jax.generation.settings import Settings
from gpt2_jax.generation.shared_batches import results_of
from gpt2_jax.jax_defaults import with_own_arrays
from gpt2_jax.model import GPT2, check_params
from gpt2_jax.params import Params
from gpt2_jax.processes import Share
from gpt2_jax.sharding import platform

# Tokens of one call. Larger calls do not fit a CPU's caches: at the 124M shape, 4 prompts of 1,024 tokens take half as
# long one by one as together, on two cores. On other devices large calls keep the device busy.
TOKENS_PER_CALL = {"cpu": 1024}
TOKENS_PER_CALL_ELSEWHERE = 4096
CHUNK = 256  # positions whose logits exist at a time: 51 MB of float32 for 50,257 tokens


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a model finds the tokens of one prompt.

    Attributes:
      logprobs: [T - 1], the log-probability (base e) of each token except the first, given those before it; float32
        (float64 under a float64 `compute_dtype`). With `first`, the shape is [T - first].
      sum: sum of `logprobs`.
      perplexity: exp(-mean of `logprobs`).
      greedy: bool, same shape: True if no token was more likely. Greedy decoding picks it or an equally likely one.
      greedy_aside: bool, same shape: True if no token outside `aside` was more likely; None without `aside`.
    """

    logprobs: np.ndarray
    sum: float
    perplexity: float
    greedy: np.ndarray
    greedy_aside: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Window:
    """One part of a prompt: the model reads `tokens` and scores the prompt's tokens from `first` on.

    Attributes:
      prompt: index of the prompt.
      tokens: the tokens that the model reads. The last of them is read only to predict the last target.
      targets: the tokens to score. Each follows one of the last `len(targets)` of `tokens`.
      first: position of targets[0] in the prompt, 1 or more.
      start: position of tokens[0] in the prompt.
      n_prompt: number of tokens of the prompt.
    """

    prompt: int
    tokens: np.ndarray
    targets: np.ndarray
    first: int
    start: int
    n_prompt: int


@with_own_arrays
def score(
    config: GPT2Config,
    params: Params,
    prompts: Sequence[Sequence[int]],
    stride: int | None = None,
    *,
    first: Sequence[int] | None = None,
    aside: Sequence[int] = (),
    track: Callable[[list], Iterable] = iter,
    edits: Edits = (),
    taps: Mapping[str, Tap] | None = None,
    share: Share | None = None,
) -> list[Score]:
    """Score each prompt, of any length: the log-probability of every token except the first.

    A prompt of more than n_ctx tokens is read in windows of n_ctx tokens (the last may be shorter). A window begins at
    every `stride`-th token. A token is scored once: in the first window that contains it and the token before it. In
    the first window its context is all tokens before it, in a later one the tokens before it in that window:
    n_ctx - stride or more. This is the usual sliding-window perplexity, as Hugging Face documents it, with one
    difference. At stride = n_ctx, the first token of a window has no context in it. Hugging Face leaves that token out;
    here the whole window before it scores it. A small stride gives longer contexts, and takes n_ctx / stride times as
    long as stride = n_ctx.

    Prompts of similar lengths run together, with at most 4,096 tokens per call (1,024 on a CPU), or n_ctx if that is
    more. The logits of only `CHUNK` positions exist at a time. Lengths and row counts are rounded up to a few sizes;
    each size compiles once.

    Args:
      config: the model's hyperparameters.
      params: the model's parameters, from `load`.
      prompts: a list of token-id sequences, each with at least two ids.
      stride: from 1 to n_ctx; None means n_ctx // 2.
      first: for each prompt, the position of the first token to score, from 1 to its length - 1; None means 1 for all.
        Tokens before it are only context, which takes less time.
      aside: ids that `Score.greedy_aside` ignores.
      track: takes the list of batches and yields them one by one, such as rich.progress.track.
      edits: activation edits from `gpt2_jax.research`. A value is the same for all tokens, or, with `each_row`, for all
        tokens of a prompt. Negative positions count from a prompt's end. Its last token, -1, is not read.
      taps: functions of activations, as `research.forward` takes them.
      share: this process's share, if several connected processes call this with the same arguments. Each computes whole
        batches, those of one process, and gets the results of all. `track` then takes only this process's batches; the
        processes wait for each other, so that is how much of the whole is done.

    Returns:
      A Score for each prompt, in order.

    Raises:
      ValueError: an argument is invalid (raised before tracing), or the logits become NaN or infinite (raised later).
      MemoryError: the device has too little memory.
      PeerError: another process failed.
    """
    rows = check_prompts(config, prompts, Settings(overflow="slide").check(config))
    for i, row in enumerate(rows):
        if len(row) < 2:
            raise ValueError(f"prompts[{i}] has 1 token, but a prompt's first token has no score: give two or more")
    stride = as_stride(config, stride)
    first = _check_first(rows, first)
    aside_V = np.isin(np.arange(config.n_vocab), check_prompt(config, "aside", aside)) if np.size(aside) else None
    check_params(config, params, dtypes=False)
    changes = _changes(config, edits, taps, rows)
    model, params = on_devices(config, params, bool(changes))
    wide = jnp.promote_types(config.compute_dtype, jnp.float32)
    logprobs = [np.empty(len(row) - start, wide) for row, start in zip(rows, first, strict=True)]
    greedy, greedy_aside = ([np.empty(row.shape, bool) for row in logprobs] for _ in range(2))
    windows = [window for i, row in enumerate(rows) for window in _windows(i, row, config.n_ctx, stride, first[i])]
    most_tokens = TOKENS_PER_CALL.get(platform(params), TOKENS_PER_CALL_ELSEWHERE)

    def scored(n_tokens: int, batch: list[Window]) -> list[np.ndarray]:
        n_scored = sum(len(window.targets) for window in batch)
        return [values.ravel()[:n_scored] for values in _scored(model, params, changes, batch, n_tokens, aside_V)]

    batches = list(_batches(windows, config.n_ctx, most_tokens))
    for batch, results in results_of(batches, scored, (wide, bool, bool), track, share or Share()):
        for into, values in zip((logprobs, greedy, greedy_aside), results, strict=True):
            parts = np.split(values, np.cumsum([len(window.targets) for window in batch]))
            for window, part in zip(batch, parts[:-1], strict=True):
                into[window.prompt][window.first - first[window.prompt] :][: len(part)] = part
    try:
        return [
            _score(i, first[i], logprobs[i], greedy[i], None if aside_V is None else greedy_aside[i])
            for i in range(len(rows))
        ]
    except NoLogits as error:
        raise ValueError(f"{error}: {cause(config, params, changes.edits, changes.tap_names)}") from None


def _changes(config: GPT2Config, edits: Edits, taps: Mapping[str, Tap] | None, rows: Sequence[np.ndarray]) -> Changes:
    ends_B = np.array([len(row) for row in rows])
    changes = check_changes(config, edits, taps, False, len(rows), np.minimum(ends_B, config.n_ctx), ends_B)
    for edit in changes.edits:
        positions = edit.positions
        if positions is not None and positions.size and ((positions == -1) | (positions == END)).all():
            raise ValueError(
                f"the edit of {edit.name} at position -1 changes no score: nothing is predicted from a prompt's last "
                "token; -2 is the token that the last one is predicted from"
            )
    return changes


def _scored(
    model: GPT2,
    params: Params,
    changes: Changes,
    batch: list[Window],
    n_tokens: int,
    aside_V: np.ndarray | None,
) -> tuple[np.ndarray, ...]:
    """Return the results of `_logprobs` for the windows of one call."""
    config = model.config
    try:
        arrays = _arrays(batch, n_tokens)
        n_rows = len(arrays[0])
        of_rows = changes.of_rows([window.prompt for window in batch], n_rows)
        end_B = np.zeros(n_rows, np.int32) if changes else None
        if end_B is not None:
            end_B[: len(batch)] = [window.n_prompt - window.start for window in batch]
        return jax.device_get(_logprobs(model, params, of_rows, *arrays, aside_V, end_B))
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        n_bytes = 4 * CHUNK * config.n_vocab + len(batch) * config.cache_bytes(1, n_tokens)
        raise out_of_memory(config, f"score {len(batch)} windows of {n_tokens} tokens together", n_bytes) from error


def as_stride(config: GPT2Config, stride: int | None) -> int:
    """Return the stride of `score` as an int; None gives the default.

    Raises:
      ValueError: it is not a whole number from 1 to n_ctx.
    """
    return max(1, config.n_ctx // 2) if stride is None else whole_number("stride", stride, 1, config.n_ctx)


@functools.partial(jax.jit, static_argnames=("model",))
def _logprobs(
    model: GPT2,
    params: Params,
    changes: Changes,
    tokens_BT: jax.Array,
    mask_BT: jax.Array,
    position_PC: jax.Array,
    target_PC: jax.Array,
    n_chunks: jax.Array,
    aside_V: jax.Array | None = None,
    end_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return logprob_PC, greedy_PC and greedy_aside_PC of the targets, which follow the flat positions (b T + t).

    The first `n_chunks` rows of `position_PC` are real. greedy: no token was more likely; greedy_aside: none outside
    `aside_V`. `end_B` is where each prompt ends in its window, for edits.
    """
    how = {"taps": changes.by_name(model.config, end_B), "right_padded": True, "method": "hidden"}
    h_BTD, _ = model.apply({"params": params}, tokens_BT, mask_BT, **how)
    h_PD = h_BTD.reshape(-1, h_BTD.shape[-1])

    def chunk(i: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        logits_CV = model.apply({"params": params}, h_PD[position_PC[i]], method="unembed")
        target_C1 = jnp.take_along_axis(logits_CV, target_PC[i][:, None], axis=-1)
        logprob_C = target_C1[:, 0] - jax.nn.logsumexp(logits_CV, axis=-1)
        greedy_C = greedy_aside_C = target_C1[:, 0] >= logits_CV.max(axis=-1)
        if aside_V is not None:
            greedy_aside_C = target_C1[:, 0] >= jnp.where(aside_V, -jnp.inf, logits_CV).max(axis=-1)
        values = (logprob_C, greedy_C, greedy_aside_C)
        return tuple(all_PC.at[i].set(of_C) for all_PC, of_C in zip(found, values, strict=True))

    wide = jnp.promote_types(model.config.compute_dtype, jnp.float32)
    return lax.fori_loop(0, n_chunks, chunk, tuple(jnp.zeros(position_PC.shape, dtype) for dtype in (wide, bool, bool)))


def _windows(prompt: int, row: np.ndarray, n_ctx: int, stride: int, scored_from: int = 1) -> Iterator[Window]:
    start, first = 0, 1
    while first < len(row):
        # Without overlap, a window also scores the token after it, which has no context in the next window.
        stop = min(start + n_ctx + (stride == n_ctx), len(row))
        if stop > scored_from:
            first = max(first, scored_from)
            yield Window(prompt, row[start : stop - 1], row[first:stop], first, start, len(row))
        start, first = start + stride, stop


def _batches(windows: list[Window], n_ctx: int, most_tokens: int) -> Iterator[tuple[int, list[Window]]]:
    """Yield the windows of each call, with the length to pad them to."""
    by_length: dict[int, list[Window]] = {}
    for window in windows:
        by_length.setdefault(min(bucket_length(len(window.tokens)), n_ctx), []).append(window)
    for n_tokens, group in sorted(by_length.items()):
        n_rows = power_of_two(max(1, most_tokens // n_tokens))
        for start in range(0, len(group), n_rows):
            yield n_tokens, group[start : start + n_rows]


def _arrays(batch: list[Window], n_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.int32]:
    """Return the arguments of `_logprobs` from `tokens_BT` on: rows padded on the right, then empty rows."""
    n_rows = bucket_rows(len(batch))
    tokens_BT = np.zeros((n_rows, n_tokens), np.int32)
    mask_BT = np.zeros((n_rows, n_tokens), bool)
    positions = []
    for b, window in enumerate(batch):
        n = len(window.tokens)
        tokens_BT[b, :n] = window.tokens
        mask_BT[b, :n] = True
        positions.append(b * n_tokens + np.arange(n - len(window.targets), n))
    n_at_once = min(CHUNK, n_rows * n_tokens)
    position_PC, target_PC = (
        _in_chunks(np.concatenate(parts), n_rows * n_tokens, n_at_once)
        for parts in (positions, [window.targets for window in batch])
    )
    n_scored = sum(len(window.targets) for window in batch)
    return tokens_BT, mask_BT, position_PC, target_PC, np.int32(-(-n_scored // n_at_once))


def _in_chunks(values: np.ndarray, at_most: int, n_at_once: int) -> np.ndarray:
    padded = np.zeros((-(-at_most // n_at_once), n_at_once), np.int32)
    padded.ravel()[: len(values)] = values
    return padded


def _score(i: int, first: int, logprobs: np.ndarray, greedy: np.ndarray, greedy_aside: np.ndarray | None) -> Score:
    if not (finite := np.isfinite(logprobs)).all():
        raise NoLogits(f"prompts[{i}]: the logits are NaN or infinite at token {np.argmin(finite) + first}")
    total = float(logprobs.sum(dtype=np.float64))
    with np.errstate(over="ignore"):  # inf if it exceeds float64
        return Score(logprobs, total, float(np.exp(-total / len(logprobs))), greedy, greedy_aside)


def _check_first(rows: list[np.ndarray], first: Sequence[int] | None) -> list[int]:
    if first is None:
        return [1] * len(rows)
    if not hasattr(first, "__len__") or len(first) != len(rows):
        raise ValueError(f"first must hold a number for each of the {len(rows)} prompts, not {first!r}")
    pairs = enumerate(zip(rows, first, strict=True))
    return [whole_number(f"first[{i}]", start, 1, len(row) - 1) for i, (row, start) in pairs]
