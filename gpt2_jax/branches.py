"""The activations of `gpt2_jax.activations.BRANCHES`: what each head reads and writes, computed only on request.

A change of one is added to what the model computes anyway. So without a change, no bit changes.

Shape letters: B batch, T query, D n_embd, N heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from gpt2_jax.activations import Taps

QKV_BRANCHES = ("attn/in", "attn/q_in", "attn/k_in", "attn/v_in")
NO_CHANGES: Mapping[str, jax.Array] = MappingProxyType({})


def qkv_changes(
    block: Any, taps: Taps, x_BTD: jax.Array, normalize: Callable[[jax.Array], jax.Array], w_3DNH: jax.Array
) -> dict[str, jax.Array]:
    """Return what changed inputs of heads change in their queries, keys and values: {"q": [B, T, N, H], ...}.

    Args:
      block: the module that has the branches.
      taps: the taps of the pass.
      x_BTD: the residual stream before the block.
      normalize: the block's ln_1, without taps.
      w_3DNH: the weights of queries, keys and values.
    """
    n_rows, n_tokens, width = x_BTD.shape
    x_BTND = jnp.broadcast_to(x_BTD[:, :, None], (n_rows, n_tokens, w_3DNH.shape[2], width))
    in_BTND = taps(block, "attn/in", x_BTND)
    changes = {}
    for name, w_DNH in zip("qkv", w_3DNH, strict=True):
        changed_BTND = taps(block, f"attn/{name}_in", in_BTND)
        if taps.change(block, "attn/in", f"attn/{name}_in"):
            read_BTNH, usual_BTNH = (
                jnp.einsum("BTND,DNH->BTNH", normalize(array_BTND), w_DNH) for array_BTND in (changed_BTND, x_BTND)
            )
            changes[name] = _exactly_0(read_BTNH - usual_BTNH, where=(changed_BTND == x_BTND).all(-1, keepdims=True))
    return changes


def result_change(block: Any, taps: Taps, z_BTNH: jax.Array, w_NHD: jax.Array, out_BTD: jax.Array) -> jax.Array:
    """Return attention's output with what taps change in what each head writes, attn/result.

    Args:
      block: the module Attention.
      taps: the taps of the pass.
      z_BTNH: each head's weighted sum of values.
      w_NHD: the weights of c_proj by heads.
      out_BTD: the output without a change.
    """
    result_BTND = jnp.einsum("BTNH,NHD->BTND", z_BTNH, w_NHD)
    changed_BTND = taps(block, "result", result_BTND)
    return out_BTD + (changed_BTND - result_BTND).sum(2) if taps.change(block, "result") else out_BTD


def _exactly_0(array: jax.Array, where: jax.Array) -> jax.Array:
    """Return the array with 0 at `where`. Two products of equal numbers may round differently. The derivative stays."""
    return array - jax.lax.stop_gradient(jnp.where(where, array, 0))
