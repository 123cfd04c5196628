"""The KV cache: keys and values of the tokens so far. It is a plain pytree that functions take and return.

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
from gpt2_jax.jax_defaults import under_jax_defaults


@struct.dataclass
class KVCache:
    """One K and one V array per layer. (If all layers were one array, XLA would copy it at every step.)

    All rows write the same slots, so one step writes one slice. `mask_BS` is False for padding.

    XLA copies every array that a loop updates, here several times per step. So a decoding loop updates a cache of a few
    slots, and only reads the long rest in `past`. When the few slots are full, `merge` moves them into `past`.

    Attributes:
      k_BNHS: keys, one array per layer, in `compute_dtype`.
      v_BNSH: values, one array per layer, in `compute_dtype`.
      mask_BS: bool, True where a slot holds a real token.
      length: int32 scalar, number of slots written so far.
      past: the cache of earlier tokens, which is only read; None if this cache holds all tokens.
    """

    k_BNHS: tuple[jax.Array, ...]
    v_BNSH: tuple[jax.Array, ...]
    mask_BS: jax.Array
    length: jax.Array
    past: KVCache | None = None

    @property
    def n_slots(self) -> int:
        """Number of slots, written or not, excluding those of `past`."""
        return self.mask_BS.shape[1]

    @property
    def n_tokens_B(self) -> jax.Array:
        """Number of real tokens of each row, including those of `past`."""
        n_tokens_B = self.mask_BS.sum(-1, dtype=jnp.int32)
        return n_tokens_B if self.past is None else n_tokens_B + self.past.n_tokens_B


@under_jax_defaults
def init_cache(config: GPT2Config, batch_size: int, length: int) -> KVCache:
    """Return an empty cache of `length` slots for `batch_size` rows: `config.cache_bytes(batch_size, length)` bytes.

    `length` counts padding too, so it may exceed n_ctx if rows are padded.

    Raises:
      ValueError: batch_size or length is not a positive whole number.
    """
    batch_size, length = whole_number("batch_size", batch_size, 1), whole_number("length", length, 1)
    return empty_cache(config, batch_size, length, config.n_head)


def empty_cache(config: GPT2Config, batch_size: int, length: int, n_heads: int) -> KVCache:
    """Return what `init_cache` returns, with another number of heads: see `gpt2_jax.tensor_parallel`."""
    shape = (batch_size, n_heads, config.head_dim, length)
    return KVCache(
        k_BNHS=tuple(jnp.zeros(shape, config.compute_dtype) for _ in range(config.n_layer)),
        v_BNSH=tuple(jnp.zeros((*shape[:2], *shape[:1:-1]), config.compute_dtype) for _ in range(config.n_layer)),
        mask_BS=jnp.zeros((batch_size, length), bool),
        length=jnp.zeros((), jnp.int32),
    )


def check_cache(cache: KVCache, config: GPT2Config, n_rows: int, n_tokens: int, n_heads: int) -> None:
    """Check that a cache fits this config, `n_rows` rows and `n_heads` heads, and has at least `n_tokens` slots.

    Raises:
      ValueError: it is not a KVCache, has fewer slots than tokens, or fits another model, number of rows or dtype.
    """
    if not isinstance(cache, KVCache):
        raise ValueError(f"cache must be a KVCache, as init_cache makes it, not a {type(cache).__name__}")
    if n_tokens > cache.n_slots:
        raise ValueError(f"{n_tokens} tokens do not fit a cache of {cache.n_slots} slots")
    part: KVCache | None = cache
    while part is not None:
        needed = jax.eval_shape(functools.partial(empty_cache, config, n_rows, part.n_slots, n_heads))
        found, needed = (
            [f"{leaf.dtype}{leaf.shape}" for leaf in jax.tree.leaves(tree)]
            for tree in (dataclasses.replace(part, past=None), needed)
        )
        if found != needed:
            held = ", ".join(found) or "nothing"
            raise ValueError(f"the cache does not fit this model and {n_rows} rows of tokens: it holds {held}")
        part = part.past


def insert(cache: KVCache, other: KVCache, row_G: jax.Array) -> KVCache:
    """Return `cache` with the rows `row_G` replaced by those of `other`, from slot 0; `other` must not be longer."""
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
    """Return `past` with the tokens of `recent` appended to each row. The tokens of a row must be in its first slots.

    After them, `past` must have at least as many free slots as `recent` has slots, written or not.
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
    """Return `array` with `new` written along `axis` from `start` on. XLA clamps `start`, so callers must check it."""
    return lax.dynamic_update_slice_in_dim(array, new.astype(array.dtype), start, axis)
