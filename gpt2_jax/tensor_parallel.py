"""Tensor parallelism: heads of attention and neurons of the MLP divided over the `model` axis of a mesh.

As in Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053), every device holds the whole residual stream, and computes
its own heads and neurons. So a layer needs two collectives, the sums over devices after the two c_proj. XLA inserts
them: this module says how arrays are divided.

In the checkpoint, the columns of c_attn are q, k and v. A device that holds a part of them in this order holds no whole
head. So `by_heads` orders them by heads, before the loop over tokens or layers. If the devices cannot share the heads
equally, as with the 25 of 1558M, it adds heads of zeros. They change no result: their rows in c_proj are zero.

Shape letters: D n_embd, N heads (with those of zeros), H head width, B batch, V vocab.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from gpt2_jax.config import GPT2Config
from gpt2_jax.explicit_axes import explicit_mesh_of
from gpt2_jax.params import Params, flatten, unflatten
from gpt2_jax.sharding import MODEL, RULES, array_sharding, axis_size

RULES_BY_HEADS = ((r"c_attn/w$", PartitionSpec(None, MODEL)), (r"c_attn/b$", PartitionSpec(MODEL)), *RULES)
"""How the params that `by_heads` returns are divided."""


def n_heads(config: GPT2Config, mesh: Mesh | None) -> int:
    """Return the number of heads with those of zeros: a multiple of the devices along `model`."""
    return rounded_up(config.n_head, axis_size(mesh))


def divided(x: jax.Array, mesh: Mesh | None, rows: int | None = 0, parts: int | None = None) -> jax.Array:
    """Return x, divided as `array_sharding` says. Without a mesh of several devices it stays as it is."""
    if mesh is None or mesh.size == 1:
        return x
    return lax.with_sharding_constraint(x, array_sharding(mesh, x.shape, rows, parts))


def by_heads(config: GPT2Config, params: Params, mesh: Mesh) -> Params:
    """Return params for `GPT2(config, mesh=mesh, by_heads=True)`, under jit.

    The columns of c_attn are ordered by heads, and q, k and v of each head are next to each other. Heads of zeros are
    added, and zero rows in the c_proj of attention. The other params stay as they are.

    Args:
      config: the model's config.
      params: the model's params. They may be traced, and this is differentiable.
      mesh: a mesh from `make_mesh`.

    Raises:
      ValueError: params are on Explicit axes.
    """
    if not explicit_mesh_of(params).empty:
        raise ValueError(
            "by_heads takes params on Auto mesh axes, as gpt2_jax.sharding.make_mesh makes them, not Explicit"
        )
    flat = flatten(params)
    for name in flat:
        if change := _change(name, config, mesh):
            flat[name] = change(flat[name])
    return unflatten(flat)


def _change(name: str, config: GPT2Config, mesh: Mesh) -> Callable[[jax.Array], jax.Array] | None:
    """Return the function that `by_heads` applies to a parameter; None if it applies none."""
    if "/attn/c_attn/" in name:
        return functools.partial(_columns_by_heads, config=config, mesh=mesh)
    if name.endswith("/attn/c_proj/w") and n_heads(config, mesh) != config.n_head:
        return functools.partial(_with_zero_rows, config=config, mesh=mesh)
    return None


def _columns_by_heads(array: jax.Array, config: GPT2Config, mesh: Mesh) -> jax.Array:
    """Return c_attn/w as [D, N * 3 * H] from [D, 3 * D], or c_attn/b likewise."""
    split = array.reshape(*array.shape[:-1], 3, config.n_head, config.head_dim)
    split = jnp.moveaxis(split, -3, -2)
    n_zeros = n_heads(config, mesh) - config.n_head
    split = jnp.pad(split, [(0, 0)] * (split.ndim - 3) + [(0, n_zeros), (0, 0), (0, 0)])
    # Divided as the checkpoint's columns are not: this is one exchange between devices for each array.
    return divided(split.reshape(*array.shape[:-1], -1), mesh, None, array.ndim - 1)


def _with_zero_rows(w_DD: jax.Array, config: GPT2Config, mesh: Mesh) -> jax.Array:
    """Return the c_proj/w of attention as [K, D] with K = N * H."""
    n_zeros = (n_heads(config, mesh) - config.n_head) * config.head_dim
    by_columns = functools.partial(divided, mesh=mesh, rows=None, parts=1)  # no device shifts rows to the next one
    w_KD = by_columns(jnp.pad(by_columns(w_DD), [(0, n_zeros), (0, 0)]))
    return divided(w_KD, mesh, None, 0)


def rounded_up(n: int, factor: int) -> int:
    """Return the smallest multiple of `factor` that is not less than n."""
    return -(-n // factor) * factor
