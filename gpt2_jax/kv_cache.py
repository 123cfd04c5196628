"""The keys and values of the tokens seen so far: a plain pytree, an argument and a result, never module state.

Shape letters: B batch, T query, S cache slot, N heads, H head width.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from gpt2_jax.checks import whole_number
from gpt2_jax.config import GPT2Config


@struct.dataclass
class KVCache:
    """One K and one V array a layer (a stack of layers would make XLA copy the lot at every step).

    Every row writes the same slots, so that one step is one slice; what a row pads is False in `mask_BS`.

    What a loop carries and writes, XLA copies, here several times a step. So a decoding loop carries a few slots and
    leaves the long rest in `past`, which it only reads; `merge` moves the few into it once they are full.

    Attributes:
      k_BNHS: keys, one array a layer, in `compute_dtype`.
      v_BNSH: values, one array a layer, in `compute_dtype`.
      mask_BS: bool, True where a slot holds a real token.
      length: int32 scalar, slots written so far.
      past: the cache of earlier tokens, read and never written; None where this one holds all of them.
    """

    k_BNHS: tuple[jax.Array, ...]
    v_BNSH: tuple[jax.Array, ...]
    mask_BS: jax.Array
    length: jax.Array
    past: KVCache | None = None

    @property
    def n_slots(self) -> int:
        """Number of slots, written or not, without those of `past`."""
        return self.mask_BS.shape[1]

    @property
    def n_tokens_B(self) -> jax.Array:
        """Number of real tokens of each row, those of `past` included."""
        n_tokens_B = self.mask_BS.sum(-1, dtype=jnp.int32)
        return n_tokens_B if self.past is None else n_tokens_B + self.past.n_tokens_B


def init_cache(config: GPT2Config, batch_size: int, length: int) -> KVCache:
    """Return an empty cache of `length` slots for `batch_size` rows: `config.cache_bytes(batch_size, length)` bytes.

    `length` counts padding too, so it may exceed n_ctx where rows are padded.

    Raises:
      ValueError: batch_size or length is not a positive whole number.
    """
    batch_size, length = whole_number("batch_size", batch_size, 1), whole_number("length", length, 1)
    shape = (batch_size, config.n_head, config.head_dim, length)
    return KVCache(
        k_BNHS=tuple(jnp.zeros(shape, config.compute_dtype) for _ in range(config.n_layer)),
        v_BNSH=tuple(jnp.zeros((*shape[:2], *shape[:1:-1]), config.compute_dtype) for _ in range(config.n_layer)),
        mask_BS=jnp.zeros((batch_size, length), bool),
        length=jnp.zeros((), jnp.int32),
    )


def check_cache(cache: KVCache, config: GPT2Config, n_rows: int, n_tokens: int) -> None:
    """Check that `n_tokens` more tokens of `n_rows` rows can go into a cache of a model with this config.

    Raises:
      ValueError: not a KVCache, one of another model, of other rows or dtype, or with fewer slots than tokens.
    """
    if not isinstance(cache, KVCache):
        raise ValueError(f"cache must be a KVCache, as init_cache makes it, not a {type(cache).__name__}")
    if n_tokens > cache.n_slots:
        raise ValueError(f"{n_tokens} tokens do not fit a cache of {cache.n_slots} slots")
    part: KVCache | None = cache
    while part is not None:
        needed = jax.eval_shape(functools.partial(init_cache, config, n_rows, part.n_slots))
        found, needed = (
            [f"{leaf.dtype}{leaf.shape}" for leaf in jax.tree.leaves(tree)]
            for tree in (dataclasses.replace(part, past=None), needed)
        )
        if found != needed:
            held = ", ".join(found) or "nothing"
            raise ValueError(f"the cache does not fit this model and {n_rows} rows of tokens: it holds {held}")
        part = part.past


def insert(cache: KVCache, other: KVCache, row_G: jax.Array) -> KVCache:
    """Return the cache with the rows `row_G` replaced by those of another, at most as long: their slots come first."""
    n_slots = other.n_slots

    def put(array: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        index = (row_G, *[slice(None)] * (axis - 1), slice(0, n_slots))
        return array.at[index].set(new)

    return dataclasses.replace(
        cache,
        k_BNHS=tuple(put(*pair, axis=3) for pair in zip(cache.k_BNHS, other.k_BNHS, strict=True)),
        v_BNSH=tuple(put(*pair, axis=2) for pair in zip(cache.v_BNSH, other.v_BNSH, strict=True)),
        mask_BS=put(cache.mask_BS.at[row_G].set(False), other.mask_BS, axis=1),
    )


def merge(past: KVCache, recent: KVCache) -> KVCache:
    """Return `past` with the tokens of `recent` behind each row's own, which must be its first slots.

    Past the tokens there must be as many slots as `recent` has, written or not.
    """
    n_tokens_B = past.n_tokens_B

    def put(array: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        write = functools.partial(lax.dynamic_update_slice_in_dim, axis=axis - 1)
        return jax.vmap(write)(array, new, n_tokens_B)

    return dataclasses.replace(
        past,
        k_BNHS=tuple(put(*pair, axis=3) for pair in zip(past.k_BNHS, recent.k_BNHS, strict=True)),
        v_BNSH=tuple(put(*pair, axis=2) for pair in zip(past.v_BNSH, recent.v_BNSH, strict=True)),
        mask_BS=put(past.mask_BS, recent.mask_BS, axis=1),
    )


def write_slots(array: jax.Array, new: jax.Array, start: jax.Array | int, axis: int) -> jax.Array:
    """Return `array` with `new` written from slot `start` on along `axis` (clamped at the end: callers check)."""
    return lax.dynamic_update_slice_in_dim(array, new.astype(array.dtype), start, axis)
