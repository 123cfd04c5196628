"""The params tree by name: nested dicts of arrays <-> "h3/attn/c_attn/w", and how two trees differ."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import traverse_util

Params = dict[str, Any]
"""Nested plain dicts of arrays; the joined path of a leaf is its TensorFlow variable's name without `model/`."""
T = TypeVar("T")


def flatten(params: Params) -> dict[str, Any]:
    """Return {"h0/attn/c_attn/w": array, ...}, layers in numeric order."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return {name: flat[name] for name in sorted(flat, key=_natural)}


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Return the nested dicts of {"h0/attn/c_attn/w": array, ...}: the inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], dtypes: bool = True) -> list[str]:
    """Compare two flat trees of anything with a shape and a dtype, both ways; `dtypes=False` lets dtypes differ.

    Returns:
      One line for each name that is missing, extra, of another shape or of another dtype; empty when they agree.
    """
    lines = [f"missing: {name} {_describe(expected[name])}" for name in expected if name not in found]
    lines += [f"extra: {name} {_describe(found[name])}" for name in found if name not in expected]
    for name in expected:
        if name not in found:
            continue
        same_dtype = not dtypes or found[name].dtype.name == expected[name].dtype.name
        if tuple(found[name].shape) != tuple(expected[name].shape) or not same_dtype:
            lines.append(f"misshaped: {name} is {_describe(found[name])}, expected {_describe(expected[name])}")
    return lines


def check(params: Params, expected: Mapping[str, Any], dtypes: bool = True) -> None:
    """Check that a tree holds exactly the expected names, shapes and dtypes (`dtypes=False`: any floats).

    Raises:
      ValueError: it does not; the message lists all that is missing, extra, or of another shape or dtype.
    """
    try:
        flat = flatten(params)
    except (TypeError, AssertionError, AttributeError) as error:
        raise ValueError(f"params must be nested dicts of arrays, not {reprlib.repr(params)}") from error
    for name, leaf in flat.items():
        if not hasattr(leaf, "shape") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"params hold no array of floats at {name}, but {reprlib.repr(leaf)}")
    if wrong := differences(flat, expected, dtypes):
        raise ValueError("params are not those of this config:\n  " + "\n  ".join(wrong))


def by_rules(rules: Sequence[tuple[str, T]], names: Iterable[str], what: str = "the rules") -> dict[str, T]:
    """Return for every name the value of the first rule, (regular expression, value), that is found in it.

    Raises:
      ValueError: a name is left over.
    """
    found = {}
    for name in names:
        values = [value for pattern, value in rules if re.search(pattern, name)]
        if not values:
            raise ValueError(f'{what} say nothing of {name}: end them with one for all the rest, (".*", ...)')
        found[name] = values[0]
    return found


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype.name}[{', '.join(str(n) for n in leaf.shape)}]"


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts h10 after h9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]
