"""From logits to token ids: greedy, temperature, top-k and top-p by the original's rules. Knows no model.

Shape letters: B batch, V vocab. Source: openai/gpt-2, src/sample.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

FILTERED = -1e10  # what the original writes over the logits that a filter drops


@struct.dataclass
class Sampling:
    """How to pick a token, as traced scalars: changing them compiles nothing.

    Attributes:
      temperature: float32; the logits are divided by it, and 0 means greedy.
      top_k: int32; 0 means all.
      top_p: float32 in (0, 1]; 1 means all.

    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array


def pick(logits_BV: jax.Array, key_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Pick one token a row: the most likely at temperature 0, else a draw by temperature, then top-k, then top-p.

    Args:
      logits_BV: float32.
      key_B: a key for each row; a row's draw depends on its own logits and key alone.
      sampling: the knobs.

    Returns:
      token_B int32; -1 where the logits hold a NaN. A tie of the greedy choice goes to the lowest id.

    """
    largest_B1 = logits_BV.max(axis=-1, keepdims=True)

    def greedy() -> jax.Array:
        return jnp.argmax(logits_BV, axis=-1)

    def draw() -> jax.Array:
        scaled_BV = (logits_BV - largest_B1) / sampling.temperature  # the largest is 0: no temperature overflows it
        scaled_BV = filter_logits(scaled_BV, sampling.top_k, sampling.top_p)
        return jax.vmap(jax.random.categorical)(key_B, scaled_BV)

    token_B = lax.cond(sampling.temperature == 0, greedy, draw)
    return jnp.where(jnp.isnan(largest_B1[:, 0]), -1, token_B).astype(jnp.int32)


def filter_logits(logits_BV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Drop (set to -1e10) what top-k and then top-p leave out.

    Top-k keeps the k largest logits and all ties with the k-th. Top-p sorts what top-k left and keeps the longest
    prefix whose cumulative probability is at most p, at least one token, and all ties with the last kept: the
    original's rule (most libraries also keep the token that crosses p).

    Args:
      logits_BV: float32, already divided by the temperature.
      top_k: int32 scalar, 0 for all.
      top_p: float32 scalar in (0, 1], 1 for all.

    """

    def filtered() -> jax.Array:
        n_vocab = logits_BV.shape[-1]
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        rank_of_kth = jnp.where(top_k == 0, n_vocab, jnp.minimum(top_k, n_vocab)) - 1
        kth_B1 = jnp.take(sorted_BV, rank_of_kth[None], axis=-1)
        sorted_BV = jnp.where(sorted_BV < kth_B1, FILTERED, sorted_BV)
        cumulative_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1)
        n_kept_B1 = jnp.maximum(jnp.sum(cumulative_BV <= top_p, axis=-1, keepdims=True), 1)
        nucleus_B1 = jnp.take_along_axis(sorted_BV, n_kept_B1 - 1, axis=-1)
        threshold_B1 = jnp.where(top_p < 1, nucleus_B1, kth_B1)
        return jnp.where(logits_BV < threshold_B1, FILTERED, logits_BV)

    return lax.cond((top_k == 0) & (top_p >= 1), lambda: logits_BV, filtered)
