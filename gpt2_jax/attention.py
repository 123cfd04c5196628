"""Masked attention over keys and values in the cache's layouts.

Shape letters: B batch, T query, S cache slot, N heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

# The original sets masked scores to this. It is finite, so a query whose slots are all masked gives no NaN.
MASKED_SCORE = -1e10
SMALLEST_BLOCK = 128  # queries; smaller blocks are not worth a separate computation


Change = Callable[..., jax.Array]
"""A function that takes an array and returns the array to use instead.

Those of scores and weights [B, N, T, S] also get a mask that broadcasts to them, True where a query may attend. They
return masked entries as MASKED_SCORE, and as 0.
"""


def unchanged(array: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Return the array."""
    del mask
    return array


def attention(
    q_BTNH: jax.Array,
    k_BNHS: jax.Array,
    v_BNSH: jax.Array,
    mask_BTS: jax.Array,
    dropout: Change = unchanged,
    past: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    on_scores: Change = unchanged,
    on_weights: Change = unchanged,
    divisor: int = 1,
) -> jax.Array:
    """Scaled dot-product attention. Scores and softmax are at least float32, for any input dtype.

    Args:
      q_BTNH: queries.
      k_BNHS: keys. With this axis order, and that of the values, a new token reads the cache in two plain matrix-vector
        products. On two CPU cores, a layer of 12 heads of 64 over 1,024 slots takes 0.3 ms. With both as [B, S, N, H]
        it takes 2.7 ms.
      v_BNSH: values.
      mask_BTS: bool, True where query t may attend to slot s; a leading 1 broadcasts over the batch.
      dropout: applied to the attention weights [B, N, T, S].
      past: k_BNHS, v_BNSH and mask_BTS of more slots. They come before the others, in one softmax over both.
      on_scores, on_weights: applied to the masked scores [B, N, T, S], and to their softmax before dropout.
      divisor: the scores are divided by sqrt(H), and by this.

    Returns:
      z_BTNH in the dtype of the queries. If all slots of a query are masked, it is the mean of all values: finite, but
      meaningless.
    """
    parts = [(k_BNHS, v_BNSH, mask_BTS)] if past is None else [past, (k_BNHS, v_BNSH, mask_BTS)]
    scores = [_scores(q_BTNH, k_BNHS, mask_BTS, divisor) for k_BNHS, _, mask_BTS in parts]
    scores_BNTS = jnp.concatenate(scores, axis=-1)
    if on_scores is unchanged and on_weights is unchanged:
        weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1)
    else:
        mask_B1TS = _whole_mask([mask_BTS for *_, mask_BTS in parts], q_BTNH.shape[1])
        weights_BNTS = _masked_softmax(on_scores(scores_BNTS, mask_B1TS), mask_B1TS, scores_BNTS.shape[-1])
        weights_BNTS = on_weights(weights_BNTS, mask_B1TS)
    weights_BNTS = dropout(weights_BNTS).astype(q_BTNH.dtype)
    weights = jnp.split(weights_BNTS, [past[0].shape[-1]], axis=-1) if past is not None else [weights_BNTS]
    z_BTNH = sum(_mix(weights_BNTS, v_BNSH) for weights_BNTS, (_, v_BNSH, _) in zip(weights, parts, strict=True))
    return jnp.asarray(z_BTNH).astype(q_BTNH.dtype)


def causal_attention(
    q_BTNH: jax.Array,
    k_BNHS: jax.Array,
    v_BNSH: jax.Array,
    mask_BTS: jax.Array,
    dropout: Change = unchanged,
    divisor: int = 1,
) -> jax.Array:
    """Attention where query t attends to no slot after t (S = T). Most masked scores are not computed.

    The queries are divided into up to four blocks. Each block attends to the slots up to its end. On two CPU cores, a
    layer of 12 heads of 64 over 1,024 tokens takes 31 ms; in one block it takes 66 ms.
    """
    blocks = []
    for block, end in _blocks(q_BTNH.shape[1]):
        seen = (k_BNHS[..., :end], v_BNSH[..., :end, :], mask_BTS[:, block, :end])
        blocks.append(attention(q_BTNH[:, block], *seen, dropout, divisor=divisor))
    return jnp.concatenate(blocks, axis=1)


def open_causal_attention(
    q_BTNH: jax.Array,
    k_BNHS: jax.Array,
    v_BNSH: jax.Array,
    mask_BTS: jax.Array,
    dropout: Change,
    on_scores: Change,
    on_weights: Change,
    divisor: int = 1,
) -> jax.Array:
    """Causal attention that passes all scores and weights [B, N, T, S] to `on_scores` and `on_weights`.

    For real tokens the result equals that of `causal_attention` bit for bit. For this, the sums of the softmax and of
    the values use the same blocks. A query that attends to nothing, such as padding, has weights of 0.
    """
    n_slots = k_BNHS.shape[-1]
    blocks = _blocks(q_BTNH.shape[1])

    def whole(scores_BNTS: jax.Array) -> jax.Array:
        ends = [(0, 0), (0, 0), (0, 0), (0, n_slots - scores_BNTS.shape[-1])]
        return jnp.pad(scores_BNTS, ends, constant_values=MASKED_SCORE)

    scores = [_scores(q_BTNH[:, block], k_BNHS[..., :end], mask_BTS[:, block, :end], divisor) for block, end in blocks]
    mask_B1TS = mask_BTS[:, None]
    scores_BNTS = on_scores(jnp.concatenate([whole(part) for part in scores], axis=2), mask_B1TS)
    weights = [_masked_softmax(scores_BNTS[:, :, block], mask_B1TS[:, :, block], end) for block, end in blocks]
    weights_BNTS = on_weights(jnp.concatenate(weights, axis=2), mask_B1TS)
    z = []
    for block, end in blocks:
        seen_BNTS = weights_BNTS[:, :, block, :end]  # the others are 0
        z.append(_mix(dropout(seen_BNTS).astype(q_BTNH.dtype), v_BNSH[..., :end, :]))
    return jnp.concatenate(z, axis=1).astype(q_BTNH.dtype)


def _blocks(n_queries: int) -> list[tuple[slice, int]]:
    """Return the queries of each block, and the end of the slots that they attend to."""
    size = max(SMALLEST_BLOCK, -(-n_queries // 4))
    starts = range(0, max(n_queries, 1), size)
    return [(slice(start, start + size), min(start + size, n_queries)) for start in starts]


def _scores(q_BTNH: jax.Array, k_BNHS: jax.Array, mask_BTS: jax.Array, divisor: int) -> jax.Array:
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    scores_BNTS = jnp.einsum("BTNH,BNHS->BNTS", q_BTNH, k_BNHS, preferred_element_type=wide)
    scale = jnp.sqrt(jnp.asarray(q_BTNH.shape[-1], wide))
    scores_BNTS = scores_BNTS / (scale if divisor == 1 else scale * divisor)
    return jnp.where(mask_BTS[:, None], scores_BNTS, MASKED_SCORE)


def _whole_mask(masks_BTS: list[jax.Array], n_queries: int) -> jax.Array:
    """Return the mask of all slots [B, 1, T, S], for masks of parts of them that may broadcast over T or B."""
    n_rows = max(mask_BTS.shape[0] for mask_BTS in masks_BTS)
    whole = [jnp.broadcast_to(mask_BTS, (n_rows, n_queries, mask_BTS.shape[-1])) for mask_BTS in masks_BTS]
    return jnp.concatenate(whole, axis=-1)[:, None]


def _masked_softmax(scores_BNTS: jax.Array, mask_B1TS: jax.Array, end: int) -> jax.Array:
    """Return the softmax over the slots of the mask, which are before `end`. Other weights are 0.

    All weights are 0 if the mask is empty, or all its scores are -inf.
    """
    seen_BNTS = jnp.where(mask_B1TS, scores_BNTS, -jnp.inf)[..., :end]
    # The guard is not on the maximum: XLA would then round the softmax otherwise than without a change.
    none_BNT1 = jax.lax.stop_gradient(seen_BNTS.max(-1, keepdims=True)) == -jnp.inf
    weights_BNTS = jax.nn.softmax(jnp.where(none_BNT1, 0, seen_BNTS), axis=-1)
    beyond = [(0, 0), (0, 0), (0, 0), (0, scores_BNTS.shape[-1] - end)]
    return jnp.pad(jnp.where(none_BNT1, 0, weights_BNTS), beyond)


def _mix(weights_BNTS: jax.Array, v_BNSH: jax.Array) -> jax.Array:
    wide = jnp.promote_types(v_BNSH.dtype, jnp.float32)
    return jnp.einsum("BNTS,BNSH->BTNH", weights_BNTS, v_BNSH, preferred_element_type=wide)
