"""Runs the library's own code under JAX's default rules, whatever switches the caller has set.

Switches such as `jax_numpy_rank_promotion="raise"` find mistakes in the caller's code. The library's code relies on the
defaults, and `jax_threefry_partitionable` would change every draw of a seed. A switch that already has its default
value is not touched, so that nothing is traced again.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import jax

from gpt2_jax.explicit_axes import auto_mesh

F = TypeVar("F", bound=Callable[..., Any])
DEFAULTS = {
    "jax_numpy_rank_promotion": ("allow", jax.numpy_rank_promotion),
    "jax_numpy_dtype_promotion": ("standard", jax.numpy_dtype_promotion),
    "jax_threefry_partitionable": (True, jax.threefry_partitionable),
}
TRANSFERS = ("host_to_device", "device_to_host", "device_to_device")


@contextlib.contextmanager
def jax_defaults(returns_nan: bool = False, own_arrays: bool = False) -> Iterator[None]:
    """Set the promotion rules, the random bits and the transfer guard to JAX's defaults, in this thread.

    Args:
      returns_nan: True also switches off `jax_debug_nans`, for results that contain NaN by design.
      own_arrays: True also makes the Explicit axes of the mesh in use Auto, for code that returns no arrays of JAX.
    """
    with contextlib.ExitStack() as stack:
        for name, (value, manager) in DEFAULTS.items():
            if getattr(jax.config, name) != value:
                stack.enter_context(manager(value))
        if any(getattr(jax.config, f"jax_transfer_guard_{way}") not in (None, "allow") for way in TRANSFERS):
            stack.enter_context(jax.transfer_guard("allow"))
        if returns_nan and jax.config.jax_debug_nans:  # pyright: ignore[reportAttributeAccessIssue]
            stack.enter_context(jax.debug_nans(False))
        if own_arrays:
            stack.enter_context(auto_mesh())
        yield


def under_jax_defaults(function: F, returns_nan: bool = False, own_arrays: bool = False) -> F:
    """Return the function with its body under `jax_defaults`. A generator function is under them while it runs."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax_defaults(returns_nan, own_arrays):
            return function(*args, **kwargs)

    @functools.wraps(function)
    def generate(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with contextlib.closing(function(*args, **kwargs)) as generator:
            while True:
                with jax_defaults(returns_nan, own_arrays):
                    try:
                        item = next(generator)
                    except StopIteration:
                        return
                yield item

    return cast(F, generate if inspect.isgeneratorfunction(function) else call)


def may_return_nan(function: F) -> F:
    """Return the function with its body under `jax_defaults`, and without `jax_debug_nans`."""
    return under_jax_defaults(function, returns_nan=True)


def with_own_arrays(function: F) -> F:
    """Return the function with its body under `jax_defaults`, and with the mesh in use on Auto axes."""
    return under_jax_defaults(function, own_arrays=True)
