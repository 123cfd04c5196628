"""Checks of edits against a model and the rows that it runs: each raises a ValueError of one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gpt2_jax.activations import IN_BLOCK, axes, check_names, shape
from gpt2_jax.config import GPT2Config
from gpt2_jax.edits import END, KINDS, Edit


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
            _check_lengths(edit, longest_B)
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
    if isinstance(edit.value, dict):
        for name in set(edit.value) - {f"h{i}/{edit.name}" for i in range(config.n_layer)}:
            raise ValueError(f"the edit of {edit.name} has a value for {name}, which is not that activation of a layer")
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
    if edit.each_position:
        return
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
    values = edit.value.values() if isinstance(edit.value, dict) else [edit.value]
    of_rows = [("value", value) for value in values if edit.each_row]
    names = ("positions", "span", "key_positions", "key_span")
    of_rows += [(name, places) for name in names if (places := getattr(edit, name)) is not None and places.ndim == 2]
    for what, array in of_rows:
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


def _check_lengths(edit: Edit, longest_B: np.ndarray) -> None:
    """Check that a patch from rows of several lengths is for rows of the same lengths: elsewhere its values are 0."""
    if edit.lengths is None or isinstance(edit.lengths, Tracer) or np.array_equal(edit.lengths, longest_B):
        return
    source, target = (", ".join(map(str, np.asarray(lengths).tolist())) for lengths in (edit.lengths, longest_B))
    raise ValueError(
        f"the patch of {edit.name} is from rows of {source} tokens, but the rows have {target}: both runs must have "
        "the same number of tokens in each row"
    )


def _check_exist(edit: Edit, what: str, places: Any, longest_B: np.ndarray, ends_B: np.ndarray) -> None:
    """Check that a row has each position, or a position of each span."""
    if places is None or isinstance(places, Tracer) or not places.size:
        return
    places = np.asarray(places)
    if what.endswith("span"):
        start, stop = (np.where(end < 0, np.maximum(end + ends_B, 0), end) for end in (places[..., 0], places[..., 1]))
        written = places[..., 0], places[..., 1]
        empty = (written[1] <= written[0]) & ((written[0] < 0) == (written[1] < 0))  # as written, such as slice(4, 4)
        empty |= (written[0] == 0) & (written[1] < 0)  # all but the last ones, of a short row
        if not (np.minimum(stop, longest_B) > start).any() and not empty.all():
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
    if edit.each_position:
        one = tuple(n for axis, n in zip(axes(name), target, strict=True) if axis not in "BT")
        if not fits(value[1 + edit.each_row :], one):
            raise ValueError(
                f"the edit of {name} has a value of shape {value}: what it has for one position must broadcast to {one}"
            )
        return value
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
