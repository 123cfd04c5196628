"""Functions on whole trees of weights: select, change and compare tensors by name, and combine several trees.

Nothing is changed in place. NumPy arrays stay NumPy arrays, and JAX arrays stay JAX arrays. Sums are computed in at
least float32. Names and patterns are static under `jit`. Weights and numbers like `t` may be traced, except in `diff`.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gpt2_jax.checks import choice
from gpt2_jax.config import GPT2Config
from gpt2_jax.jax_defaults import under_jax_defaults
from gpt2_jax.model import check_params
from gpt2_jax.params import Params, differences, flatten, unflatten

# ---- by name


def select(params: Params, patterns: str | Sequence[str]) -> dict[str, Any]:
    """Return {"h0/attn/c_attn/w": array, ...}: the tensors whose names match a pattern (`re.search`), in tree order.

    Raises:
      ValueError: a pattern matches no name.
    """
    patterns, flat = [patterns] if isinstance(patterns, str) else list(patterns), _flat("params", params)
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in flat):
            raise ValueError(
                f"{pattern!r} matches no name of the params: the names are {', '.join(list(flat)[:3])}, ..."
            )
    return {name: leaf for name, leaf in flat.items() if any(re.search(pattern, name) for pattern in patterns)}


def map_params(fn: Callable[[str, Any], Any], params: Params, pattern: str | Sequence[str] = ".*") -> Params:
    """Return params in which `fn(name, array)` replaces each array that `select` returns for the pattern.

    Raises:
      ValueError: the pattern matches no name, or fn returned an array of another shape or dtype.
    """
    old = select(params, pattern)
    new = {name: fn(name, leaf) for name, leaf in old.items()}
    if odd := [name for name, leaf in new.items() if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype")]:
        raise ValueError(f"the function must return an array for {odd[0]}, not {reprlib.repr(new[odd[0]])}")
    require_alike("what the function returned does not fit the params", new, old)
    return unflatten(flatten(params) | new)


@dataclasses.dataclass(frozen=True)
class Difference:
    """How one array differs between two trees. Its `str()` is a line of a table.

    Attributes:
      name: the array's name, such as "h0/attn/c_attn/w".
      max_abs: the largest absolute difference, `|a - b|`.
      relative: the norm of a - b divided by the norm of b (L2, of all values as one vector). Infinite if b is all 0.
    """

    name: str
    max_abs: float
    relative: float

    def __str__(self) -> str:
        return f"{self.name:<20} {self.max_abs:10.3e} {self.relative:10.3e}"


def diff(a: Params, b: Params, by: Literal["name", "size"] = "name") -> list[Difference]:
    r"""Compare two trees of the same names and shapes in float64 on the host. Their dtypes may differ.

    Args:
      a, b: the trees. NaN equals NaN.
      by: the order of the rows: "name" is the order of the tree; "size" puts the largest `relative` first.

    Returns:
      A row for each array with a value that differs. `print(*diff(a, b), sep="\n")` prints a table.

    Raises:
      ValueError: a name is in only one of the trees, a shape differs, or `by` is not "name" or "size".
    """
    choice("by", by, ("name", "size"))
    flat_a, flat_b = alike([a, b], dtypes=False)
    rows = [row for name in flat_a if (row := _difference(name, flat_a[name], flat_b[name]))]
    if by == "size":  # NaN comes first, before all numbers
        rows.sort(key=lambda row: -np.nan_to_num(row.relative, nan=np.inf))
    return rows


def _difference(name: str, a: Any, b: Any) -> Difference | None:
    a, b = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
    differs = (a != b) & ~(np.isnan(a) & np.isnan(b))
    if not differs.any():
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        delta = np.subtract(a, b, where=differs, out=np.zeros_like(a))  # no inf - inf
        relative = np.linalg.norm(delta.reshape(-1)) / np.linalg.norm(b.reshape(-1))
    return Difference(name, float(np.abs(delta).max()), float(relative))


# ---- several trees into one


@under_jax_defaults
def interpolate(a: Params, b: Params, t: Any) -> Params:
    """Return (1 - t) a + t b: exactly a at t = 0, exactly b at t = 1. Outside [0, 1] it extrapolates.

    Args:
      a, b: trees of the same names, shapes and dtypes.
      t: a number. It may be traced: `vmap` over t gives the loss along the line.

    Raises:
      ValueError: the trees differ in a name, shape or dtype.
    """
    return _combine([a, b], lambda leaf_a, leaf_b: (1 - t) * leaf_a + t * leaf_b)


@under_jax_defaults
def average(trees: Sequence[Params], weights: Any = None) -> Params:
    """Return the mean of several trees, a "model soup" (Wortsman et al. 2022, section 2).

    Args:
      trees: trees of the same names, shapes and dtypes.
      weights: a number for each tree; they are divided by their sum. They may be traced. None weights all equally.

    Raises:
      ValueError: there is no tree; the trees differ in a name, shape or dtype; the number of weights is wrong; or the
        sum of the weights is 0 or not finite.
    """
    weights = np.ones(len(trees)) if weights is None else weights
    if not trees or len(weights) != len(trees):
        raise ValueError(
            f"an average takes one weight for each tree: there are {len(trees)} trees and {len(weights)} weights"
        )
    total = sum(weights)
    if not isinstance(total, Tracer) and (total == 0 or not np.isfinite(total)):
        raise ValueError(f"the sum of an average's weights must be finite and not 0: it is {total}")
    return _combine(trees, lambda *leaves: sum(w / total * leaf for w, leaf in zip(weights, leaves, strict=True)))


@under_jax_defaults
def task_vector(a: Params, b: Params) -> Params:
    """Return a - b: what the fine-tuned model `a` learned beyond its base model `b` (Ilharco et al. 2022, section 2).

    The result is at least float32, so differences of bfloat16 weights lose nothing. Applied to `b`, it gives `a` again,
    up to rounding. You can add, scale, average and save it like params.

    Raises:
      ValueError: the trees differ in a name, shape or dtype.
    """
    flat_a, flat_b = alike([a, b])
    return unflatten({name: wide(leaf) - wide(flat_b[name]) for name, leaf in flat_a.items()})


@under_jax_defaults
def apply_task_vector(params: Params, vector: Params, scale: Any = 1.0) -> Params:
    """Return params + scale * vector, in the dtypes of params. A negative scale unlearns (Ilharco et al. 2022).

    Raises:
      ValueError: the vector does not have the params' names and shapes.
    """
    return _combine([params, vector], lambda leaf, change: leaf + scale * change, dtypes=False)


def _combine(trees: Sequence[Params], fn: Callable[..., Any], dtypes: bool = True) -> Params:
    """Return the tree of fn(leaf of each tree), computed in at least float32, in the dtypes of the first tree."""
    first, *others = alike(trees, dtypes)
    combined = {}
    for name, leaf in first.items():
        value = fn(wide(leaf), *(wide(flat[name]) for flat in others))
        combined[name] = value.astype(leaf.dtype, copy=False)
    return unflatten(combined)


# ---- shared by edits of weights


def alike(trees: Sequence[Params], dtypes: bool = True) -> list[dict[str, Any]]:
    """Return trees as flat dicts. Raise ValueError with all differences if one does not match the first."""
    flats = [_flat(f"tree {i}", tree) for i, tree in enumerate(trees)]
    for i, flat in enumerate(flats):
        require_alike(f"tree {i} does not fit tree 0", flat, flats[0], dtypes)
    return flats


def require_alike(message: str, found: Mapping[str, Any], expected: Mapping[str, Any], dtypes: bool = True) -> None:
    """Raise ValueError(`message` and all differences) unless two flat trees have the same names, shapes and dtypes."""
    if lines := differences(found, expected, dtypes):
        raise ValueError(message + ":\n  " + "\n  ".join(lines))


def wide(array: Any) -> Any:
    """Return an array in at least float32."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32), copy=False)


def module_of(*arrays: Any) -> ModuleType:
    """Return jax.numpy if one of the arrays is a JAX array, else numpy."""
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np


def product(x: Any, w: Any) -> Any:
    """Return x @ w in at least float32, also on devices whose default products are less precise."""
    with jax.default_matmul_precision("highest"):
        return wide(x) @ wide(w)


def flat_of(config: GPT2Config, params: Params) -> dict[str, Any]:
    """Return the params as a flat dict. Raise ValueError if they do not match the config."""
    check_params(config, params, dtypes=False)
    return flatten(params)


def _flat(what: str, tree: Params) -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        raise ValueError(f"{what} must be nested dicts of arrays, not {reprlib.repr(tree)}")
    return flatten(tree)
