"""Edits of a forward pass: replace, add to or scale activations by traced values, where you say.

An edit is a pytree. Its name and kind are static; its value, layers, positions, heads and neurons are traced. So one
compiled program serves all edits of the same name and kind, `vmap` runs many at once, and `grad` differentiates with
respect to a value. `gpt2_jax.changes` applies edits.

Shape letters: B batch, T query, S cache slot, N heads, H head width, F mlp width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer

from gpt2_jax.activations import IN_BLOCK, axes, layer_of
from gpt2_jax.jax_defaults import under_jax_defaults

Where = int | Sequence[int] | jax.Array | None
Positions = Where | Sequence[Sequence[int]] | slice
KINDS = ("replace", "add", "scale", "patch")
END = np.iinfo(np.int32).max


@struct.dataclass
class Edit:
    """One change to one activation. Make it with `replace`, `add`, `scale` or `patch`.

    Attributes:
      name: the activation's name, such as "h3/attn/z", or "attn/z" for several layers.
      kind: "replace", "add", "scale" or "patch".
      value: a number or an array that broadcasts against the activation. Of a patch of several layers, a dict.
      positions: int32 [P] or, of each row, [B, P]: where the edit applies; None means everywhere.
      span: int32 [2] or, of each row, [B, 2]: the first position of a slice and the one after its last.
      key_positions, key_span: the same for the axis S of attn/scores and attn/pattern: the tokens that are looked at.
      heads: int32 [K], the heads to which the edit applies; None means all.
      neurons: int32 [K], the neurons to which the edit applies; None means all.
      layers: int32 [K], the layers to which the edit applies, if `name` does not say it; None means all.
      each_row: the first axis of `value` has one entry for each row.
      each_position: the next axis of `value` has one entry for each position.
      lengths: int32 [B], the tokens of each row of the run that a patch is from, if its rows differ; else None.
    """

    name: str = struct.field(pytree_node=False)
    kind: str = struct.field(pytree_node=False)
    value: Any
    positions: jax.Array | None = None
    span: jax.Array | None = None
    key_positions: jax.Array | None = None
    key_span: jax.Array | None = None
    heads: jax.Array | None = None
    neurons: jax.Array | None = None
    layers: jax.Array | None = None
    each_row: bool = struct.field(pytree_node=False, default=False)
    each_position: bool = struct.field(pytree_node=False, default=False)
    lengths: Any = None


def replace(
    name: str,
    value: Any,
    positions: Positions = None,
    heads: Where = None,
    *,
    neurons: Where = None,
    key_positions: Positions = None,
    layers: Where = None,
    each_row: bool = False,
    each_position: bool = False,
) -> Edit:
    """Return an edit that replaces an activation by `value`.

    Args:
      name: the activation's name, one of `activation_names(config, branches=True)`. Without the layer, such as
        "resid_pre", it means that activation in all layers, or in those of `layers`.
      value: a number or an array that broadcasts against the activation. `gpt2_jax.activations` lists the axes:
        [D] or [B, T, D] for "h3/resid_pre", [H], [N, H] or [B, T, N, H] for "h3/attn/z". For a name without its layer
        it may also be a dict: {"h0/resid_pre": array, ...}.
      positions: where the edit applies: one position, several, a slice, or several for each row, such as [[3], [7, 8]]
        or slice([0, 2], [3, 9]). None means everywhere. Positions count the tokens of a row from 0, without padding.
        Negative ones count from the row's end: -1 is its last token. In generation they count from the prompt's end,
        and slice(-1, None) is the prompt's last token and all new ones. After a text has exceeded n_ctx, positions
        count from the window's start.
      heads: the heads to which the edit applies, one or several; None means all.
      neurons: the neurons to which an edit of mlp/pre or mlp/post applies; None means all.
      key_positions: for attn/scores and attn/pattern, the tokens that are looked at, in the forms of `positions`.
      layers: the layers to which the edit applies, if `name` does not have one; None means all. They may be traced. -1
        is the last layer.
      each_row: `value` has one entry for each row along its first axis, [B], [B, D], ..., which broadcasts against the
        activation of that row.
      each_position: `value` has one entry for each of `positions` along its first axis, or its second after that of
        rows: [P, D] at P positions, or from the first position of a slice on.

    Raises:
      ValueError: no model has this activation; it does not have the axis that is chosen from; or a number is not whole.
        Inside a compiled program values are unknown: numbers that do not exist apply nowhere.
    """
    where = {"key_positions": key_positions, "neurons": neurons, "layers": layers}
    return _edit(name, "replace", value, positions, heads, **where, each_row=each_row, each_position=each_position)


class Chosen(TypedDict, total=False):
    """Arguments of `replace` that `add`, `scale` and `patch` take too."""

    neurons: Where
    key_positions: Positions
    layers: Where
    each_row: bool
    each_position: bool


def add(name: str, value: Any, positions: Positions = None, heads: Where = None, **chosen: Unpack[Chosen]) -> Edit:
    """Return an edit that adds `value` to an activation. The arguments are those of `replace`."""
    return _edit(name, "add", value, positions, heads, **chosen)


def scale(name: str, value: Any, positions: Positions = None, heads: Where = None, **chosen: Unpack[Chosen]) -> Edit:
    """Return an edit that multiplies an activation by `value`; 0 ablates it. The arguments are those of `replace`."""
    return _edit(name, "scale", value, positions, heads, **chosen)


def patch(
    name: str,
    activations: Mapping[str, Any],
    positions: Positions = None,
    heads: Where = None,
    **chosen: Unpack[Chosen],
) -> Edit:
    """Return an edit that replaces an activation by its value in another run with the same number of tokens.

    Args:
      name: the activation's name, with or without its layer.
      activations: activations of the other run, captured by `research.forward`, as arrays or as one array for each row.
        They must contain `name`; without a layer, that of all `layers`. A run of one row serves all rows.
      positions, heads, chosen: as in `replace`.

    Raises:
      ValueError: as `replace`, or `name` was not captured.
    """
    names = [name]
    if name in IN_BLOCK:
        names = [found for found in activations if layer_of(found) is not None and found.split("/", 1)[1] == name]
    if not names or names[0] not in activations:
        raise ValueError(f"{name} was not captured in the run to patch from: that run has {', '.join(activations)}")
    values = {found: _of_rows(found, activations[found]) for found in names}
    edit = _edit(name, "patch", values if name in IN_BLOCK else values[name], positions, heads, **chosen)
    return edit.replace(lengths=_lengths(names[0], activations[names[0]]))  # pyright: ignore[reportAttributeAccessIssue]


# ---- arguments


@under_jax_defaults
def _edit(
    name: str,
    kind: str,
    value: Any,
    positions: Positions,
    heads: Where,
    *,
    neurons: Where = None,
    key_positions: Positions = None,
    layers: Where = None,
    each_row: bool = False,
    each_position: bool = False,
) -> Edit:
    try:
        letters = axes(name)
    except (KeyError, TypeError) as error:
        raise ValueError(f"no model has an activation {name!r}: activation_names(config) lists the names") from error
    if key_positions is not None and "S" not in letters:
        raise ValueError(f"{name} does not say which tokens are looked at, so key_positions has no meaning: {letters}")
    if layers is not None and name not in IN_BLOCK:
        raise ValueError(f"{name} is in one place: leave out layers, or name an activation without its layer")
    where: dict[str, Any] = {}
    for what, places, span in (("positions", positions, "span"), ("key_positions", key_positions, "key_span")):
        if isinstance(places, slice):
            where[span] = _span(what, places)
        elif places is not None:
            where[what] = _places(what, places, most_axes=2)
    for what, numbers, letter in (("heads", heads, "N"), ("neurons", neurons, "F"), ("layers", layers, "")):
        if numbers is None:
            continue
        if letter not in letters:
            raise ValueError(f"{name} is not divided into {what}: its axes are {letters}")
        where[what] = _places(what, numbers, least=-END if what == "layers" else 0)
    edit = Edit(name, kind, _numbers(name, value), **where, each_row=each_row, each_position=each_position)
    if each_position:
        _check_each_position(edit)
    return edit


def _check_each_position(edit: Edit) -> None:
    """Check that there are as many values as positions."""
    shape, axis = jnp.shape(edit.value), int(edit.each_row)
    if edit.kind == "patch" or isinstance(edit.value, dict) or len(shape) <= axis:
        raise ValueError(f"each_position needs one array with an axis of positions, not the value of {edit.name}")
    if edit.positions is None and edit.span is None:
        raise ValueError(f"each_position needs positions: the edit of {edit.name} has none")
    n = None if edit.positions is None else edit.positions.shape[-1]
    if edit.span is not None and isinstance(edit.span, np.ndarray):
        lengths = edit.span[..., 1] - edit.span[..., 0]
        closed = (edit.span[..., 1] < END - 1) & ((edit.span[..., 0] < 0) == (edit.span[..., 1] < 0))
        n = next((int(length) for length in lengths[closed] if length != shape[axis]), None)
    if n is not None and n != shape[axis]:
        raise ValueError(f"the edit of {edit.name} has {shape[axis]} values for {n} positions")


def _numbers(name: str, value: Any) -> Any:
    """Return a value as an array of floats, or a dict of them."""
    if isinstance(value, dict):
        return {key: _numbers(key, array) for key, array in value.items()}
    if isinstance(value, jax.Array):  # not weakly typed: a weak type would compile another program
        value = jax.lax.convert_element_type(value, value.dtype)
    else:
        try:
            value = np.asarray(value)
        except ValueError:  # a list of lists of different lengths
            value = np.asarray(None)
    if jnp.issubdtype(value.dtype, jnp.floating):
        return value
    if not (jnp.issubdtype(value.dtype, jnp.integer) or value.dtype == bool):
        raise ValueError(f"the value of an edit of {name} must be a number or an array of numbers, not {value.dtype}")
    return value.astype(np.float32)


def _of_rows(name: str, value: Any) -> Any:
    """Return the activation of rows of several lengths, a list of arrays, as one array with zeros at the ends."""
    if not isinstance(value, list):
        return value
    letters = axes(name)[1:]
    longest = max(row.shape[letters.index("T")] for row in value)
    ends = [
        [(0, longest - n if axis in "TS" else 0) for axis, n in zip(letters, row.shape, strict=True)] for row in value
    ]
    return jnp.stack([jnp.pad(row, end) for row, end in zip(value, ends, strict=True)])


def _lengths(name: str, value: Any) -> np.ndarray | None:
    """Return the number of tokens of each row of an activation that is a list of arrays; None for an array."""
    if not isinstance(value, list):
        return None
    return np.array([row.shape[axes(name)[1:].index("T")] for row in value], np.int32)


def _span(what: str, positions: slice) -> Any:
    """Return a slice as its two ends, [2], or [B, 2] if an end has one number for each row."""
    if positions.step not in (None, 1):
        raise ValueError(f"{what} must be a slice with step 1, not {positions}: list the positions instead")
    ends = [0 if positions.start is None else positions.start, END if positions.stop is None else positions.stop]
    ends = [_places(what, end) if np.ndim(end) else _places(what, end)[0] for end in ends]
    known = not any(isinstance(end, Tracer) for end in ends)
    try:
        return (np if known else jnp).stack((np if known else jnp).broadcast_arrays(*ends), axis=-1)
    except ValueError as error:
        sizes = " and ".join(str(np.size(end)) for end in ends)
        raise ValueError(
            f"{what} must be a slice of two ends, each one number or one for each row, not {sizes}"
        ) from error


def _places(what: str, places: Any, least: int = -END, most_axes: int = 1) -> Any:
    """Return numbers as int32 [P] or [B, P]: a NumPy array if they are known, a JAX array if traced.

    Rows of different numbers of positions are filled with END, where no token is.
    """
    known = not any(isinstance(place, Tracer) for place in jax.tree.leaves(places))
    try:
        found: Any = np.atleast_1d(np.asarray(places)) if known else jnp.atleast_1d(jnp.asarray(places))
    except ValueError:
        found = _same_length(places)
    if found.size == 0:  # an empty list becomes an array of floats
        found = found.astype(np.int32)
    if found.ndim > most_axes or not jnp.issubdtype(found.dtype, jnp.integer) or (known and (found < least).any()):
        words = "whole numbers" if least < 0 else "whole numbers, 0 or more"
        words += ", or a list of them for each row" if most_axes > 1 else ""
        raise ValueError(f"{what} must be {words}, not {places!r}")
    if known and found.dtype != np.int32:
        found = np.array([max(-END, min(int(place), END - 1)) for place in found.flat], np.int32).reshape(found.shape)
    return found.astype(np.int32)


def _same_length(rows: Any) -> np.ndarray:
    rows = [np.atleast_1d(np.asarray(row)) for row in rows]
    rows = [row if row.size else row.astype(np.int32) for row in rows]
    if any(row.ndim != 1 or not np.issubdtype(row.dtype, np.integer) for row in rows):
        return np.asarray(None)
    longest = max(map(len, rows))
    rows = [np.pad(row.astype(np.int64), (0, longest - len(row)), constant_values=END) for row in rows]
    return np.stack(rows).clip(-END, END).astype(np.int32)
