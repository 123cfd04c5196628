"""Masked attention over keys and values in the cache's layouts.

Shape letters: B batch, T query, S cache slot, N heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

# What the original writes over a masked score. Finite, so that a query with nothing to see has no NaN.
MASKED_SCORE = -1e10
SMALLEST_BLOCK = 128  # queries that are worth a block of their own


def attention(
    q_BTNH: jax.Array,
    k_BNHS: jax.Array,
    v_BNSH: jax.Array,
    mask_BTS: jax.Array,
    dropout: Callable[[jax.Array], jax.Array] = lambda weights_BNTS: weights_BNTS,
    past: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Scaled dot-product attention; scores and softmax in float32 at least, whatever the inputs' dtype.

    Args:
      q_BTNH: queries.
      k_BNHS: keys. This order and the values' let a new token read the cache as two plain matrix-vector products: on
        two CPU cores a layer of 12 heads of 64 over 1,024 slots takes 0.3 ms, against 2.7 ms with both as [B, S, N, H].
      v_BNSH: values.
      mask_BTS: bool, True where query t may see slot s; a leading 1 broadcasts over the batch.
      dropout: applied to the attention weights [B, N, T, S].
      past: k_BNHS, v_BNSH and mask_BTS of more slots, which stand before the others in one softmax over both.

    Returns:
      z_BTNH in the dtype of the queries. A query that may see nothing gets the mean of all values: finite, and without
      meaning.

    """
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    parts = [(k_BNHS, v_BNSH, mask_BTS)] if past is None else [past, (k_BNHS, v_BNSH, mask_BTS)]

    def scores(k_BNHS: jax.Array, mask_BTS: jax.Array) -> jax.Array:
        scores_BNTS = jnp.einsum("BTNH,BNHS->BNTS", q_BTNH, k_BNHS, preferred_element_type=wide)
        scores_BNTS = scores_BNTS / jnp.sqrt(jnp.asarray(q_BTNH.shape[-1], wide))
        return jnp.where(mask_BTS[:, None], scores_BNTS, MASKED_SCORE)

    scores_BNTS = jnp.concatenate([scores(k_BNHS, mask_BTS) for k_BNHS, _, mask_BTS in parts], axis=-1)
    weights_BNTS = dropout(jax.nn.softmax(scores_BNTS, axis=-1)).astype(q_BTNH.dtype)
    weights = jnp.split(weights_BNTS, [past[0].shape[-1]], axis=-1) if past is not None else [weights_BNTS]
    z_BTNH = sum(
        jnp.einsum("BNTS,BNSH->BTNH", weights_BNTS, v_BNSH, preferred_element_type=wide)
        for weights_BNTS, (_, v_BNSH, _) in zip(weights, parts, strict=True)
    )
    return z_BTNH.astype(q_BTNH.dtype)


def causal_attention(
    q_BTNH: jax.Array,
    k_BNHS: jax.Array,
    v_BNSH: jax.Array,
    mask_BTS: jax.Array,
    dropout: Callable[[jax.Array], jax.Array] = lambda weights_BNTS: weights_BNTS,
) -> jax.Array:
    """Attention where query t sees no slot beyond its own, t (S = T), without computing most of what is masked.

    The queries are taken in up to four blocks, each over the slots up to its end. On two CPU cores a layer of 12 heads
    of 64 over 1,024 tokens takes 31 ms, against 66 ms in one block.
    """
    n_queries = q_BTNH.shape[1]
    size = max(SMALLEST_BLOCK, -(-n_queries // 4))
    blocks = [
        attention(
            q_BTNH[:, start : start + size],
            k_BNHS[..., : start + size],
            v_BNSH[..., : start + size, :],
            mask_BTS[:, start : start + size, : start + size],
            dropout,
        )
        for start in range(0, max(n_queries, 1), size)
    ]
    return jnp.concatenate(blocks, axis=1)
