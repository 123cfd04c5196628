"""Where parameters are."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from gpt2_jax.params import Params


def placed(params: Params) -> Params:
    """Return params as programs take them at no cost, however often: on devices, NumPy arrays put there once.

    Sharded ones stay as they are, over meshes whose axes XLA may propagate. (`jax.make_mesh` makes axes Explicit, with
    which every gather and product would have to name its output's sharding.)

    Raises:
      ValueError: they are being traced.

    """

    def place(leaf: jax.Array | np.ndarray) -> jax.Array:
        if isinstance(leaf, jax.core.Tracer):
            raise ValueError("this runs compiled programs of its own: call it outside of jit, vmap and grad")
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
            return leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf)
        mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
        return jax.device_put(leaf, NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind))

    return jax.tree.map(place, params)


def platform(params: Params) -> str:
    """Return the kind of device that `placed` params are on: "cpu", "gpu" or "tpu"."""
    return next(iter(jax.tree.leaves(params)[0].devices())).platform
