"""Decoding: a few compiled programs, and the loop on the host that calls them.

`prefill` reads prompts into a cache. `decode` takes up to 16 decode steps in one loop on the device, which reads the
long part of the cache and writes a short recent part. `merge_recent` moves a full recent part into the long one.

Shape letters: B batch, G rows of one prefill, P padded prompt, R recent slots, K alternatives, V vocab, D n_embd.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding, SingleDeviceSharding

from gpt2_jax.edits import Edit, taps_of
from gpt2_jax.generation.buckets import bucket_length, bucket_rows, power_of_two
from gpt2_jax.generation.memory import RECENT, cache_slots
from gpt2_jax.generation.settings import Settings
from gpt2_jax.kv_cache import KVCache, init_cache, insert, merge
from gpt2_jax.model import GPT2
from gpt2_jax.params import Params
from gpt2_jax.sampling import Sampling, pick, token_logprobs
from gpt2_jax.sharding import platform

# Devices on which `decode` always takes RECENT steps. There XLA waits for the host at each turn of any other loop.
FIXED_STEPS = {"gpu"}
STOP_IDS = 16  # least number of stop ids that a program has room for
NO_ID = -2  # fills the rest if there are fewer stop ids
# On a GPU, XLA reads the key of a slot together. If keys are stored otherwise, it transposes them in every call of
# `decode`. So the long cache has the order [B, N, S, H] in memory there. On a CPU this order would take three times as
# long: 0.26 ms instead of 0.09 ms for a layer of 12 heads of 64 over 1,024 slots.
KEY_LAYOUTS = {"gpu": Layout((0, 1, 3, 2))}
LONG_CACHE = {  # the programs whose first result is the long cache, and their options
    "empty": {"static_argnames": ("model", "n_rows", "n_slots")},
    "place": {"donate_argnames": ("past", "h_BD")},
    "merge_recent": {"donate_argnames": ("past", "recent")},
}
# Tokens of one prefill call. Larger calls do not fit a CPU's caches: 8 prompts of 512 tokens take a quarter longer
# together than one by one. On other devices large calls keep the device busy; the scores of this many tokens still fit.
PREFILL_TOKENS = {"cpu": 512}
PREFILL_TOKENS_ELSEWHERE = 2**14


@struct.dataclass
class Picked:
    """The tokens that the steps of one call picked.

    Attributes:
      id_BR: int32; 0 for rows that had ended before, NO_LOGITS where the logits define no probabilities.
      chosen_BR: float32, the log-probability of each; this and the next two are None if not requested.
      top_id_BRK: int32, the most likely ids, most likely first.
      top_BRK: float32, their log-probabilities.
    """

    id_BR: jax.Array
    chosen_BR: jax.Array | None = None
    top_id_BRK: jax.Array | None = None
    top_BRK: jax.Array | None = None


@struct.dataclass
class State:
    """What a decode step changes.

    Attributes:
      recent: the keys and values of up to RECENT tokens, which follow those of the long part.
      token_B: int32, the last token of each row, which the model has not read yet.
      seen_BV: bool, True for the ids that each row contains, prompt included.
      done_B: bool, True for rows that have ended. Their further results are discarded.
      key_B: one key per row; the t-th new token of row b is drawn with fold_in(key_B[b], t).
      n_new: int32 scalar, number of new tokens so far in every row.
    """

    recent: KVCache
    token_B: jax.Array
    seen_BV: jax.Array
    done_B: jax.Array
    key_B: jax.Array
    n_new: jax.Array


# ---- the compiled programs


@functools.partial(jax.jit, **LONG_CACHE["empty"])
def empty(model: GPT2, n_rows: int, n_slots: int) -> tuple[KVCache, jax.Array]:
    """Return an empty long cache, and zeros for the last hidden state of each row [B, D]."""
    config = model.config
    return init_cache(config, n_rows, n_slots), jnp.zeros((n_rows, config.n_embd), config.compute_dtype)


@functools.partial(jax.jit, static_argnames=("model",))
def prefill(
    model: GPT2, params: Params, edits: tuple[Edit, ...], tokens_GP: jax.Array, length_G: jax.Array
) -> tuple[KVCache, jax.Array]:
    """Run rows of `length_G` tokens, padded on the right, through the model.

    Returns:
      Their cache of P slots, and the hidden state of each row's last token [G, D].
    """
    n_rows, n_slots = tokens_GP.shape
    mask_GP = jnp.arange(n_slots) < length_G[:, None]
    cache = init_cache(model.config, n_rows, n_slots)
    how = {"taps": taps_of(edits), "right_padded": True, "method": "hidden"}
    h_GPD, cache = model.apply({"params": params}, tokens_GP, mask_GP, cache, **how)
    return cache, h_GPD[jnp.arange(n_rows), jnp.maximum(length_G - 1, 0)]


@functools.partial(jax.jit, **LONG_CACHE["place"])
def place(
    past: KVCache, h_BD: jax.Array, cache: KVCache, h_GD: jax.Array, row_G: jax.Array
) -> tuple[KVCache, jax.Array]:
    """Write the results of a prefill into the rows `row_G` of the batch."""
    return insert(past, cache, row_G), h_BD.at[row_G].set(h_GD)


@functools.partial(jax.jit, static_argnames=("model", "n_top"))
def first(
    model: GPT2,
    params: Params,
    h_BD: jax.Array,
    seen_BV: jax.Array,
    done_B: jax.Array,
    row_B: jax.Array,
    seed: jax.Array,
    sampling: Sampling,
    stop_ids: jax.Array,
    n_top: int | None,
) -> tuple[State, Picked]:
    """Pick each row's first new token, from the hidden state of its last token."""
    key = jax.random.key(seed, impl="threefry2x32")
    state = State(
        recent=init_cache(model.config, len(h_BD), RECENT),
        token_B=jnp.zeros(len(h_BD), jnp.int32),
        seen_BV=jnp.asarray(seen_BV),  # a NumPy array if jit is disabled
        done_B=done_B,
        key_B=jax.vmap(jax.random.fold_in, (None, 0))(key, row_B),
        n_new=jnp.int32(0),
    )
    logits_BV = model.apply({"params": params}, h_BD, method="unembed")
    state, picked = _append(state, logits_BV, sampling, stop_ids, n_top)
    return state, jax.tree.map(lambda array: array[:, None], picked)


@functools.partial(jax.jit, static_argnames=("model", "n_top", "fixed"), donate_argnames=("state",))
def decode(
    model: GPT2,
    params: Params,
    edits: tuple[Edit, ...],
    past: KVCache,
    state: State,
    done_B: jax.Array,
    sampling: Sampling,
    stop_ids: jax.Array,
    n_steps: jax.Array,
    n_top: int | None,
    fixed: bool = False,
) -> tuple[State, Picked]:
    """Take up to `n_steps` decode steps, fewer if all rows end before. `recent` must have room for them.

    `past` is only read. So the loop does not update an array of its size, which XLA would copy.
    With `fixed`, the loop always has RECENT turns, and turns after the last step leave the state as it is. Then
    `recent` must be empty: such a turn writes into its first free slot, and masks it.
    """
    state = dataclasses.replace(state, done_B=state.done_B | done_B)

    def goes_on(i: jax.Array, state: State) -> jax.Array:
        return (i < n_steps) & ~state.done_B.all()

    def step(carry: tuple[jax.Array, State, Picked]) -> tuple[jax.Array, State, Picked]:
        i, state, all_picked = carry
        on = goes_on(i, state) if fixed else None
        mask_B1 = None if on is None else jnp.broadcast_to(on, (len(done_B), 1))
        cache = dataclasses.replace(state.recent, past=past)
        out = model.apply({"params": params}, state.token_B[:, None], mask_B1, cache, taps=taps_of(edits))
        recent = dataclasses.replace(out.cache, past=None)
        if on is not None:
            recent = dataclasses.replace(recent, length=jnp.where(on, recent.length, state.recent.length))
        state = dataclasses.replace(state, recent=recent)
        state, picked = _append(state, out.logits[:, -1], sampling, stop_ids, n_top, on)
        write = functools.partial(lax.dynamic_update_index_in_dim, index=i, axis=1)
        return i + 1, state, jax.tree.map(write, all_picked, picked)

    carry = (jnp.int32(0), state, _nothing_picked(len(done_B), n_top))
    if fixed:
        return lax.fori_loop(0, RECENT, lambda _, carry: step(carry), carry)[1:]
    return lax.while_loop(lambda carry: goes_on(*carry[:2]), step, carry)[1:]


@functools.partial(jax.jit, **LONG_CACHE["merge_recent"])
def merge_recent(past: KVCache, recent: KVCache) -> tuple[KVCache, KVCache]:
    """Move the recent part's tokens into the long part."""
    nothing = {"mask_BS": jnp.zeros_like(recent.mask_BS), "length": jnp.zeros_like(recent.length)}
    recent_after = dataclasses.replace(recent, **nothing)
    return merge(past, recent), recent_after


def key_format(sharding: Sharding) -> Format | None:
    """Return how a device stores the keys of the long cache, if not in the order of their axes.

    None is the answer for several devices, too: how XLA divides the cache over them is not known here.
    """
    [device, *others] = sharding.device_set
    if others or device.platform not in KEY_LAYOUTS:
        return None
    return Format(KEY_LAYOUTS[device.platform], SingleDeviceSharding(device))


@functools.lru_cache
def in_format(program: Any, keys: Format | None) -> Any:
    """Return one of the programs of LONG_CACHE, whose keys get this format. Programs that read them need no change."""
    if keys is None:
        return program
    long_cache: Any = KVCache(k_BNHS=keys, v_BNSH=None, mask_BS=None, length=None)  # pyright: ignore[reportArgumentType]
    return jax.jit(program.__wrapped__, out_shardings=(long_cache, None), **LONG_CACHE[program.__name__])


def _append(
    state: State,
    logits_BV: jax.Array,
    sampling: Sampling,
    stop_ids: jax.Array,
    n_top: int | None,
    on: jax.Array | None = None,
) -> tuple[State, Picked]:
    """Pick one token per row, and add it to the state. If `on` is False, the state stays as it is."""
    key_B = jax.vmap(jax.random.fold_in, (0, None))(state.key_B, state.n_new)
    token_B = pick(logits_BV, key_B, sampling, state.seen_BV)
    picked = Picked(jnp.where(state.done_B, 0, token_B))
    token_B = jnp.maximum(picked.id_BR, 0)
    if n_top is not None:
        picked = Picked(picked.id_BR, *token_logprobs(logits_BV, token_B, n_top, sampling.n_ids))
    done_B, seen_B = state.done_B | (token_B[:, None] == stop_ids).any(-1), token_B
    if on is not None:
        token_B, done_B = jnp.where(on, token_B, state.token_B), jnp.where(on, done_B, state.done_B)
        seen_B = jnp.where(on, seen_B, logits_BV.shape[-1])  # out of range: nothing is set
    state = dataclasses.replace(
        state,
        token_B=token_B,
        seen_BV=state.seen_BV.at[jnp.arange(len(seen_B)), seen_B].set(True, mode="drop"),
        done_B=done_B,
        n_new=state.n_new + (1 if on is None else on),
    )
    return state, picked


def _nothing_picked(n_rows: int, n_top: int | None) -> Picked:
    """Return zero arrays for the picks of RECENT steps."""
    picked = Picked(jnp.zeros((n_rows, RECENT), jnp.int32))
    if n_top is None:
        return picked
    room, top = (n_rows, RECENT), (n_rows, RECENT, n_top)
    return dataclasses.replace(
        picked,
        chosen_BR=jnp.zeros(room, jnp.float32),
        top_id_BRK=jnp.zeros(top, jnp.int32),
        top_BRK=jnp.zeros(top, jnp.float32),
    )


# ---- the loop on the host


def window(n_ctx: int, n_tokens: int) -> int:
    """Return how many of a row's last tokens the model reads when it chooses the next one.

    It reads all tokens up to n_ctx. When they no longer fit, it reads the last n_ctx // 2, and then up to n_ctx again.
    This depends only on the number of tokens. So a text continues the same way however it was produced.
    """
    kept = max(1, n_ctx // 2)
    return n_tokens if n_tokens <= n_ctx else kept + (n_tokens - n_ctx - 1) % (n_ctx - kept + 1)


def decode_rows(
    model: GPT2,
    params: Params,
    prompts: Sequence[np.ndarray],
    settings: Settings,
    finished_B: np.ndarray,
    first_row: int | np.ndarray = 0,
    steps_a_call: int = RECENT,
    look_ahead: bool = False,
    edits: tuple[Edit, ...] = (),
) -> Iterator[Picked]:
    """Yield what the rows pick, a few steps at a time, as NumPy arrays [B, n, ...]: `max_new_tokens` steps in total.

    Args:
      model: a GPT2, or another hashable object with `config` and `apply`.
      params: the model's parameters.
      prompts: the rows' ids. With the new ids they may exceed n_ctx only if `settings.overflow` is "slide".
      settings: checked settings, with at least one new token.
      finished_B: bool; the caller sets it to True for rows that have ended. Decoding ends when all have.
      first_row: row b draws like row `first_row + b`, or like row `first_row[b]` of an array [B].
      steps_a_call: maximum number of steps between two yields, at most RECENT. On a GPU it is always RECENT.
      look_ahead: start a call before the tokens of the last one are yielded, so that the device does not wait for the
        host. For callers that set `finished_B` only by `settings.stop_ids`, which the device checks too.
      edits: checked edits, applied in every forward pass. Other values do not recompile.
    """
    batch = _Batch(model, params, prompts, settings, edits)
    waiting = collections.deque([(batch.first(first_row), 1)])
    n_new = 1

    def hand_out(n_left: int) -> Iterator[Picked]:
        while len(waiting) > n_left and not finished_B.all():
            picked = batch.fetch(*waiting.popleft())
            batch.note(np.asarray(picked.id_BR))
            yield picked

    yield from hand_out(int(look_ahead))
    while n_new < settings.max_new_tokens and not finished_B.all():
        n_free = batch.n_free(finished_B)
        if n_free == 0:
            if batch.full_rows(finished_B):  # their last tokens must be known
                yield from hand_out(0)
            batch.make_room(finished_B)
            continue
        n_steps = min(RECENT if batch.fixed else steps_a_call, n_free, settings.max_new_tokens - n_new)
        waiting.append((batch.decode(n_steps, finished_B), n_steps))
        n_new += n_steps
        yield from hand_out(int(look_ahead))
    yield from hand_out(0)


class _Batch:
    """The rows of one call, padded to a bucket: their cache and state on the device, their tokens on the host."""

    def __init__(
        self, model: GPT2, params: Params, prompts: Sequence[np.ndarray], settings: Settings, edits: tuple[Edit, ...]
    ):
        self.model, self.params, self.settings, self.edits = model, params, settings, edits
        self.config = model.config
        self.sampling = settings.sampling(self.config)
        self.fixed = platform(params) in FIXED_STEPS
        self.rows = [prompt.tolist() for prompt in prompts]
        n_missing = bucket_rows(max(len(settings.stop_ids), STOP_IDS)) - len(settings.stop_ids)
        self.stop_ids = np.array([*settings.stop_ids, *[NO_ID] * n_missing], np.int32)

        self.n_rows = bucket_rows(len(prompts))
        longest = max(map(len, self.rows)) + settings.max_new_tokens
        self.keys = key_format(jax.tree.leaves(params)[0].sharding)
        self.past, self.h_BD = in_format(empty, self.keys)(model, self.n_rows, cache_slots(self.config, longest))
        self.n_cached_B = np.zeros(len(prompts), int)  # tokens in both parts of the cache
        self.n_recent = 0
        self._prefill({b: row[-window(self.config.n_ctx, len(row)) :] for b, row in enumerate(self.rows)})

    def first(self, first_row: int | np.ndarray) -> Picked:
        """Pick the first new tokens."""
        seen_BV = np.zeros((self.n_rows, self.config.n_vocab), bool)
        for b, row in enumerate(self.rows):
            seen_BV[b, row] = True
        row_B = np.zeros(self.n_rows, np.uint32)
        row_B[: len(self.rows)] = first_row if np.ndim(first_row) else first_row + np.arange(len(self.rows))
        knobs = (np.uint32(self.settings.seed), self.sampling, self.stop_ids, self.settings.logprobs)
        no_row_B = np.arange(self.n_rows) >= len(self.rows)
        self.state, picked = first(self.model, self.params, self.h_BD, seen_BV, no_row_B, row_B, *knobs)
        return picked

    def decode(self, n_steps: int, finished_B: np.ndarray) -> Picked:
        """Start a call of `n_steps` steps."""
        done_B = np.ones(self.n_rows, bool)
        done_B[: len(self.rows)] = finished_B
        knobs = (self.sampling, self.stop_ids, np.int32(n_steps), self.settings.logprobs, self.fixed)
        self.state, picked = decode(self.model, self.params, self.edits, self.past, self.state, done_B, *knobs)
        self.n_recent += n_steps
        self.n_cached_B += n_steps
        return picked

    def fetch(self, picked: Picked, n_steps: int) -> Picked:
        """Wait for a call of `n_steps` steps, and return what it picked for real rows."""
        # Copied: a view would keep the device's array alive.
        return jax.tree.map(lambda array: np.array(np.asarray(array)[: len(self.rows), :n_steps]), picked)

    def note(self, id_BR: np.ndarray) -> None:
        """Append the new ids to the rows. Those of a finished row have no meaning and are not used."""
        for row, ids in zip(self.rows, id_BR.tolist(), strict=True):
            row += ids

    def n_free(self, finished_B: np.ndarray) -> int:
        """Return how many steps the cache has room for."""
        if self.fixed and self.n_recent:  # `decode` needs an empty recent part
            return 0
        return min(RECENT - self.n_recent, self.config.n_ctx - self.n_cached_B[~finished_B].max())

    def full_rows(self, finished_B: np.ndarray) -> list[int]:
        """Return the unfinished rows whose window is full."""
        return np.flatnonzero(~finished_B & (self.n_cached_B == self.config.n_ctx)).tolist()

    def make_room(self, finished_B: np.ndarray) -> None:
        """Move the recent part into the long one, and cut the windows of full rows."""
        self.past, recent = in_format(merge_recent, self.keys)(self.past, self.state.recent)
        self.state = dataclasses.replace(self.state, recent=recent)
        self.n_recent = 0
        if full := self.full_rows(finished_B):
            # Without the last token, which the next step reads.
            self._prefill({b: self.rows[b][-window(self.config.n_ctx, self.config.n_ctx + 1) : -1] for b in full})

    def _prefill(self, window_of: dict[int, list[int]]) -> None:
        """Replace what the cache holds for these rows by these tokens."""
        members = collections.defaultdict(list)
        for b, tokens in window_of.items():
            members[min(bucket_length(len(tokens)), self.config.n_ctx)].append(b)
            self.n_cached_B[b] = len(tokens)
        for n_slots, rows in members.items():
            n_together = max(1, PREFILL_TOKENS.get(platform(self.params), PREFILL_TOKENS_ELSEWHERE) // n_slots)
            while rows:
                n_rows = power_of_two(min(n_together, len(rows)))  # 7 rows as 4, 2 and 1: none is padded
                group, rows = rows[:n_rows], rows[n_rows:]
                tokens_GP = np.zeros((len(group), n_slots), np.int32)
                for g, b in enumerate(group):
                    tokens_GP[g, : len(window_of[b])] = window_of[b]
                length_G = np.array([len(window_of[b]) for b in group], np.int32)
                cache, h_GD = prefill(self.model, self.params, self.edits, tokens_GP, length_G)
                row_G = np.array(group, np.int32)
                put = in_format(place, self.keys)
                self.past, self.h_BD = put(self.past, self.h_BD, cache, h_GD, row_G)
