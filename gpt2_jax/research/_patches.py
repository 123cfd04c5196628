"""Which patches `activation_patching` computes: the chosen heads, positions and neurons, their grid, and groups."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Literal

import jax
import numpy as np

from gpt2_jax.activations import BEFORE, activation_names, axes
from gpt2_jax.checks import whole_number
from gpt2_jax.config import GPT2Config
from gpt2_jax.edits import Positions, Where

Axis = Literal["head", "position", "key_position", "neuron"]

# Tokens of the patched runs that are computed together. At the 124M shape on two CPU cores, 512 tokens run at 88 % of
# the speed of matrix products only, and 32 tokens at half of it. For other devices nothing was measured; memory limits
# the number there.
TOKENS_TOGETHER = {"cpu": 512}
TOKENS_TOGETHER_ELSEWHERE = 8192

# Activations of a block that determine everything after them.
DETERMINE_THE_REST = ("resid_pre", "attn/q", "attn/k", "attn/v", "resid_mid")

# The axes of the result, in this order: the letter of each in an activation's axes, and what one without it is.
ORDER = {
    "head": ("N", "not divided into heads"),
    "position": ("T", "not divided into positions"),
    "key_position": ("S", "not divided by the token that is looked at"),
    "neuron": ("F", "not divided into neurons"),
}


def windows_of(config: GPT2Config, activation: str, layers: Where, window: int) -> tuple[tuple[str, ...], ...]:
    """Return the names of the activations that are patched together, for each of the chosen layers."""
    window = whole_number("window", window, 1)
    if activation in BEFORE:
        if layers is not None or window > 1:
            raise ValueError(f"{activation} is before the layers: leave out `layers` and `window`")
        return ((activation,),)
    if activation not in _of_block(config):
        known = ", ".join([*_of_block(config), *BEFORE])
        raise ValueError(f"{activation!r} is not an activation of a block: choose from {known}")
    places = checked_layers(config, layers)
    return tuple(tuple(f"h{i}/{activation}" for i in window_of(config, layer, window)) for layer in places)


def checked_layers(config: GPT2Config, layers: Where) -> list[int]:
    """Return the numbers of layers. Negative ones count from the last. None means all."""
    return (checked_places("layers", layers, config.n_layer, from_end=True) % config.n_layer).tolist()


def _of_block(config: GPT2Config) -> list[str]:
    """Return the names of the activations of a block, in the order of computation."""
    return [name.removeprefix("h0/") for name in activation_names(config, branches=True) if name.startswith("h0/")]


def chosen_places(
    config: GPT2Config,
    activation: str,
    each: tuple[str, ...],
    places: Mapping[str, Positions],
    n_rows: int,
    n_tokens: int,
) -> dict[str, np.ndarray]:
    """Return the indices to patch along each axis, [K], in the order of the result. Positions of rows are [B, K].

    An axis that is patched as a whole is left out. `places` has the chosen indices of each axis; None means all.
    Negative positions stay negative: edits count them from the end of each row.
    """
    if wrong := set(each) - set(ORDER):
        raise ValueError(f"each must be among {', '.join(map(repr, ORDER))}, not {wrong.pop()!r}")
    letters = axes(activation)
    counts = {"N": config.n_head, "T": n_tokens, "S": n_tokens, "F": 4 * config.n_embd}
    chosen = {}
    for axis, (letter, divided) in ORDER.items():
        if axis in each or places[axis] is not None:
            if letter not in letters:
                raise ValueError(f"{activation} is {divided}: its axes are {letters}")
            of_tokens = letter in "TS"
            chosen[axis] = checked_places(f"{axis}s", places[axis], counts[letter], of_tokens, of_tokens)
            if chosen[axis].ndim == 2 and len(chosen[axis]) != n_rows:
                raise ValueError(
                    f"{axis}s has lists for {len(chosen[axis])} rows, but there are {n_rows} rows of tokens"
                )
    return chosen


def checked_places(
    what: str, places: Positions, count: int, from_end: bool = False, of_rows: bool = False
) -> np.ndarray:
    """Return whole numbers from 0 to `count` - 1 as an array. None means all of them.

    Args:
      what: what the numbers are, for messages.
      places: the numbers.
      count: their limit.
      from_end: numbers down to -`count` may count from the end. They stay negative.
      of_rows: there may be a list for each row, all of one length.
    """
    if places is None or isinstance(places, slice):
        array = np.arange(count)[places or slice(None)]
    else:
        try:
            array = np.atleast_1d(np.asarray(places))
        except ValueError:  # lists of different lengths
            array = np.asarray(None)
    if array.ndim > 1 + of_rows or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{what} must be one or more whole numbers, not {places!r}")
    least = -count if from_end else 0
    if not ((array >= least) & (array < count)).all():
        raise ValueError(f"{what} must be from {least} to {count - 1}, not {places!r}")
    return array.astype(np.int32)


def window_of(config: GPT2Config, layer: int, size: int) -> range:
    """Return the `size` layers around a layer, fewer at the ends of the model. Of an even number, more come before."""
    return range(max(0, layer - size // 2), min(config.n_layer, layer + (size + 1) // 2))


def kept_of(config: GPT2Config, name: str) -> list[str]:
    """Return the activations of the block that come before the patch and determine everything after it.

    A patched run gets their stored values. So XLA removes the code that would compute them: the layers below, and the
    matrix products of this block before them.
    """
    layer, _, activation = name.partition("/")
    if not activation:
        return []
    before = itertools.takewhile(lambda other: other != activation, _of_block(config))
    return [f"{layer}/{other}" for other in before if other in DETERMINE_THE_REST]


def patch_grid(chosen: dict[str, np.ndarray], each: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return the indices of each patch, [P, K], by axis: one index on an axis in `each`, else all chosen ones.

    Positions of rows are [P, B, K].
    """
    options = [
        np.moveaxis(places, -1, 0)[..., None] if axis in each else places[None] for axis, places in chosen.items()
    ]
    patches = list(itertools.product(*options))
    return {axis: np.stack([places[i] for places in patches]) for i, axis in enumerate(chosen)}


def groups_of(n_patches: int, together: int | None, n_tokens: int) -> np.ndarray:
    """Return the patches that are computed together, [groups, size]. The last group repeats patches to be full."""
    if together is None:
        together = max(1, TOKENS_TOGETHER.get(jax.default_backend(), TOKENS_TOGETHER_ELSEWHERE) // n_tokens)
    together = whole_number("together", together, 1)
    n_groups = -(-n_patches // together)
    size = -(-n_patches // n_groups)
    return (np.arange(n_groups * size, dtype=np.int32) % n_patches).reshape(n_groups, size)
