"""Edits of weights, params -> params: the result is a complete GPT-2 that all other functions take.

Nothing is changed in place. An array that an edit does not change is the same array in the new tree. One that it
changes is a copy. NumPy arrays stay NumPy arrays, and JAX arrays stay JAX arrays. Dtypes are kept, and sums are
computed in at least float32. Layers, heads, neurons, names and ranks are Python values, static under `jit`. Weights and
means may be traced. The functions on whole trees come from `gpt2_jax.research.trees` and are available here too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gpt2_jax.added_tokens import resize_vocabulary
from gpt2_jax.checks import whole_number
from gpt2_jax.config import GPT2Config
from gpt2_jax.explicit_axes import whole_on_auto_axes
from gpt2_jax.jax_defaults import under_jax_defaults
from gpt2_jax.params import Params, flatten, unflatten
from gpt2_jax.research.trees import (
    Difference,
    apply_task_vector,
    average,
    diff,
    flat_of,
    interpolate,
    map_params,
    module_of,
    product,
    select,
    task_vector,
    wide,
)
from gpt2_jax.research.units import ablate_heads, ablate_neurons, join_heads, prune_heads, prune_neurons, split_heads

__all__ = [
    "Difference",
    "ablate_heads",
    "ablate_neurons",
    "apply_task_vector",
    "arrange_layers",
    "average",
    "diff",
    "drop_layers",
    "interpolate",
    "join_heads",
    "kept_energy",
    "low_rank",
    "map_params",
    "prune_heads",
    "prune_neurons",
    "repeat_layers",
    "resize_vocabulary",
    "select",
    "split_heads",
    "swap_layers",
    "task_vector",
]

# ---- layers


def arrange_layers(config: GPT2Config, params: Params, order: Iterable[int]) -> tuple[GPT2Config, Params]:
    """Return (config, params) of a model with the old layers in this order.

    Args:
      config, params: the model.
      order: numbers of old layers. [0, 2, 2, 1] drops the layers from h3 on, uses h2 twice, and moves h1 after it. A
        layer that is used twice takes memory once: both are the same arrays. A program that donates params needs
        copies, `jax.tree.map(jnp.copy, params)`. If the config says scale_attn_by_inverse_layer_idx, a layer's scores
        are divided by its new number plus 1.

    Raises:
      ValueError: a layer is out of range, or `order` is empty.
    """
    flat_of(config, params)
    old = [whole_number("layer", layer, 0, config.n_layer - 1) for layer in _listed(order)]
    if not old:
        raise ValueError("no layer is left: a GPT-2 needs at least one")
    tree = {name: params[name] for name in params if name not in {f"h{i}" for i in range(config.n_layer)}}
    tree |= {f"h{new}": params[f"h{i}"] for new, i in enumerate(old)}
    return config.replace(n_layer=len(old)), unflatten(flatten(tree))  # new dicts, old arrays


def drop_layers(config: GPT2Config, params: Params, layers: Iterable[int]) -> tuple[GPT2Config, Params]:
    """Return (config, params) without these layers. Raises ValueError as `arrange_layers` does."""
    dropped = {whole_number("layer", layer, 0, config.n_layer - 1) for layer in _listed(layers)}
    return arrange_layers(config, params, [layer for layer in range(config.n_layer) if layer not in dropped])


def repeat_layers(
    config: GPT2Config, params: Params, layers: Iterable[int], times: int = 2
) -> tuple[GPT2Config, Params]:
    """Return (config, params) with each of these layers `times` times in a row. Raises as `arrange_layers` does."""
    times = whole_number("times", times, 1)
    repeated = {whole_number("layer", layer, 0, config.n_layer - 1) for layer in _listed(layers)}
    counts = [times if layer in repeated else 1 for layer in range(config.n_layer)]
    return arrange_layers(config, params, np.repeat(np.arange(config.n_layer), counts))


def swap_layers(config: GPT2Config, params: Params, one: int, other: int) -> tuple[GPT2Config, Params]:
    """Return (config, params) with two layers swapped. Raises ValueError as `arrange_layers` does."""
    places = {one: other, other: one}
    for layer in places:
        whole_number("layer", layer, 0, config.n_layer - 1)
    return arrange_layers(config, params, [places.get(layer, layer) for layer in range(config.n_layer)])


def _listed(layers: Iterable[int]) -> list[int]:
    try:
        return list(layers)
    except TypeError:
        raise ValueError(f"layers must be a list of layer numbers, not {layers!r}") from None


# ---- matrices


@under_jax_defaults
@whole_on_auto_axes
def low_rank(params: Params, name: str, rank: int) -> Params:
    """Return params with one matrix replaced by the nearest matrix of a lower rank, its truncated SVD.

    Nearest means the smallest sum of squared differences (Eckart and Young 1936). NumPy computes it in float64; under
    `jit` it is computed in float32. The matrix keeps its shape, so it takes as much memory as before.

    Args:
      params: the tree.
      name: the name of a matrix, such as "h3/mlp/c_fc/w".
      rank: how many singular values stay. `kept_energy(params, name)[rank - 1]` is their share of the sum of squares.

    Raises:
      ValueError: no tensor has this name, it is not a matrix, or the rank is not from 1 to its shorter side.
    """
    flat, w = flatten(params), _matrix(params, name)
    rank = whole_number(f"the rank of {name}", rank, 1, min(w.shape))
    u, s, vt = _svd(w)
    nearest = product(u[:, :rank] * s[:rank], vt[:rank]).astype(w.dtype)
    return unflatten(flat | {name: module_of(w).asarray(nearest)})


@under_jax_defaults
def kept_energy(params: Params, name: str) -> Any:
    """Return the share of a matrix's sum of squares that each rank 1, 2, ... keeps: [shorter side], rising to 1.

    Raises:
      ValueError: no tensor has this name, or it is not a matrix.
    """
    _, s, _ = _svd(_matrix(params, name))
    return (s**2).cumsum() / (s**2).sum()


def _svd(w: Any) -> tuple[Any, Any, Any]:
    if isinstance(w, Tracer):
        u, s, vh = jnp.linalg.svd(wide(w), full_matrices=False)
        return u, s, vh
    return np.linalg.svd(np.asarray(w).astype(np.float64), full_matrices=False)


def _matrix(params: Params, name: str) -> Any:
    flat = flatten(params)
    if name not in flat:
        near = difflib.get_close_matches(name, flat, n=3, cutoff=0.4) or list(flat)[:3]
        raise ValueError(f"the params have no tensor {name!r}; the nearest names are {', '.join(near)}")
    if len(flat[name].shape) != 2:
        raise ValueError(f"{name} is {tuple(flat[name].shape)}, not a matrix")
    return flat[name]
