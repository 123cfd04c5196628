"""The placement of parameters: on one device, or divided over several."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gpt2_jax.params import Params, by_rules

F = TypeVar("F", bound=Callable[..., Any])
DATA, MODEL = "data", "model"
ALL = (MODEL, DATA)
RULES = (
    # Along n_embd: 50,257 tokens are not divisible by any usual number of devices.
    (r"(^|/)(wte|wpe|lm_head)$", PartitionSpec(None, ALL)),
    # As in Megatron: c_attn and c_fc are divided by their outputs, c_proj by its inputs.
    (r"(c_attn|c_fc)/w$", PartitionSpec(DATA, MODEL)),
    (r"c_proj/w$", PartitionSpec(MODEL, DATA)),
    (".*", PartitionSpec(ALL)),
)
"""How each parameter is divided over a mesh of `data` and `model` devices."""
NO_MESH = AbstractMesh((), ())


def make_mesh(data: int = -1, model: int = 1) -> Mesh:
    """Return a mesh of the first data x model devices in JAX's list. -1 means as many as the other number allows.

    Raises:
      ValueError: there are too few devices, or -1 is given and the other number does not divide their number.
    """
    devices = jax.devices()
    if -1 in (data, model):
        other = max(data, model)
        if len(devices) % other:
            raise ValueError(f"{len(devices)} devices cannot be divided by {other}: set both sizes of the mesh")
        data, model = (len(devices) // other if n == -1 else n for n in (data, model))
    if data * model > len(devices):
        raise ValueError(
            f"a mesh of data={data} times model={model} needs {data * model} devices, but there are {len(devices)}"
        )
    return Mesh(np.array(devices[: data * model]).reshape(data, model), (DATA, MODEL))


def param_shardings(shapes: Mapping[str, Any], mesh: Mesh, gathered: Iterable[str] = ()) -> dict[str, NamedSharding]:
    """Return the sharding of each parameter by RULES. Mesh axes that do not divide a side are dropped, last first.

    Args:
      shapes: {name: object with a shape}.
      mesh: a mesh from `make_mesh`.
      gathered: mesh axes over which nothing is divided.
    """
    specs = by_rules(RULES, shapes)
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
        mesh = Mesh(np.asarray(sharding.mesh.devices), sharding.mesh.axis_names)
        return jax.device_put(leaf, NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind))

    return jax.tree.map(place, params)


def platform(params: Params) -> str:
    """Return the kind of device that `placed` params are on: "cpu", "gpu" or "tpu"."""
    return next(iter(jax.tree.leaves(params)[0].devices())).platform


# ---- Explicit axes in a module's methods


def on_auto_axes(method: F) -> F:
    """Return a method of a Flax module that computes on Auto axes if its arrays, or the mesh in use, have Explicit ones.

    On Explicit axes, each gather and product would have to name the sharding of its result. The method takes the module
    and an array, and may take `cache` and `taps`. It returns an array, or an array and the new cache. These are on the
    Explicit axes again: the first as the given array along all axes but its last, the cache as the given cache, or else
    by rows. The functions in `taps` get values on the Explicit axes, divided by rows, and may return such values.
    """
    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        used = jax.sharding.get_abstract_mesh()
        mesh = _explicit_mesh_of((module.variables, args, kwargs)) if used.empty else used
        if AxisType.Explicit not in mesh.axis_types or module.is_initializing():
            return method(module, *args, **kwargs)
        bound = signature.bind(module, *args, **kwargs)
        given = list(bound.arguments.values())[1]
        cache, taps = (bound.arguments.get(name) for name in ("cache", "taps"))
        sides = _spec_of(given) or ()

        def explicit(array: jax.Array, spec: Iterable[Any]) -> jax.Array:
            return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec(*spec)))

        def as_given(new: jax.Array, old: Any) -> jax.Array:
            spec = _spec_of(old)
            return explicit(new, sides[: min(new.ndim, 1)] if spec is None else spec)

        def outside(tap: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
            def call_tap(*values: jax.Array) -> jax.Array:
                values = tuple(explicit(value, sides[:1]) for value in values)
                with jax.sharding.use_abstract_mesh(used):
                    value = tap(*values)
                return automatic(value)

            return call_tap

        bound.arguments.update({name: jax.tree.map(automatic, value) for name, value in bound.arguments.items()})
        if taps:
            bound.arguments["taps"] = {name: outside(tap) for name, tap in taps.items()}
        with jax.sharding.use_abstract_mesh(_automatic(mesh)):
            found = method(*bound.args, **bound.kwargs)
        if not isinstance(found, tuple):
            return explicit(found, sides[: found.ndim - 1])
        array, new = found
        return explicit(array, sides[: array.ndim - 1]), jax.tree.map(as_given, new, cache)

    return cast(F, call)


def next_key(module: Any, name: str) -> jax.Array:
    """Return `module.make_rng(name)` with its Explicit axes as Auto ones, in a method that runs on Auto axes."""
    mesh = _explicit_mesh_of(module.scope.rngs)
    if mesh.empty:
        return module.make_rng(name)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # Flax computes the key from one on these axes
        key = module.make_rng(name)
    return automatic(key)


def automatic(array: Any) -> Any:
    """Return an array whose Explicit axes are Auto. Anything else is returned unchanged.

    Raises:
      ValueError: the array is inside of `jax.vmap`, over an axis that is divided along Explicit axes.
    """
    if _explicit_mesh_of(array).empty:
        return array
    mesh = _automatic(jax.typeof(array).sharding.mesh)
    try:
        return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec()))
    except ValueError as error:  # an Auto axis cannot be in the type of the whole array
        raise ValueError(
            "jax.vmap over an axis that is divided along Explicit mesh axes does not work with GPT2: pass the rows as a "
            "batch, [B, T], or reshard the array first"
        ) from error


def _automatic(mesh: Mesh | AbstractMesh) -> AbstractMesh:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = {axis: AxisType.Auto for axis, kind in kinds if kind == AxisType.Explicit}
    return mesh.abstract_mesh.update_axis_types(axes)


def _explicit_mesh_of(tree: Any) -> Mesh | AbstractMesh:
    """Return the first mesh with Explicit axes that an array of a tree is on; an empty mesh if there is none.

    It has devices if the array is not traced. They are needed outside of jit, to move other arrays to them.
    """
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and AxisType.Explicit in jax.typeof(leaf).sharding.mesh.axis_types:
            return jax.typeof(leaf).sharding.mesh if isinstance(leaf, Tracer) else leaf.sharding.mesh
    return NO_MESH


def _spec_of(array: Any) -> PartitionSpec | None:
    """Return how an array's type says that it is divided; None if it is on no mesh."""
    sharding = jax.typeof(array).sharding if isinstance(array, jax.Array) else None
    return None if sharding is None or sharding.mesh.empty else sharding.spec
