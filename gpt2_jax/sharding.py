"""The placement of parameters: on one device, or divided over several."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gpt2_jax import processes
from gpt2_jax.params import Params, by_rules

DATA, MODEL = "data", "model"
ALL = (MODEL, DATA)
RULES = (
    # Along n_embd: 50,257 tokens are not divisible by any usual number of devices.
    (r"(^|/)(wte|wpe|lm_head)$", PartitionSpec(None, ALL)),
    # As in Megatron: c_fc is divided by its outputs, c_proj by its inputs.
    (r"c_fc/w$", PartitionSpec(DATA, MODEL)),
    (r"c_fc/b$", PartitionSpec(ALL)),
    (r"c_proj/w$", PartitionSpec(MODEL, DATA)),
    # By its inputs, since a part of its outputs, q, k and v, would hold no whole head (gpt2_jax.tensor_parallel).
    (r"c_attn/w$", PartitionSpec(ALL)),
    (".*", PartitionSpec(DATA)),  # vectors that every device along `model` needs in full
)
"""How each parameter is divided over a mesh of `data` and `model` devices."""


def make_mesh(data: int = -1, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh of the first data x model devices in JAX's list. -1 means as many as the other number allows.

    With several processes, each gives the mesh the same number of its devices, the first of its own. `data` goes across
    processes and `model` stays within one, where communication is fast. If `model` is larger than this number, it must
    be a multiple of it, and goes across whole processes.

    A mesh of all TPUs has the order of `jax.experimental.mesh_utils`, which follows the torus that connects them, also
    across processes. If the TPUs are several slices, `data` goes across slices, and `model` stays within one.

    Args:
      data: devices that divide the rows of a batch.
      model: devices that divide heads, neurons and weights.
      devices: the devices to choose from; None means all of all processes.

    Raises:
      ValueError: there are too few devices, or -1 is given and the other number does not divide their number. Or the
        mesh cannot be divided over the processes, or over slices of TPUs.
    """
    chosen = devices is not None
    devices = sorted(jax.devices(), key=lambda device: device.process_index) if devices is None else devices
    if -1 in (data, model):
        other = max(data, model)
        if len(devices) % other:
            raise ValueError(f"{len(devices)} devices cannot be divided by {other}: set both sizes of the mesh")
        data, model = (len(devices) // other if n == -1 else n for n in (data, model))
    if data * model > len(devices):
        raise ValueError(
            f"a mesh of data={data} times model={model} needs {data * model} devices, but there are {len(devices)}"
        )
    if not chosen and devices[0].platform == "tpu" and data * model == len(devices):
        return Mesh(_on_torus(devices, data, model), (DATA, MODEL))
    if not chosen and processes.count() > 1:
        devices = _of_each_process(devices, data, model)
    return Mesh(np.array(devices[: data * model]).reshape(data, model), (DATA, MODEL))


def _on_torus(devices: Sequence[Any], data: int, model: int) -> np.ndarray:
    """Return all TPUs as an array [data, model]. Slices come one after the other.

    Raises:
      ValueError: `model` would go across slices.
    """
    from jax.experimental import mesh_utils

    n_slices = len({getattr(device, "slice_index", None) for device in devices})
    if n_slices == 1:
        return mesh_utils.create_device_mesh((data, model), devices, allow_split_physical_axes=True)
    if data % n_slices:
        raise ValueError(
            f"a mesh of data={data} times model={model} cannot be divided over {n_slices} slices of TPUs, since model "
            f"stays within a slice: set data to a multiple of {n_slices}"
        )
    own, across = (data // n_slices, model), (n_slices, 1)
    return mesh_utils.create_hybrid_device_mesh(own, across, devices, allow_split_physical_axes=True)


def _of_each_process(devices: Sequence[Any], data: int, model: int) -> list[Any]:
    """Return the devices of a mesh, the same number from each process.

    Raises:
      ValueError: the processes cannot share the mesh.
    """
    n, mesh = processes.count(), f"a mesh of data={data} times model={model}"
    share, rest = divmod(data * model, n)
    if rest:
        raise ValueError(f"{mesh} cannot be divided equally over {n} processes: set its size to a multiple of {n}")
    if share % model and model % share:
        raise ValueError(
            f"{mesh} has {share} devices in each of {n} processes, which model={model} does not fit: set model to a "
            "number that divides them, or to a multiple of them"
        )
    own = [[device for device in devices if device.process_index == index] for index in range(n)]
    if (fewest := min(map(len, own))) < share:
        raise ValueError(f"{mesh} needs {share} devices in each of {n} processes, but one of them has {fewest}")
    return [device for some in own for device in some[:share]]


def param_shardings(
    shapes: Mapping[str, Any],
    mesh: Mesh,
    gathered: Iterable[str] = (),
    rules: Sequence[tuple[str, PartitionSpec]] = RULES,
) -> dict[str, NamedSharding]:
    """Return the sharding of each parameter. Mesh axes that do not divide a side are dropped, last first.

    Args:
      shapes: {name: object with a shape}.
      mesh: a mesh from `make_mesh`.
      gathered: mesh axes over which nothing is divided.
      rules: (regular expression, PartitionSpec); the first rule that matches a name counts.
    """
    specs = by_rules(rules, shapes)
    return {name: _fitting(leaf.shape, specs[name], mesh, tuple(gathered)) for name, leaf in shapes.items()}


def _fitting(shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh, gathered: tuple[str, ...]) -> NamedSharding:
    sides = []
    for n, axes in zip(shape, (*spec, *[None] * len(shape)), strict=False):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        axes = [axis for axis in axes if axis not in gathered]
        while n % math.prod(mesh.shape[axis] for axis in axes):
            axes = axes[:-1]
        sides.append(tuple(axes) or None)
    return NamedSharding(mesh, PartitionSpec(*sides))


def axis_size(mesh: Mesh | None, axis: str = MODEL) -> int:
    """Return the number of devices along an axis of a mesh: 1 if there is no mesh or no such axis."""
    return 1 if mesh is None else mesh.shape.get(axis, 1)


def array_sharding(mesh: Mesh, shape: tuple[int, ...], rows: int | None = 0, parts: int | None = None) -> NamedSharding:
    """Return the sharding of an array whose axis `rows` is divided over `data`, and its axis `parts` over `model`.

    An axis whose size the devices cannot share equally is not divided.
    """
    spec: list[str | None] = [None] * len(shape)
    for at, axis in ((rows, DATA), (parts, MODEL)):
        if at is not None and at < len(shape) and axis_size(mesh, axis) > 1 and shape[at] % axis_size(mesh, axis) == 0:
            spec[at] = axis
    while spec and spec[-1] is None:  # as compiled programs name it, so that jit finds them by it at once
        spec.pop()
    return NamedSharding(with_auto_axes(mesh), PartitionSpec(*spec))


def with_auto_axes(mesh: Mesh | AbstractMesh) -> Mesh:
    """Return a mesh of the same devices with Auto axes, on which the model computes."""
    return Mesh(np.asarray(mesh.devices), mesh.axis_names)


def placed(params: Params) -> Params:
    """Return params on devices, so that calling programs with them transfers nothing. NumPy arrays are copied once.

    Sharded arrays keep their sharding, but Explicit mesh axes become Auto. (`jax.make_mesh` makes Explicit axes: every
    gather and product would have to name the sharding of its output.)

    Raises:
      ValueError: the params are tracers.
    """

    def place(leaf: jax.Array | np.ndarray) -> jax.Array:
        if isinstance(leaf, Tracer):
            raise ValueError("this function runs its own compiled programs: call it outside of jit, vmap and grad")
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
            return leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf)
        mesh = with_auto_axes(sharding.mesh)
        return jax.device_put(leaf, NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind))

    return jax.tree.map(place, params)


def platform(params: Params) -> str:
    """Return the kind of device that `placed` params are on: "cpu", "gpu" or "tpu"."""
    return next(iter(jax.tree.leaves(params)[0].devices())).platform
