"""Cross-entropy of the next token, without holding the logits of a whole batch.

Shape letters: B batch, T position, C positions of one chunk, D n_embd, V vocab.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from gpt2_jax.products import product

CHUNK = 2**26  # maximum number of logits in memory at once: 256 MB of float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def token_loss(
    h_BTD: jax.Array, head_VD: jax.Array, target_BT: jax.Array, weight_BT: jax.Array, chunk: int = CHUNK
) -> jax.Array:
    """Return the sum over all positions of `weight * -log p(target)`, in nats, in float32 or wider.

    The logits `h @ head.T` are computed for a chunk of positions at a time. If a gradient is needed, it is computed
    while the logits of the chunk exist. This takes three products with the head, as with all logits at once, and no
    logits are computed twice.

    Args:
      h_BTD: the model's last hidden states; the products take inputs of this dtype.
      head_VD: the output head: the token embedding, or an untied head.
      target_BT: token ids.
      weight_BT: the weight of each target; it has no gradient.
      chunk: maximum number of logits in memory at once (a chunk has at least one position of each row).
    """
    return _sum(h_BTD, head_VD, target_BT, weight_BT, chunk, gradients=False)[0]


def _forward(h_BTD, head_VD, target_BT, weight_BT, chunk):
    loss, dh_BTD, dhead_VD = _sum(h_BTD, head_VD, target_BT, weight_BT, chunk, gradients=True)
    return loss, (dh_BTD, dhead_VD)


def _backward(chunk, gradients, d_loss):
    dh_BTD, dhead_VD = gradients
    return (d_loss * dh_BTD).astype(dh_BTD.dtype), (d_loss * dhead_VD).astype(dhead_VD.dtype), None, None


token_loss.defvjp(_forward, _backward)


def _sum(h_BTD, head_VD, target_BT, weight_BT, chunk, gradients):
    """Return the loss, and its gradients with respect to h and the head if requested (else None)."""
    n_rows, n_positions, width = h_BTD.shape
    n_chunks = min(n_positions, -(-n_rows * n_positions * head_VD.shape[0] // chunk))
    size = -(-n_positions // n_chunks)
    wide = jnp.promote_types(h_BTD.dtype, jnp.float32)
    cast_VD = head_VD.astype(h_BTD.dtype)

    def chunks(array: jax.Array) -> jax.Array:
        """[B, T, ...] -> [chunks, B, C, ...], padded at the end with zeros: positions of weight 0."""
        padding = [(0, 0), (0, n_chunks * size - n_positions)] + [(0, 0)] * (array.ndim - 2)
        array = jnp.pad(array, padding)
        return jnp.moveaxis(array.reshape(n_rows, n_chunks, size, *array.shape[2:]), 1, 0)

    def one(carry, part):
        loss, dhead_VD = carry
        h_BCD, target_BC, weight_BC = part
        logits_BCV = product(h_BCD, cast_VD, transposed=True, dtype=wide)
        top_BC1 = logits_BCV.max(-1, keepdims=True)
        exp_BCV = jnp.exp(logits_BCV - top_BC1)
        total_BC1 = exp_BCV.sum(-1, keepdims=True)
        chosen_BC = jnp.take_along_axis(logits_BCV, target_BC[..., None], axis=-1, mode="fill")[..., 0]
        loss += jnp.sum(weight_BC * ((jnp.log(total_BC1) + top_BC1)[..., 0] - chosen_BC), where=weight_BC != 0)
        if not gradients:
            return (loss, None), None
        is_target_BCV = target_BC[..., None] == jnp.arange(logits_BCV.shape[-1])
        dlogits_BCV = (exp_BCV / total_BC1 - is_target_BCV) * weight_BC[..., None]
        dlogits_BCV = jnp.where(weight_BC[..., None] == 0, 0, dlogits_BCV).astype(h_BCD.dtype)
        dh_BCD = product(dlogits_BCV, cast_VD, dtype=wide)
        dhead_VD += product(dlogits_BCV.reshape(-1, len(cast_VD)).T, h_BCD.reshape(-1, width), dtype=wide)
        return (loss, dhead_VD), dh_BCD.astype(h_BCD.dtype)

    start = (jnp.zeros((), wide), jnp.zeros(head_VD.shape, wide) if gradients else None)
    parts = (chunks(h_BTD), chunks(target_BT), chunks(weight_BT.astype(wide)))
    (loss, dhead_VD), dh = lax.scan(one, start, parts)
    if dh is None or dhead_VD is None:  # no gradients were requested
        return loss, None, None
    dh_BTD = jnp.moveaxis(dh, 0, 1).reshape(n_rows, n_chunks * size, width)[:, :n_positions]
    return loss, dh_BTD, dhead_VD.astype(head_VD.dtype)
