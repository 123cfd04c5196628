"""Dropout with cheap random bits, which do not depend on how an array is divided over devices."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpt2_jax.explicit_axes import next_key


class Dropout(nn.Module):
    """Set a fraction of the entries to 0, and scale the others up so that the mean stays the same.

    Attributes:
      rate: that fraction, in [0, 1).
      n_heads: for attention weights [B, N, T, S] with heads of zeros after the real ones: the number of real heads.
        They get the same bits as without those of zeros. None means that all entries are real.
    """

    rate: float
    n_heads: int | None = None

    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Return x with dropout, drawn with the next key of "dropout". `deterministic=True` returns x."""
        if deterministic or self.rate == 0:
            return x
        counted = None if self.n_heads is None else (len(x), self.n_heads, *x.shape[2:])
        return drop(x, self.rate, next_key(self, "dropout"), counted)


def drop(x: jax.Array, rate: float, key: jax.Array, counted: tuple[int, ...] | None = None) -> jax.Array:
    """Return x with each entry dropped independently at `rate`, in [0, 1). Only key, shape and rate decide which.

    Entries of x inside the shape `counted` get the bits that they have in an array of that shape.
    """
    kept = hash_bits(key, x.shape, counted) >= np.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(kept, x / jnp.asarray(1 - rate, x.dtype), 0)


def hash_bits(key: jax.Array, shape: tuple[int, ...], counted: tuple[int, ...] | None = None) -> jax.Array:
    """Return uint32 bits: each entry's index in an array of the shape `counted`, mixed with two words of the key.

    `counted` is `shape` if it is None.

    Threefry, JAX's default generator, is stronger than dropout needs. On two CPU cores it takes 76 ms for the attention
    weights of 16 rows, 4 heads and 256 tokens; this takes 2 ms. The last three steps are MurmurHash3's finalizer
    (A. Appleby, public domain). A similar step, which multiplies by the golden ratio, comes first.
    """
    word = jax.random.bits(key, (2,), jnp.uint32)
    number = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(counted or shape):
        number = number * np.uint32(size % 2**32) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    x = (number ^ word[0]) * np.uint32(0x9E3779B1)
    x = (x ^ (x >> 15)) + word[1]
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
