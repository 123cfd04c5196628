"""Edits of a forward pass: replace, add to or scale activations by traced values, at chosen positions and heads.

An edit is a pytree. Its name and kind are static; its value, positions and heads are traced. So one compiled program
serves all edits of the same name and kind, `vmap` runs many at once, and `grad` differentiates with respect to a value.

Shape letters: B batch, T query, S cache slot, N heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer

from gpt2_jax.activations import Tap, axes, check_names, shape
from gpt2_jax.config import GPT2Config
from gpt2_jax.jax_defaults import under_jax_defaults

Where = int | Sequence[int] | jax.Array | None
END = np.iinfo(np.int32).max


@struct.dataclass
class Edit:
    """One change to one activation. Make it with `replace`, `add`, `scale` or `patch`.

    Attributes:
      name: the activation's name, such as "h3/attn/z".
      kind: "replace", "add" or "scale".
      value: a number or an array that broadcasts against the activation.
      positions: int32 [P], the positions in a row where the edit applies; None means all.
      span: int32 [2], the first position of a slice and the one after its last; None means all.
      heads: int32 [K], the heads to which the edit applies; None means all.
    """

    name: str = struct.field(pytree_node=False)
    kind: str = struct.field(pytree_node=False)
    value: jax.Array
    positions: jax.Array | None = None
    span: jax.Array | None = None
    heads: jax.Array | None = None


def replace(name: str, value: Any, positions: Where | slice = None, heads: Where = None) -> Edit:
    """Return an edit that replaces an activation by `value`.

    Args:
      name: the activation's name, one of `activation_names(config)`.
      value: a number or an array that broadcasts against the activation. `gpt2_jax.activations.AXES` lists the axes:
        [D] or [B, T, D] for "h3/resid_pre", [H], [N, H] or [B, T, N, H] for "h3/attn/z".
      positions: where the edit applies: one position, several, or a slice; None means everywhere. Positions count the
        tokens of a row from 0, without padding. After a text has exceeded n_ctx, they count from the window's start.
      heads: the heads to which the edit applies, one or several; None means all.

    Raises:
      ValueError: no model has this activation, `heads` is given for one without heads, or positions or heads are
        negative or not ints. (Inside a compiled program values are unknown: a negative one applies nowhere.)
    """
    return _edit(name, "replace", value, positions, heads)


def add(name: str, value: Any, positions: Where | slice = None, heads: Where = None) -> Edit:
    """Return an edit that adds `value` to an activation. The arguments are those of `replace`."""
    return _edit(name, "add", value, positions, heads)


def scale(name: str, value: Any, positions: Where | slice = None, heads: Where = None) -> Edit:
    """Return an edit that multiplies an activation by `value`; 0 ablates it. The arguments are those of `replace`."""
    return _edit(name, "scale", value, positions, heads)


def patch(
    name: str, activations: Mapping[str, jax.Array], positions: Where | slice = None, heads: Where = None
) -> Edit:
    """Return an edit that replaces an activation by its value in another run with the same number of tokens.

    Args:
      name: the activation's name.
      activations: activations of the other run, captured by `research.forward`. They must contain `name`.
      positions, heads: as in `replace`.

    Raises:
      ValueError: as `replace`, or `name` was not captured.
    """
    if name not in activations:
        raise ValueError(f"{name} was not captured in the run to patch from: that run has {', '.join(activations)}")
    return _edit(name, "replace", activations[name], positions, heads)


@under_jax_defaults
def _edit(name: str, kind: str, value: Any, positions: Where | slice, heads: Where) -> Edit:
    try:
        letters = axes(name)
    except (KeyError, TypeError) as error:
        raise ValueError(f"no model has an activation {name!r}: activation_names(config) lists the names") from error
    if heads is not None and "N" not in letters:
        raise ValueError(f"{name} is not divided into heads: its axes are {letters}")
    where: dict[str, Any] = {}
    if isinstance(positions, slice):
        where["span"] = _span(positions)
    elif positions is not None:
        where["positions"] = _places("positions", positions)
    if heads is not None:
        where["heads"] = _places("heads", heads)
    return Edit(name, kind, _number(name, value), **where)


def _number(name: str, value: Any) -> Any:
    """Return a value as an array of floats."""
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


def _span(positions: slice) -> jax.Array:
    start = 0 if positions.start is None else positions.start
    stop = END if positions.stop is None else positions.stop
    if positions.step not in (None, 1):
        raise ValueError(f"positions must be a slice with step 1, not {positions}: list the positions instead")
    ends = [_places("positions", start), _places("positions", stop)]
    if [end.size for end in ends] != [1, 1]:
        raise ValueError(f"positions must be a slice from one position to another, not {positions}")
    return jnp.concatenate(ends)


def _places(what: str, places: Any) -> Any:
    """Return positions or heads as int32 [P]: a NumPy array if they are known, a JAX array if they are traced."""
    known = not any(isinstance(place, Tracer) for place in jax.tree.leaves(places))
    found: Any = np.atleast_1d(np.asarray(places)) if known else jnp.atleast_1d(jnp.asarray(places))
    if found.size == 0:  # an empty list becomes an array of floats
        found = found.astype(np.int32)
    if found.ndim != 1 or not jnp.issubdtype(found.dtype, jnp.integer) or (known and (found < 0).any()):
        raise ValueError(f"{what} must be whole numbers, 0 or more, not {found}")
    if known:
        found = np.array([min(int(place), END) for place in found], np.int32)  # no token is at END or after it
    return found.astype(np.int32)


def check_edits(config: GPT2Config, edits: Edit | Sequence[Edit], whole_rows: bool = True) -> tuple[Edit, ...]:
    """Check edits, and return them as a tuple.

    Args:
      config: the model's config.
      edits: one edit or several.
      whole_rows: False if the rows and tokens of a batch vary. Then a value must be the same for all of them.

    Raises:
      ValueError: not an Edit, an unknown activation or head, or a value that does not broadcast.
    """
    edits = (edits,) if isinstance(edits, Edit) or not isinstance(edits, Iterable) else tuple(edits)
    for edit in edits:
        if not isinstance(edit, Edit):
            raise ValueError(f"edits must be made with replace, add, scale or patch of gpt2_jax.research, not {edit!r}")
        check_names(config, [edit.name])
        if edit.heads is not None and not isinstance(edit.heads, Tracer) and (edit.heads >= config.n_head).any():
            raise ValueError(
                f"the edit of {edit.name} is for heads {edit.heads}, but the model has {config.n_head}, counted from 0"
            )
        if not whole_rows:
            if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(edit)):
                raise ValueError("this function runs its own compiled programs: call it outside of jit, vmap and grad")
            one = shape(config, edit.name, 1, 1)
            if not _fits(jnp.shape(edit.value), one):
                raise ValueError(
                    f"the edit of {edit.name} has a value of shape {jnp.shape(edit.value)}: here a value must be the "
                    f"same for all rows and tokens, and broadcast against {one}"
                )
    return edits


def _fits(value: tuple[int, ...], target: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(value, target) == target
    except ValueError:
        return False


def taps_of(edits: Sequence[Edit]) -> dict[str, Tap]:
    """Return the taps that apply these edits. Several edits of one activation apply in order."""
    taps: dict[str, Tap] = {}
    for edit in edits:
        before = taps.get(edit.name)
        taps[edit.name] = _tap(edit) if before is None else _in_turn(before, _tap(edit))
    return taps


def _in_turn(first: Tap, second: Tap) -> Tap:
    return lambda value, position_BT: second(first(value, position_BT), position_BT)


def _tap(edit: Edit) -> Tap:
    return lambda x, position_BT: _apply(edit, x, position_BT)


def _apply(edit: Edit, x: jax.Array, position_BT: jax.Array) -> jax.Array:
    """Return the activation after the edit."""
    value = edit.value.astype(x.dtype)
    if not _fits(value.shape, x.shape):
        raise ValueError(
            f"the edit of {edit.name} has a value of shape {value.shape}, which does not broadcast to {x.shape}"
        )
    how: dict[str, Callable[[], jax.Array]] = {
        "replace": lambda: jnp.broadcast_to(value, x.shape),
        "add": lambda: x + value,
        "scale": lambda: x * value,
    }
    here = _here(edit, x.shape, position_BT)
    new = how[edit.kind]()
    return new if here is None else jnp.where(here, new, x)


def _here(edit: Edit, of: tuple[int, ...], position_BT: jax.Array) -> jax.Array | None:
    """Return a bool mask of where the edit applies, to broadcast against the shape `of`. None means everywhere."""
    letters = axes(edit.name)
    here = None
    if edit.positions is not None:
        here = (position_BT[..., None] == edit.positions).any(-1)
    if edit.span is not None:
        here = (position_BT >= edit.span[0]) & (position_BT < edit.span[1])
    if here is not None:
        here = here.reshape([n if axis in "BT" else 1 for axis, n in zip(letters, of, strict=True)])
    if edit.heads is not None:
        head_N = (jnp.arange(of[letters.index("N")])[:, None] == edit.heads).any(-1)
        head_N = head_N.reshape([n if axis == "N" else 1 for axis, n in zip(letters, of, strict=True)])
        here = head_N if here is None else here & head_N
    return here
