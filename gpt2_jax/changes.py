"""Applies edits and taps: what changes in one forward pass.

Shape letters: B batch, T query, S cache slot, N heads, F mlp width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.tree_util import Partial

from gpt2_jax.activations import IN_BLOCK, InTurn, Tap, axes, layer_of, takes_keys, taps_by_name
from gpt2_jax.config import GPT2Config
from gpt2_jax.edit_checks import check_edits, check_value
from gpt2_jax.edits import Edit
from gpt2_jax.explicit_axes import automatic


@struct.dataclass
class Changes:
    """The edits and taps of a pass. They are a pytree: functions are static, what a Partial or an edit holds is traced.

    Attributes:
      edits: checked edits. They come before the taps of the same activation.
      taps: functions, as Partial.
      tap_names: the name or pattern of each tap.
    """

    edits: tuple[Edit, ...] = ()
    taps: tuple[Partial, ...] = ()
    tap_names: tuple[str, ...] = struct.field(pytree_node=False, default=())

    def __bool__(self) -> bool:
        """Return whether anything is changed."""
        return bool(self.edits or self.taps)

    def by_name(self, config: GPT2Config, end_B: jax.Array | None = None) -> dict[str, Tap]:
        """Return one tap for each activation that is changed. `end_B` is as in `taps_of`."""
        taps = taps_of(config, self.edits, end_B)
        given = dict(zip(self.tap_names, self.taps, strict=True))
        for name, tap in taps_by_name(config, given).items():
            taps[name] = tap if name not in taps else InTurn(name, taps[name], tap)
        return taps

    def of_rows(self, rows: Sequence[int], n_rows: int | None = None) -> Changes:
        """Return the changes for these rows of a batch, and for copies of the first up to `n_rows`."""
        index = np.zeros(len(rows) if n_rows is None else n_rows, int)
        index[: len(rows)] = rows
        return self.replace(edits=tuple(_of_rows(edit, index) for edit in self.edits))  # pyright: ignore[reportAttributeAccessIssue]


NO_CHANGES = Changes()
Edits = Edit | Sequence[Edit] | Changes
"""Edits as functions take them."""


def check_changes(
    config: GPT2Config,
    edits: Edits,
    taps: Mapping[str, Tap] | None = None,
    whole_rows: bool = True,
    n_rows: int | None = None,
    longest_B: Any = None,
    ends_B: Any = None,
) -> Changes:
    """Check edits and taps, and return them together. The arguments are those of `check_edits`, and taps by name.

    Changes that were checked before may be passed as edits. They are returned.

    Raises:
      ValueError: as `check_edits`; or a tap is not a function, cannot be hashed, or fits no activation.
    """
    if isinstance(edits, Changes):
        return edits
    edits = check_edits(config, edits, whole_rows, n_rows, longest_B, ends_B)
    taps = {} if taps is None else taps
    taps_by_name(config, taps)
    functions = tuple(_traceable(tap) for tap in taps.values())
    for name, tap in zip(taps, functions, strict=True):
        try:
            hash(tap.func)
        except TypeError as error:
            raise ValueError(
                f"the tap of {name!r} cannot be hashed, which compiling needs: give a plain function, or "
                "jax.tree_util.Partial(function, arrays)"
            ) from error
    return Changes(edits, functions, tuple(taps))


def _traceable(tap: Tap) -> Partial:
    """Return a tap as a Partial. The arrays of a callable pytree, such as `research.Eraser`, are traced."""
    if isinstance(tap, Partial):
        return tap
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(tap)):
        return Partial(tap)
    return Partial(_call_with_keys if takes_keys(tap) else _call, tap)


def _call(tap: Tap, value: jax.Array, position_BT: jax.Array) -> Any:
    return tap(value, position_BT)


def _call_with_keys(tap: Tap, value: jax.Array, position_BT: jax.Array, key_position_BS: jax.Array) -> Any:
    return tap(value, position_BT, key_position_BS)


_call_with_keys.takes_keys = True  # pyright: ignore[reportFunctionMemberAccess]


def taps_of(config: GPT2Config, edits: Sequence[Edit], end_B: jax.Array | None = None) -> dict[str, Tap]:
    """Return the taps that apply these edits. Several edits of one activation apply in order.

    Args:
      config: the model's config.
      edits: checked edits.
      end_B: int32, the number of tokens of each row from whose end negative positions count. None means all tokens up
        to the last one of the pass.
    """
    taps: dict[str, Tap] = {}
    for edit in edits:
        for name in _names(config, edit):
            tap = _EditTap(edit, name, config.n_layer, end_B)
            taps[name] = tap if name not in taps else InTurn(name, taps[name], tap)
    return taps


def _names(config: GPT2Config, edit: Edit) -> list[str]:
    """Return the activations that an edit may change."""
    if edit.name not in IN_BLOCK:
        return [edit.name]
    names = [f"h{i}/{edit.name}" for i in range(config.n_layer)]
    return [name for name in names if name in edit.value] if isinstance(edit.value, dict) else names


class _EditTap:
    """The tap that applies an edit to one activation."""

    takes_keys = True

    def __init__(self, edit: Edit, name: str, n_layer: int, end_B: jax.Array | None):
        self.edit, self.name, self.n_layer, self.end_B = edit, name, n_layer, end_B

    def on_auto_axes(self, outside: Callable[[Tap], Tap]) -> _EditTap:
        """Return this tap for values on Auto axes: see `gpt2_jax.explicit_axes.of_tap`."""
        del outside
        return _EditTap(jax.tree.map(automatic, self.edit), self.name, self.n_layer, automatic(self.end_B))

    def __call__(self, x: jax.Array, position_BT: jax.Array, key_position_BS: jax.Array) -> jax.Array:
        """Return the activation after the edit."""
        edit = self.edit
        value = edit.value[self.name] if isinstance(edit.value, dict) else edit.value
        value = jnp.asarray(value).astype(x.dtype)
        value = value.reshape(check_value(edit, self.name, value.shape, x.shape))
        if edit.each_position:
            value = self._of_positions(value, x.ndim, position_BT)
        how: dict[str, Callable[[], jax.Array]] = {
            "replace": lambda: jnp.broadcast_to(value, x.shape),
            "patch": lambda: jnp.broadcast_to(value, x.shape),
            "add": lambda: x + value,
            "scale": lambda: x * value,
        }
        here = self._here(x.shape, position_BT, key_position_BS)
        new = how[edit.kind]()
        return new if here is None else jnp.where(here, new, x)

    def _here(self, of: tuple[int, ...], position_BT: jax.Array, key_position_BS: jax.Array) -> jax.Array | None:
        """Return a bool mask of where the edit applies, to broadcast against the shape `of`. None means everywhere."""
        edit, letters, end_B = self.edit, axes(self.name), self._end_B(position_BT)
        found = {
            "BT": _at(position_BT, edit.positions, edit.span, end_B),
            "BS": _at(key_position_BS, edit.key_positions, edit.key_span, end_B),
            "N": _among(edit.heads, of, letters.find("N")),
            "F": _among(edit.neurons, of, letters.find("F")),
        }
        if edit.each_position and edit.span is not None:
            found["BT"] = found["BT"] & (self._index(position_BT) < edit.value.shape[int(edit.each_row)])
        here = None
        for along, mask in found.items():
            if mask is not None:
                mask = mask.reshape([n if axis in along else 1 for axis, n in zip(letters, of, strict=True)])
                here = mask if here is None else here & mask
        if edit.layers is not None:
            layer = layer_of(self.name) or 0  # an edit with layers is in a block
            in_layer = ((edit.layers == layer) | (edit.layers == layer - self.n_layer)).any()
            here = in_layer if here is None else here & in_layer
        return here

    def _end_B(self, position_BT: jax.Array) -> jax.Array:
        return position_BT.max(-1) + 1 if self.end_B is None else self.end_B

    def _index(self, position_BT: jax.Array) -> jax.Array:
        """Return which of the edit's positions each token has, int32 [B, T]. Elsewhere it means nothing."""
        edit, end_B1 = self.edit, self._end_B(position_BT)[:, None]
        if edit.positions is None:
            assert edit.span is not None
            start = edit.span[..., :1]
            return position_BT - jnp.where(start < 0, jnp.maximum(start + end_B1, 0), start)
        places_BP = _from_start(edit.positions, end_B1)
        return (position_BT[..., None] == places_BP[:, None]).argmax(-1)

    def _of_positions(self, value: jax.Array, n_axes: int, position_BT: jax.Array) -> jax.Array:
        """Return the value for each token, of a value for each position. It broadcasts against the activation."""
        each_row = self.edit.each_row
        index_BT = self._index(position_BT).clip(0, value.shape[int(each_row)] - 1)
        rows_B1 = jnp.arange(len(position_BT))[:, None]
        value_BT = value[rows_B1, index_BT] if each_row else value[index_BT]
        one = value_BT.shape[2:]
        value_BT = value_BT.reshape(*position_BT.shape, *[1] * (n_axes - 2 - len(one)), *one)
        return jnp.moveaxis(value_BT, 1, axes(self.name).index("T"))


def _at(position_BT: jax.Array, places: Any, span: Any, end_B: jax.Array) -> jax.Array | None:
    """Return where these positions, or those of a span, are: bool [B, T]. None means everywhere."""
    end_B1 = end_B[:, None]
    if places is not None:
        places_BP = _from_start(places, end_B1)
        return (position_BT[..., None] == places_BP[:, None]).any(-1)
    if span is not None:
        start, stop = (span[..., i : i + 1] for i in range(2))
        start_B1, stop_B1 = (_from_start(end, end_B1) for end in (start, stop))
        return (position_BT >= start_B1) & (position_BT < stop_B1) & (position_BT >= 0)
    return None


def _from_start(places: Any, end_B1: jax.Array) -> jax.Array:
    """Return positions counted from the row's start, [B, P]. Negative ones count from `end_B1`."""
    return jnp.where(places < 0, places + end_B1, places)


def _among(numbers: Any, of: tuple[int, ...], axis: int) -> jax.Array | None:
    """Return which indices of an axis are among these numbers: bool. None means all."""
    return None if numbers is None else (jnp.arange(of[axis])[:, None] == numbers).any(-1)


def _of_rows(edit: Edit, index: np.ndarray) -> Edit:
    """Return the edit with what it says for each row taken from these rows."""
    taken: dict[str, Any] = {}
    if edit.each_row:
        taken["value"] = jax.tree.map(lambda value: np.asarray(value)[index], edit.value)
    for name in ("positions", "span", "key_positions", "key_span"):
        places = getattr(edit, name)
        if places is not None and places.ndim == 2:
            taken[name] = np.asarray(places)[index]
    return edit.replace(**taken)  # pyright: ignore[reportAttributeAccessIssue]
