"""Meshes with Explicit axes, as `jax.make_mesh` makes them: the library computes on Auto axes.

On Explicit axes, the types of arrays say how they are divided, and each gather and product would have to name the
sharding of its result. So arrays become arrays on Auto axes first, and results are put on the Explicit axes again. Axes
that are Auto or Manual stay what they are. Without Explicit axes, nothing is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey

F = TypeVar("F", bound=Callable[..., Any])
NO_MESH = AbstractMesh((), ())


def on_auto_axes(method: F) -> F:
    """Return a method of a Flax module that computes on Auto axes if its arrays, or the mesh in use, have others.

    On Explicit axes, each gather and product would have to name the sharding of its result. The method takes the module
    and an array, and may take `cache` and `taps`. It returns an array, or an array, the new cache and other arrays.
    These are on the Explicit axes again: the first as the given array along all axes but its last, the cache as the
    given cache, and the rest by rows. The functions in `taps` get values on the Explicit axes, divided by rows, and may
    return such values.
    """
    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        used = jax.sharding.get_abstract_mesh()
        mesh = explicit_mesh_of((module.variables, args, kwargs)) if used.empty else used
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
            @functools.wraps(tap, updated=())
            def call_tap(*values: jax.Array) -> jax.Array:
                values = tuple(explicit(value, sides[:1]) for value in values)
                with jax.sharding.use_abstract_mesh(used):
                    value = tap(*values)
                return automatic(value)

            return call_tap

        bound.arguments.update({name: jax.tree.map(automatic, value) for name, value in bound.arguments.items()})
        if taps:
            bound.arguments["taps"] = {name: of_tap(tap, outside) for name, tap in taps.items()}
        with jax.sharding.use_abstract_mesh(_automatic(mesh)):
            found = method(*bound.args, **bound.kwargs)
        if not isinstance(found, tuple):
            return explicit(found, sides[: found.ndim - 1])
        array, new, others = found
        by_rows = jax.tree.map(lambda other: explicit(other, sides[:1]), others)
        return explicit(array, sides[: array.ndim - 1]), jax.tree.map(as_given, new, cache), by_rows

    return cast(F, call)


def of_tap(tap: Any, outside: Callable[[Any], Any]) -> Any:
    """Return a tap for values on Auto axes.

    A function of the user's is called by `outside`. The library's own taps compute on Auto axes: their method
    `on_auto_axes` takes `outside` for the functions that they hold.
    """
    own = getattr(tap, "on_auto_axes", None)
    return outside(tap) if own is None else own(outside)


def whole_on_auto_axes(function: F) -> F:
    """Return a function that computes on Auto axes if its arrays, or the mesh in use, have Explicit ones.

    The arrays that it returns are whole on each device. But params are divided as those in the argument `params` are.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        used = jax.sharding.get_abstract_mesh()
        mesh = explicit_mesh_of((args, kwargs)) if used.empty else used
        if AxisType.Explicit not in mesh.axis_types:
            return function(*args, **kwargs)
        params, _ = jax.tree_util.tree_flatten_with_path(signature.bind(*args, **kwargs).arguments.get("params"))
        divided = {(path, np.shape(leaf)): _spec_of(leaf) for path, leaf in params}

        def explicit(path: tuple[Any, ...], array: Any) -> Any:
            if not isinstance(array, jax.Array):
                return array
            spec = divided.get((path, array.shape)) or PartitionSpec()
            return jax.sharding.reshard(array, NamedSharding(mesh, spec))

        args, kwargs = (_map(lambda _, leaf: automatic(leaf), given) for given in (args, kwargs))
        with jax.sharding.use_abstract_mesh(_automatic(mesh)):
            found = function(*args, **kwargs)
        return _map(explicit, found)

    return cast(F, call)


def _map(function: Callable[[tuple[Any, ...], Any], Any], tree: Any, path: tuple[Any, ...] = ()) -> Any:
    """Return a tree with function(path, leaf) for each leaf. JAX's own function would sort each dict by its keys."""
    if type(tree) is dict:
        return {key: _map(function, value, (*path, DictKey(key))) for key, value in tree.items()}
    if type(tree) is tuple:
        return tuple(_map(function, value, path) for value in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
        return dataclasses.replace(tree, **_map(function, fields, path))
    return jax.tree.map(functools.partial(function, path), tree)


def auto_mesh() -> contextlib.AbstractContextManager[None]:
    """Use the mesh in use with its Explicit axes as Auto ones, for code whose arrays do not leave it."""
    used = jax.sharding.get_abstract_mesh()
    explicit = AxisType.Explicit in used.axis_types
    return jax.sharding.use_abstract_mesh(_automatic(used)) if explicit else contextlib.nullcontext()


def next_key(module: Any, name: str) -> jax.Array:
    """Return `module.make_rng(name)` with its Explicit axes as Auto ones, in a method that runs on Auto axes."""
    mesh = explicit_mesh_of(module.scope.rngs)
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
    if explicit_mesh_of(array).empty:
        return array
    mesh = _automatic(jax.typeof(array).sharding.mesh)
    try:
        return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec()))
    except ValueError as error:  # an Auto axis cannot be in the type of the whole array
        raise ValueError(
            "jax.vmap over an axis that is divided along Explicit mesh axes does not work with GPT2: give the rows "
            "as one batch, [B, T], or reshard the array first"
        ) from error


def _automatic(mesh: Mesh | AbstractMesh) -> AbstractMesh:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = {axis: AxisType.Auto for axis, kind in kinds if kind == AxisType.Explicit}
    return mesh.abstract_mesh.update_axis_types(axes)


def explicit_mesh_of(tree: Any) -> Mesh | AbstractMesh:
    """Return the first mesh with Explicit axes that an array of a tree is on; an empty mesh if there is none.

    It has devices if the array is not traced. They are needed outside of jit, to move other arrays to them.
    """
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and AxisType.Explicit in jax.typeof(leaf).sharding.mesh.axis_types:
            return jax.typeof(leaf).sharding.mesh if isinstance(leaf, Tracer) else cast(Any, leaf.sharding).mesh
    return NO_MESH


def _spec_of(array: Any) -> PartitionSpec | None:
    """Return how an array's type says that it is divided; None if it is on no mesh."""
    sharding = jax.typeof(array).sharding if isinstance(array, jax.Array) else None
    return None if sharding is None or sharding.mesh.empty else sharding.spec
