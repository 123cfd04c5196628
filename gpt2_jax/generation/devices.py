"""The model and the params that generation and scoring run with: on one device, or divided over a mesh."""

from __future__ import annotations

import functools

import jax
from jax.sharding import Mesh

from gpt2_jax.config import GPT2Config
from gpt2_jax.jax_defaults import with_own_arrays
from gpt2_jax.model import GPT2
from gpt2_jax.params import Params, flatten, unflatten
from gpt2_jax.sharding import DATA, MODEL, axis_size, param_shardings, placed
from gpt2_jax.tensor_parallel import by_heads, n_heads


@with_own_arrays
def on_devices(config: GPT2Config, params: Params, edited: bool = False) -> tuple[GPT2, Params]:
    """Return the model and params to call compiled programs with.

    On a mesh from `make_mesh`, rows are divided over `data`, and heads and neurons over `model`. So params are gathered
    along `data`, and their heads are put in order once, before any loop. Params on any other mesh stay as they are.

    Args:
      config: the model's config.
      params: the model's params, on the host or on devices.
      edited: there are edits. They name the heads of the checkpoint, so no heads of zeros are added.

    Raises:
      ValueError: the params are tracers.
    """
    params = placed(params)
    mesh = _mesh(params)
    if mesh is None:
        return GPT2(config), params
    ordered = axis_size(mesh) > 1 and not (edited and n_heads(config, mesh) != config.n_head)
    flat = flatten(params)
    shardings = param_shardings(flat, mesh, gathered=(DATA,))
    params = unflatten({name: jax.device_put(leaf, shardings[name]) for name, leaf in flat.items()})
    if ordered:
        # Only what changes: a program that returned all params would copy them.
        for i in range(config.n_layer):
            params[f"h{i}"]["attn"] = _heads_in_order(config, params[f"h{i}"]["attn"], mesh)
    return GPT2(config, mesh=mesh, by_heads=ordered), params


def _mesh(params: Params) -> Mesh | None:
    """Return the mesh that all params are on, if it has several devices and the axes of `make_mesh`."""
    found = {getattr(leaf.sharding, "mesh", None) for leaf in jax.tree.leaves(params)}
    mesh = found.pop()
    if found or not isinstance(mesh, Mesh) or mesh.size == 1 or {*mesh.axis_names} != {DATA, MODEL}:
        return None
    return mesh


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _heads_in_order(config: GPT2Config, attn: Params, mesh: Mesh) -> Params:
    return by_heads(config, {"h0": {"attn": attn}}, mesh)["h0"]["attn"]
