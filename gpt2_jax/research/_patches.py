"""Which patches `activation_patching` computes: the chosen heads and positions, their grid, and groups of patches."""

from __future__ import annotations

import itertools
from typing import Literal

import jax
import numpy as np

from gpt2_jax.activations import axes
from gpt2_jax.checks import whole_number
from gpt2_jax.config import GPT2Config
from gpt2_jax.edits import Where

Axis = Literal["head", "position"]

# Tokens of the patched runs that are computed together. At the 124M shape on two CPU cores, 512 tokens run at 88 % of
# the speed of matrix products only, and 32 tokens at half of it. For other devices nothing was measured; memory limits
# the number there.
TOKENS_TOGETHER = {"cpu": 512}
TOKENS_TOGETHER_ELSEWHERE = 8192


def chosen_places(
    config: GPT2Config, activation: str, each: tuple[str, ...], heads: Where, positions: Where | slice, n_tokens: int
) -> dict[str, np.ndarray]:
    """Return the heads and positions to patch, in this order. An axis that is patched as a whole is left out."""
    if wrong := set(each) - {"head", "position"}:
        raise ValueError(f'each must be "position", "head" or both, not {wrong.pop()!r}')
    if "N" not in axes(activation) and ("head" in each or heads is not None):
        raise ValueError(f"{activation} is not divided into heads: its axes are {axes(activation)}")
    asked = {"head": (heads, config.n_head), "position": (positions, n_tokens)}
    asked = {axis: of for axis, of in asked.items() if axis in each or of[0] is not None}
    return {axis: checked_places(f"{axis}s", *of) for axis, of in asked.items()}


def checked_places(what: str, places: Where | slice, count: int) -> np.ndarray:
    """Return whole numbers from 0 to `count` - 1 as an array. None means all of them."""
    if places is None or isinstance(places, slice):
        array = np.arange(count)[places or slice(None)]
    else:
        array = np.atleast_1d(np.asarray(places))
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{what} must be one or more whole numbers, not {places!r}")
    if not ((array >= 0) & (array < count)).all():
        raise ValueError(f"{what} must be from 0 to {count - 1}, not {places!r}")
    return array.astype(np.int32)


def window_of(config: GPT2Config, layer: int, size: int) -> range:
    """Return the `size` layers around a layer, fewer at the ends of the model. Of an even number, more come before."""
    return range(max(0, layer - size // 2), min(config.n_layer, layer + (size + 1) // 2))


def patch_grid(chosen: dict[str, np.ndarray], each: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return the heads and positions of each patch, [P, K]: one index on an axis in `each`, else all indices."""
    options = [places[:, None] if axis in each else places[None] for axis, places in chosen.items()]
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
