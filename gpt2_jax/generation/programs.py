"""The compiled programs of generation.

`prefill` reads prompts into a cache. `decode` takes up to 16 decode steps in one loop on the device, which reads the
long part of the cache and writes a short recent part. `merge_recent` moves a full recent part into the long one.

Shape letters: B batch, G rows of one prefill, P padded prompt, R recent slots, K alternatives, V vocab, D n_embd.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from gpt2_jax.activations import dtype_of, shape
from gpt2_jax.changes import Changes
from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.memory import RECENT
from gpt2_jax.kv_cache import KVCache, empty_cache, insert, merge
from gpt2_jax.model import GPT2
from gpt2_jax.params import Params
from gpt2_jax.sampling import Sampling, pick, token_logprobs
from gpt2_jax.sharding import array_sharding
from gpt2_jax.tensor_parallel import divided

# On a GPU, XLA reads the key of a slot together. If keys are stored otherwise, it transposes them in every call of
# `decode`. So the long cache has the order [B, N, S, H] in memory there. On a CPU this order would take three times as
# long: 0.26 ms instead of 0.09 ms for a layer of 12 heads of 64 over 1,024 slots.
KEY_LAYOUTS = {"gpu": Layout((0, 1, 3, 2))}
LONG_CACHE = {  # the programs whose first result is the long cache, and their options
    "empty": {"static_argnames": ("model", "n_rows", "n_slots")},
    "place": {"donate_argnames": ("past", "h_BD")},
    "merge_recent": {"donate_argnames": ("past", "recent")},
}


@struct.dataclass
class Picked:
    """The tokens that the steps of one call picked.

    Attributes:
      id_BR: int32; 0 for rows that had ended before, NO_LOGITS where the logits define no probabilities.
      chosen_BR: float32, the log-probability of each; this and the next two are None if not requested.
      top_id_BRK: int32, the most likely ids, most likely first.
      top_BRK: float32, their log-probabilities.
      captured: {name: [B, R, ...]}, activations of the token that each was predicted from.
    """

    id_BR: jax.Array
    chosen_BR: jax.Array | None = None
    top_id_BRK: jax.Array | None = None
    top_BRK: jax.Array | None = None
    captured: dict[str, jax.Array] = struct.field(default_factory=dict)


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


class Formats(NamedTuple):
    """Where and how devices store the arrays of a long cache: a Format or a Sharding each. None is as XLA prefers."""

    keys: Any
    values: Any = None
    mask: Any = None
    length: Any = None


@functools.partial(jax.jit, **LONG_CACHE["empty"])
def empty(model: GPT2, n_rows: int, n_slots: int) -> tuple[KVCache, jax.Array]:
    """Return an empty long cache, and zeros for the last hidden state of each row [B, D]."""
    config = model.config
    return _empty_cache(model, n_rows, n_slots), jnp.zeros((n_rows, config.n_embd), config.compute_dtype)


@functools.partial(jax.jit, static_argnames=("model", "capture"))
def prefill(
    model: GPT2,
    params: Params,
    changes: Changes,
    tokens_GP: jax.Array,
    length_G: jax.Array,
    end_G: jax.Array | None = None,
    capture: tuple[str, ...] = (),
) -> tuple[KVCache, jax.Array, dict[str, jax.Array]]:
    """Run rows of `length_G` tokens, padded on the right, through the model.

    Args:
      model, params: the model.
      changes: edits and taps.
      tokens_GP, length_G: the rows.
      end_G: where each prompt ends, for edits; None without changes.
      capture: names of activations.

    Returns:
      Their cache of P slots, the hidden state of each row's last token [G, D], and its captured activations [G, ...].
    """
    n_rows, n_slots = tokens_GP.shape
    mask_GP = jnp.arange(n_slots) < length_G[:, None]
    cache = _empty_cache(model, n_rows, n_slots)
    how = {"taps": changes.by_name(model.config, end_G), "right_padded": True}
    h_GPD, cache, captured = _hidden(model, params, tokens_GP, mask_GP, cache, capture, how)

    def last(array_GP: jax.Array) -> jax.Array:
        last_G = jnp.maximum(length_G - 1, 0).reshape(-1, *[1] * (array_GP.ndim - 1))
        return jnp.take_along_axis(array_GP, last_G, axis=1)[:, 0]

    return cache, last(h_GPD), jax.tree.map(last, captured)


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
        recent=_empty_cache(model, len(h_BD), RECENT),
        token_B=jnp.zeros(len(h_BD), jnp.int32),
        seen_BV=jnp.asarray(seen_BV),  # a NumPy array if jit is disabled
        done_B=done_B,
        key_B=jax.vmap(jax.random.fold_in, (None, 0))(key, row_B),
        n_new=jnp.int32(0),
    )
    logits_BV = model.apply({"params": params}, h_BD, method="unembed")
    state, picked = _append(state, logits_BV, sampling, stop_ids, n_top)
    state = over_devices(model, state)
    return state, jax.tree.map(lambda array: array[:, None], picked)


@functools.partial(jax.jit, static_argnames=("model", "n_top", "fixed", "capture"), donate_argnames=("state",))
def decode(
    model: GPT2,
    params: Params,
    changes: Changes,
    past: KVCache,
    state: State,
    done_B: jax.Array,
    sampling: Sampling,
    stop_ids: jax.Array,
    n_steps: jax.Array,
    n_top: int | None,
    fixed: bool = False,
    end_B: jax.Array | None = None,
    capture: tuple[str, ...] = (),
) -> tuple[State, Picked]:
    """Take up to `n_steps` decode steps, fewer if all rows end before. `recent` must have room for them.

    `past` is only read. So the loop does not update an array of its size, which XLA would copy.
    With `fixed`, the loop always has RECENT turns, and turns after the last step leave the state as it is. Then
    `recent` must be empty: such a turn writes into its first free slot, and masks it.
    `end_B` and `capture` are as in `prefill`.
    """
    state = dataclasses.replace(state, done_B=state.done_B | done_B)

    def goes_on(i: jax.Array, state: State) -> jax.Array:
        return (i < n_steps) & ~state.done_B.all()

    def step(carry: tuple[jax.Array, State, Picked]) -> tuple[jax.Array, State, Picked]:
        i, state, all_picked = carry
        on = goes_on(i, state) if fixed else None
        mask_B1 = None if on is None else jnp.broadcast_to(on, (len(done_B), 1))
        cache = dataclasses.replace(state.recent, past=past)
        how = {"taps": changes.by_name(model.config, end_B)}
        h_B1D, cache, captured = _hidden(model, params, state.token_B[:, None], mask_B1, cache, capture, how)
        logits_BV = model.apply({"params": params}, h_B1D, method="unembed")[:, -1]
        recent = dataclasses.replace(cache, past=None)
        if on is not None:
            recent = dataclasses.replace(recent, length=jnp.where(on, recent.length, state.recent.length))
        state = dataclasses.replace(state, recent=recent)
        state, picked = _append(state, logits_BV, sampling, stop_ids, n_top, on)
        picked = dataclasses.replace(picked, captured=jax.tree.map(lambda array_B1: array_B1[:, 0], captured))
        state = over_devices(model, state)
        write = functools.partial(lax.dynamic_update_index_in_dim, index=i, axis=1)
        return i + 1, state, jax.tree.map(write, all_picked, picked)

    nothing = dataclasses.replace(
        _nothing_picked(len(done_B), n_top), captured=nothing_captured(model.config, (len(done_B), RECENT), capture)
    )
    carry = (jnp.int32(0), state, nothing)
    if fixed:
        return lax.fori_loop(0, RECENT, lambda _, carry: step(carry), carry)[1:]
    return lax.while_loop(lambda carry: goes_on(*carry[:2]), step, carry)[1:]


def _hidden(
    model: GPT2,
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None,
    cache: KVCache,
    capture: tuple[str, ...],
    how: dict[str, Any],
) -> tuple[jax.Array, KVCache, dict[str, jax.Array]]:
    """Return the hidden states [B, T, D], the new cache and captured activations."""
    args = ({"params": params}, tokens_BT, mask_BT, cache)
    if capture:
        return model.apply(*args, **how, capture=capture, method="run")
    return *model.apply(*args, **how, method="hidden"), {}


def nothing_captured(config: GPT2Config, room: tuple[int, int], capture: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return zeros for captured activations: `room` is the number of rows and of steps."""
    return {name: np.zeros((*room, *shape(config, name, 1, 1)[2:]), dtype_of(config, name)) for name in capture}


@functools.partial(jax.jit, **LONG_CACHE["merge_recent"])
def merge_recent(past: KVCache, recent: KVCache) -> tuple[KVCache, KVCache]:
    """Move the recent part's tokens into the long part."""
    nothing = {"mask_BS": jnp.zeros_like(recent.mask_BS), "length": jnp.zeros_like(recent.length)}
    recent_after = dataclasses.replace(recent, **nothing)
    return merge(past, recent), recent_after


def over_devices(model: GPT2, tree: Any) -> Any:
    """Return a cache or a State, divided over the model's mesh: rows over `data`, and heads over `model`."""
    mesh = getattr(model, "mesh", None)
    return jax.tree.map(lambda leaf: divided(leaf, mesh, parts=1 if leaf.ndim == 4 else None), tree)


def cache_formats(model: GPT2, params: Params, n_rows: int) -> Formats | None:
    """Return the formats of a long cache; None means that all are as XLA prefers.

    None is the answer for several devices without a mesh, too: how XLA divides the cache over them is not known here.
    """
    mesh, at = getattr(model, "mesh", None), jax.tree.leaves(params)[0].sharding
    layout = KEY_LAYOUTS.get(next(iter(at.device_set)).platform)
    if mesh is not None:
        kv, mask = array_sharding(mesh, (n_rows, _n_heads(model), 1, 1), parts=1), array_sharding(mesh, (n_rows, 1))
        keys = kv if layout is None else Format(layout, kv)
        return Formats(keys, kv, mask, NamedSharding(mesh, PartitionSpec()))
    if layout is None or len(at.device_set) > 1:
        return None
    return Formats(Format(layout, SingleDeviceSharding(*at.device_set)))


@functools.lru_cache
def in_format(program: Any, formats: Formats | None) -> Any:
    """Return one of the programs of LONG_CACHE, whose long cache gets these formats.

    Programs that only read it need no change.
    """
    if formats is None:
        return program
    others = None
    if program is merge_recent and formats.values is not None:  # an empty recent part
        others = KVCache(*formats._replace(keys=formats.values))
    return jax.jit(program.__wrapped__, out_shardings=(KVCache(*formats), others), **LONG_CACHE[program.__name__])


def _empty_cache(model: GPT2, n_rows: int, n_slots: int) -> KVCache:
    return over_devices(model, empty_cache(model.config, n_rows, n_slots, _n_heads(model)))


def _n_heads(model: GPT2) -> int:
    return getattr(model, "n_heads", model.config.n_head)


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
        seen_BV=jax.vmap(lambda seen_V, seen: seen_V.at[seen].set(True, mode="drop"))(state.seen_BV, seen_B),
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
