"""Edits of a forward pass: replace, add to or scale activations by traced values, where you say.

An edit is a pytree. Its name and kind are static; its value, layers, positions, heads and neurons are traced. So one
compiled program serves all edits of the same name and kind, `vmap` runs many at once, and `grad` differentiates with
respect to a value. `gpt2_jax.changes` applies edits.

Shape letters: B batch, T query, S cache slot, N heads, H head width, F mlp width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer

from gpt2_jax.activations import IN_BLOCK, axes, check_names, layer_of, shape
from gpt2_jax.config import GPT2Config
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
) -> Edit:
    """Return an edit that replaces an activation by `value`.

    Args:
      name: the activation's name, one of `activation_names(config, branches=True)`. Without the layer, such as
        "resid_pre", it means that activation in all layers, or in those of `layers`.
      value: a number or an array that broadcasts against the activation. `gpt2_jax.activations` lists the axes:
        [D] or [B, T, D] for "h3/resid_pre", [H], [N, H] or [B, T, N, H] for "h3/attn/z".
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

    Raises:
      ValueError: no model has this activation; it does not have the axis that is chosen from; or a number is not whole.
        Inside a compiled program values are unknown: numbers that do not exist apply nowhere.
    """
    where = {"positions": positions, "key_positions": key_positions}
    return _edit(name, "replace", value, where, {"heads": heads, "neurons": neurons, "layers": layers}, each_row)


def add(
    name: str,
    value: Any,
    positions: Positions = None,
    heads: Where = None,
    *,
    neurons: Where = None,
    key_positions: Positions = None,
    layers: Where = None,
    each_row: bool = False,
) -> Edit:
    """Return an edit that adds `value` to an activation. The arguments are those of `replace`."""
    where = {"positions": positions, "key_positions": key_positions}
    return _edit(name, "add", value, where, {"heads": heads, "neurons": neurons, "layers": layers}, each_row)


def scale(
    name: str,
    value: Any,
    positions: Positions = None,
    heads: Where = None,
    *,
    neurons: Where = None,
    key_positions: Positions = None,
    layers: Where = None,
    each_row: bool = False,
) -> Edit:
    """Return an edit that multiplies an activation by `value`; 0 ablates it. The arguments are those of `replace`."""
    where = {"positions": positions, "key_positions": key_positions}
    return _edit(name, "scale", value, where, {"heads": heads, "neurons": neurons, "layers": layers}, each_row)


def patch(
    name: str,
    activations: Mapping[str, jax.Array],
    positions: Positions = None,
    heads: Where = None,
    *,
    neurons: Where = None,
    key_positions: Positions = None,
    layers: Where = None,
) -> Edit:
    """Return an edit that replaces an activation by its value in another run with the same number of tokens.

    Args:
      name: the activation's name, with or without its layer.
      activations: activations of the other run, captured by `research.forward`, as arrays or as one array for each row.
        They must contain `name`; without a layer, that of all `layers`. A run of one row serves all rows.
      positions, heads, neurons, key_positions, layers: as in `replace`.

    Raises:
      ValueError: as `replace`, or `name` was not captured.
    """
    names = [name]
    if name in IN_BLOCK:
        names = [found for found in activations if layer_of(found) is not None and found.split("/", 1)[1] == name]
    if not names or names[0] not in activations:
        raise ValueError(f"{name} was not captured in the run to patch from: that run has {', '.join(activations)}")
    values = {found: _of_rows(found, activations[found]) for found in names}
    value = values if name in IN_BLOCK else values[name]
    where = {"positions": positions, "key_positions": key_positions}
    return _edit(name, "patch", value, where, {"heads": heads, "neurons": neurons, "layers": layers}, False)


# ---- arguments


AXIS_OF = {"heads": ("N", "divided into heads"), "neurons": ("F", "divided into neurons")}


@under_jax_defaults
def _edit(name: str, kind: str, value: Any, positions: dict[str, Any], others: dict[str, Any], each_row: bool) -> Edit:
    try:
        letters = axes(name)
    except (KeyError, TypeError) as error:
        raise ValueError(f"no model has an activation {name!r}: activation_names(config) lists the names") from error
    if positions["key_positions"] is not None and "S" not in letters:
        raise ValueError(f"{name} does not say which tokens are looked at, so key_positions has no meaning: {letters}")
    where: dict[str, Any] = {}
    for what, places in positions.items():
        if isinstance(places, slice):
            where[{"positions": "span", "key_positions": "key_span"}[what]] = _span(what, places)
        elif places is not None:
            where[what] = _places(what, places, most_axes=2)
    for what, numbers in others.items():
        if numbers is None:
            continue
        letter, divided = AXIS_OF.get(what, ("", ""))
        if letter not in letters:
            raise ValueError(f"{name} is not {divided}: its axes are {letters}, so {what} has no meaning")
        if what == "layers" and name not in IN_BLOCK:
            raise ValueError(f"{name} is in one place: leave out layers, or name an activation without its layer")
        where[what] = _places(what, numbers, least=-END if what == "layers" else 0)
    return Edit(name, kind, _numbers(name, value), **where, each_row=each_row)


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


# ---- checks against a model and its rows


def check_edits(
    config: GPT2Config,
    edits: Edit | Sequence[Edit],
    whole_rows: bool = True,
    n_rows: int | None = None,
    longest_B: Any = None,
    ends_B: Any = None,
) -> tuple[Edit, ...]:
    """Check edits, and return them as a tuple.

    Args:
      config: the model's config.
      edits: one edit or several.
      whole_rows: False if the rows and tokens of a batch vary. Then a value must be the same for all of them, or, with
        `each_row`, for all tokens of a row.
      n_rows: the number of rows; None if it is unknown.
      longest_B: the largest number of tokens that each row may have; None if it is unknown.
      ends_B: the number of tokens from whose end negative positions count; None means `longest_B`.

    Raises:
      ValueError: not an Edit, an unknown activation, layer or head, a value that does not broadcast, another number of
        rows, or a position that no row can have.
    """
    edits = (edits,) if isinstance(edits, Edit) or not isinstance(edits, Iterable) else tuple(edits)
    for edit in edits:
        if not isinstance(edit, Edit):
            raise ValueError(f"edits must be made with replace, add, scale or patch of gpt2_jax.research, not {edit!r}")
        if edit.kind not in KINDS:
            raise ValueError(
                f"the edit of {edit.name} has the kind {edit.kind!r}: it must be one of {', '.join(KINDS)}"
            )
        _check_layers(config, edit)
        for what, count in (("heads", config.n_head), ("neurons", 4 * config.n_embd)):
            numbers = getattr(edit, what)
            if numbers is not None and not isinstance(numbers, Tracer) and (np.asarray(numbers) >= count).any():
                raise ValueError(
                    f"the edit of {edit.name} is for {what} {numbers}, but the model has {count}, counted from 0"
                )
        if not whole_rows:
            _check_same_for_tokens(config, edit)
        if n_rows is not None or not whole_rows:
            _check_rows(edit, n_rows)
        if longest_B is not None:
            longest_B = np.asarray(longest_B)
            ends_B = longest_B if ends_B is None else np.asarray(ends_B)
            for what in ("positions", "span", "key_positions", "key_span"):
                _check_exist(edit, what, getattr(edit, what), longest_B, ends_B)
    return edits


def _check_layers(config: GPT2Config, edit: Edit) -> None:
    if edit.name not in IN_BLOCK:
        return check_names(config, [edit.name])
    layers = edit.layers
    if layers is None or isinstance(layers, Tracer):
        layers = np.arange(config.n_layer)
    elif not ((layers >= -config.n_layer) & (layers < config.n_layer)).all():
        raise ValueError(f"the edit of {edit.name} is for layers {layers}, but the model has {config.n_layer}")
    if isinstance(edit.value, dict) and not isinstance(edit.layers, Tracer):
        for i in np.asarray(layers) % config.n_layer:
            if f"h{i}/{edit.name}" not in edit.value:
                raise ValueError(
                    f"h{i}/{edit.name} was not captured in the run to patch from: that run has {', '.join(edit.value)}"
                )
    return None


def _check_same_for_tokens(config: GPT2Config, edit: Edit) -> None:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(edit)):
        raise ValueError("this function runs its own compiled programs: call it outside of jit, vmap and grad")
    one = shape(config, edit.name, 1, 1)
    for value in edit.value.values() if isinstance(edit.value, dict) else [edit.value]:
        found, needed = (jnp.shape(value)[1:], one[1:]) if edit.each_row else (jnp.shape(value), one)
        if not fits(found, needed):
            rows = "row" if edit.each_row else "same for all rows and tokens"
            what = f"one for each {rows}, and the same for its tokens" if edit.each_row else f"the {rows}"
            raise ValueError(
                f"the edit of {edit.name} has a value of shape {jnp.shape(value)}: here a value must be {what}, and "
                f"broadcast against {needed}"
            )


def _check_rows(edit: Edit, n_rows: int | None) -> None:
    """Check that what the edit says for each row is for this number of rows. None means that no rows are known."""
    of_rows = {"value": edit.value} if edit.each_row else {}
    names = ("positions", "span", "key_positions", "key_span")
    of_rows |= {name: places for name in names if (places := getattr(edit, name)) is not None and places.ndim == 2}
    for what, array in of_rows.items():
        if n_rows is None:
            raise ValueError(
                f"the edit of {edit.name} has a {what} for each row, but this function makes its own rows: give "
                "one for all rows"
            )
        if jnp.shape(array)[:1] != (n_rows,):
            raise ValueError(
                f"the edit of {edit.name} has a {what} of shape {jnp.shape(array)}: its first axis must have one entry "
                f"for each of the {n_rows} rows"
            )


def _check_exist(edit: Edit, what: str, places: Any, longest_B: np.ndarray, ends_B: np.ndarray) -> None:
    """Check that a row has each position, or a position of each span."""
    if places is None or isinstance(places, Tracer) or not places.size:
        return
    places = np.asarray(places)
    if what.endswith("span"):
        start, stop = (np.where(end < 0, np.maximum(end + ends_B, 0), end) for end in (places[..., 0], places[..., 1]))
        if not (np.minimum(stop, longest_B) > start).any() and not (stop <= start).all():
            raise ValueError(f"the edit of {edit.name} is for {what} {places.tolist()}, but no row has such a token")
        return
    each = places.ndim == 2
    longest, end = (lengths_B[:, None] if each else lengths_B.max(initial=0) for lengths_B in (longest_B, ends_B))
    wrong = (places != END) & ((places >= longest) | (places < -end))
    if wrong.any():
        position = places[wrong][0]
        n_tokens = np.broadcast_to(np.where(places < 0, end, longest), places.shape)[wrong][0]
        raise ValueError(
            f"the edit of {edit.name} is for position {position}, but {'that' if each else 'the longest'} row has "
            f"{n_tokens} tokens, counted {'back from -1' if position < 0 else 'from 0'}"
        )


def check_value(edit: Edit, name: str, value: tuple[int, ...], target: tuple[int, ...]) -> tuple[int, ...]:
    """Check the shape of an edit's value against that of an activation, and return the shape to broadcast.

    Raises:
      ValueError: it does not broadcast, or is a patch of another number of tokens.
    """
    whole = value
    if edit.each_row:
        whole = (*value[:1], *[1] * (len(target) - len(value)), *value[1:])
    if edit.kind == "patch" and (value[1:] != target[1:] or len(value) != len(target)):
        raise ValueError(
            f"the patch of {name} has the shape {value}, but the activation has {target}: both runs must have the same "
            "number of tokens; for a value that is the same for all tokens use replace"
        )
    if not fits(whole, target):
        for_rows = len(value) and value[0] == target[0] and not edit.each_row
        hint = "; for one value for each row set each_row=True" if for_rows else ""
        raise ValueError(f"the edit of {name} has a value of shape {value}, which does not broadcast to {target}{hint}")
    return whole


def fits(value: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Return whether a value of this shape broadcasts to the target shape."""
    try:
        return np.broadcast_shapes(value, target) == target
    except ValueError:
        return False
