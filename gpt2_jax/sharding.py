"""Where parameters are."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from gpt2_jax.params import Params


def platform(params: Params) -> str:
    """Return the kind of device that the parameters are on: "cpu", "gpu" or "tpu"."""
    leaf = jax.tree.leaves(params)[0]
    return next(iter(leaf.devices())).platform if isinstance(leaf, jax.Array) else jax.default_backend()


def on_auto_axes(params: Params) -> Params:
    """Return params sharded as they are, over meshes whose axes XLA may propagate: no data moves.

    `jax.make_mesh` makes axes Explicit, with which every gather and product would have to name its output's sharding.
    """

    def leaf_on_auto_axes(leaf: jax.Array) -> jax.Array:
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
            return leaf
        mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
        return jax.device_put(leaf, NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind))

    return jax.tree.map(leaf_on_auto_axes, params)
