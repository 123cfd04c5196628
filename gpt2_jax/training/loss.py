"""Cross-entropy of the next token, without holding the logits of a whole batch.

Shape letters: B batch, T position, C positions of one chunk, D n_embd, V vocab, G groups of rows, P their positions.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from gpt2_jax.products import product
from gpt2_jax.sharding import DATA, axis_size
from gpt2_jax.tensor_parallel import divided, rounded_up

CHUNK = 2**26  # maximum number of logits in memory at once: 256 MB of float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def token_loss(
    h_BTD: jax.Array,
    head_VD: jax.Array,
    target_BT: jax.Array,
    weight_BT: jax.Array,
    chunk: int = CHUNK,
    mesh: Mesh | None = None,
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
      mesh: the devices that the program runs on. Rows are divided over `data`, and the vocabulary over `model`.
    """
    return _sum(h_BTD, head_VD, target_BT, weight_BT, chunk, mesh, gradients=False)[0]


def _forward(h_BTD, head_VD, target_BT, weight_BT, chunk, mesh):
    loss, dh_BTD, dhead_VD = _sum(h_BTD, head_VD, target_BT, weight_BT, chunk, mesh, gradients=True)
    return loss, (dh_BTD, dhead_VD)


def _backward(chunk, mesh, gradients, d_loss):
    dh_BTD, dhead_VD = gradients
    return (d_loss * dh_BTD).astype(dh_BTD.dtype), (d_loss * dhead_VD).astype(dhead_VD.dtype), None, None


token_loss.defvjp(_forward, _backward)


def _sum(h_BTD, head_VD, target_BT, weight_BT, chunk, mesh, gradients):
    """Return the loss, and its gradients with respect to h and the head if requested (else None)."""
    n_rows, n_positions, _ = h_BTD.shape
    n_vocab, dtype = len(head_VD), head_VD.dtype
    n_chunks = min(n_positions, -(-n_rows * n_positions * n_vocab // chunk))
    n_together = -(-n_positions // n_chunks)
    wide = jnp.promote_types(h_BTD.dtype, jnp.float32)
    if shared := axis_size(mesh) > 1:  # the vocabulary is divided, with rows of zeros that no token has
        n_zeros = rounded_up(n_vocab, axis_size(mesh)) - n_vocab
        head_VD = divided(jnp.pad(head_VD, [(0, n_zeros), (0, 0)]), mesh, None, 0)
    cast_VD = head_VD.astype(h_BTD.dtype)
    n_groups = axis_size(mesh, DATA) if n_rows % axis_size(mesh, DATA) == 0 else 1

    def chunks(array: jax.Array) -> jax.Array:
        """[B, T, ...] -> [chunks, B, C, ...], padded at the end with zeros: positions of weight 0."""
        padding = [(0, 0), (0, n_chunks * n_together - n_positions)] + [(0, 0)] * (array.ndim - 2)
        array = jnp.pad(array, padding)
        return jnp.moveaxis(array.reshape(n_rows, n_chunks, n_together, *array.shape[2:]), 1, 0)

    def one(carry, part):
        loss, dhead = carry
        h_BCD, target_BC, weight_BC = part
        logits_BCV = product(h_BCD, cast_VD, transposed=True, dtype=wide)
        if shared:
            logits_BCV = divided(logits_BCV, mesh, parts=2)
            logits_BCV = jnp.where(jnp.arange(len(cast_VD)) < n_vocab, logits_BCV, -jnp.inf)
        top_BC1 = logits_BCV.max(-1, keepdims=True)
        exp_BCV = jnp.exp(logits_BCV - top_BC1)
        total_BC1 = exp_BCV.sum(-1, keepdims=True)
        is_target_BCV = target_BC[..., None] == jnp.arange(len(cast_VD))
        if shared:  # looking up one logit would need the logits of all devices
            known_BC = (target_BC >= 0) & (target_BC < n_vocab)
            chosen_BC = jnp.where(known_BC, jnp.sum(logits_BCV, axis=-1, where=is_target_BCV), jnp.nan)
        else:
            chosen_BC = jnp.take_along_axis(logits_BCV, target_BC[..., None], axis=-1, mode="fill")[..., 0]
        loss += jnp.sum(weight_BC * ((jnp.log(total_BC1) + top_BC1)[..., 0] - chosen_BC), where=weight_BC != 0)
        if not gradients:
            return (loss, None), None
        dlogits_BCV = (exp_BCV / total_BC1 - is_target_BCV) * weight_BC[..., None]
        dlogits_BCV = jnp.where(weight_BC[..., None] == 0, 0, dlogits_BCV).astype(h_BCD.dtype)
        dh_BCD = product(dlogits_BCV, cast_VD, dtype=wide)
        dhead += _by_groups(dlogits_BCV, h_BCD, n_groups, wide)
        return (loss, dhead), dh_BCD.astype(h_BCD.dtype)

    groups = (n_groups,) if n_groups > 1 else ()
    start = (jnp.zeros((), wide), jnp.zeros((*groups, *head_VD.shape), wide) if gradients else None)
    parts = (chunks(h_BTD), chunks(target_BT), chunks(weight_BT.astype(wide)))
    (loss, dhead), dh = lax.scan(one, start, parts)
    if dh is None or dhead is None:  # no gradients were requested
        return loss, None, None
    dh_BTD = jnp.moveaxis(dh, 0, 1).reshape(n_rows, n_chunks * n_together, -1)[:, :n_positions]
    dhead_VD = dhead.sum(0) if groups else dhead
    return loss, dh_BTD, dhead_VD[:n_vocab].astype(dtype)


def _by_groups(dlogits_BCV: jax.Array, h_BCD: jax.Array, n_groups: int, dtype: np.dtype) -> jax.Array:
    """Return the gradient with respect to the head, [V, D]; for several groups of rows, the part of each, [G, V, D].

    Devices that have different rows would otherwise add their sums after each chunk, and not once at the end.
    """
    by_head = functools.partial(product, dtype=dtype)
    if n_groups == 1:
        return by_head(dlogits_BCV.reshape(-1, dlogits_BCV.shape[-1]).T, h_BCD.reshape(-1, h_BCD.shape[-1]))
    dlogits_GPV, h_GPD = (x.reshape(n_groups, -1, x.shape[-1]) for x in (dlogits_BCV, h_BCD))
    return jax.vmap(by_head)(dlogits_GPV.swapaxes(1, 2), h_GPD)
