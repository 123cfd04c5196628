"""The params tree by name: nested dicts of arrays <-> "h3/attn/c_attn/w". Differences between two trees."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

Params = dict[str, Any]
"""Nested plain dicts of arrays. The path of a leaf, joined by "/", is its TensorFlow name without `model/`."""
T = TypeVar("T")


def flatten(params: Params) -> dict[str, Any]:
    """Return {"h0/attn/c_attn/w": array, ...}, layers in numeric order."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return {name: flat[name] for name in sorted(flat, key=_natural)}


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Return the nested dicts of {"h0/attn/c_attn/w": array, ...}: the inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def output_head(params: Mapping[str, Any]) -> Any:
    """Return the array [V, D] that turns hidden states into logits: `lm_head` if there is one, else `wte`."""
    return params["lm_head"] if "lm_head" in params else params["wte"]


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], dtypes: bool = True) -> list[str]:
    """Compare two flat trees of arrays, or of other objects with shape and dtype; `dtypes=False` ignores dtypes.

    Returns:
      One line for each name that is missing, extra, or of another shape or dtype; an empty list if the trees match.
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
    """Check that a tree has exactly the expected names, shapes and dtypes (`dtypes=False`: any floats).

    Raises:
      ValueError: it does not match; the message lists all that is missing, extra, or of another shape or dtype.
    """
    try:
        flat = flatten(params)
    except (TypeError, AssertionError, AttributeError) as error:
        raise ValueError(f"params must be nested dicts of arrays, not {reprlib.repr(params)}") from error
    for name, leaf in flat.items():
        dtype = getattr(leaf, "dtype", None)  # a torch tensor has one too, of another type
        if not hasattr(leaf, "shape") or not isinstance(dtype, np.dtype) or not jnp.issubdtype(dtype, jnp.floating):
            torch = type(leaf).__module__.startswith("torch")
            hint = ": convert torch tensors with tensor.detach().numpy()" if torch else ""
            raise ValueError(f"params must hold an array of floats at {name}, not {reprlib.repr(leaf)}{hint}")
    if wrong := differences(flat, expected, dtypes):
        raise ValueError("params do not match the config:\n  " + "\n  ".join(wrong))


def by_rules(rules: Sequence[tuple[str, T]], names: Iterable[str], what: str = "the rules") -> dict[str, T]:
    """Return {name: value of the first rule that matches it}; a rule is (regular expression, value).

    Raises:
      ValueError: no rule matches a name.
    """
    found = {}
    for name in names:
        values = [value for pattern, value in rules if re.search(pattern, name)]
        if not values:
            raise ValueError(f'{what} do not match {name}: end them with a rule for all other names, (".*", ...)')
        found[name] = values[0]
    return found


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype.name}[{', '.join(str(n) for n in leaf.shape)}]"


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts h10 after h9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]
