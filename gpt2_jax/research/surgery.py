"""Edits of weights, params -> params: what comes out is again a whole GPT-2 that everything else takes.

Nothing is changed in place: an array that an edit leaves alone is the same array in the new tree, one that it changes
is a copy. NumPy arrays stay NumPy's and JAX's stay JAX's, dtypes are kept, and sums are made in float32 at least.
Layers, heads, neurons, names and ranks are Python values, static under `jit`; weights and means may be traced.
Edits that take whole trees are those of `gpt2_jax.research.trees`, and can be had from here too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gpt2_jax.checks import whole_number
from gpt2_jax.config import GPT2Config
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
    "select",
    "split_heads",
    "swap_layers",
    "task_vector",
]

# ---- layers


def arrange_layers(config: GPT2Config, params: Params, order: Iterable[int]) -> tuple[GPT2Config, Params]:
    """Return (config, params) of the model whose layers are the old ones in this order.

    Args:
      config, params: the model.
      order: old numbers; [0, 2, 2, 1] drops those from h3 on, has h2 twice and swaps it with h1. What is there twice is
        the same array twice, and takes memory once; a program that donates params wants copies,
        jax.tree.map(jnp.copy, params).

    Raises:
      ValueError: a layer is out of range, or there is none.
    """
    flat_of(config, params)
    old = [whole_number("layer", layer, 0, config.n_layer - 1) for layer in _listed(order)]
    if not old:
        raise ValueError("no layer is left: a GPT-2 has one at least")
    tree = {name: params[name] for name in ("wte", "wpe", "ln_f")}
    tree |= {f"h{new}": params[f"h{i}"] for new, i in enumerate(old)}
    return config.replace(n_layer=len(old)), unflatten(flatten(tree))  # dicts of its own, whose arrays are the old


def drop_layers(config: GPT2Config, params: Params, layers: Iterable[int]) -> tuple[GPT2Config, Params]:
    """Return (config, params) without these layers; ValueError as `arrange_layers`."""
    dropped = {whole_number("layer", layer, 0, config.n_layer - 1) for layer in _listed(layers)}
    return arrange_layers(config, params, [layer for layer in range(config.n_layer) if layer not in dropped])


def repeat_layers(
    config: GPT2Config, params: Params, layers: Iterable[int], times: int = 2
) -> tuple[GPT2Config, Params]:
    """Return (config, params) with each of these layers `times` times in a row; ValueError as `arrange_layers`."""
    times = whole_number("times", times, 1)
    repeated = {whole_number("layer", layer, 0, config.n_layer - 1) for layer in _listed(layers)}
    counts = [times if layer in repeated else 1 for layer in range(config.n_layer)]
    return arrange_layers(config, params, np.repeat(np.arange(config.n_layer), counts))


def swap_layers(config: GPT2Config, params: Params, one: int, other: int) -> tuple[GPT2Config, Params]:
    """Return (config, params) with two layers in each other's place; ValueError as `arrange_layers`."""
    places = {one: other, other: one}
    for layer in places:
        whole_number("layer", layer, 0, config.n_layer - 1)
    return arrange_layers(config, params, [places.get(layer, layer) for layer in range(config.n_layer)])


def _listed(layers: Iterable[int]) -> list[int]:
    try:
        return list(layers)
    except TypeError:
        raise ValueError(f"layers must be a list of their numbers, not {layers!r}") from None


# ---- matrices


def low_rank(params: Params, name: str, rank: int) -> Params:
    """Return params with a matrix replaced by the nearest of a lower rank, its truncated singular value decomposition.

    Nearest by the sum of squares (Eckart and Young 1936). It is made in float64 by NumPy, in float32 under `jit`; the
    matrix keeps its shape, so it takes as much memory as before.

    Args:
      params: the tree.
      name: a matrix, "h3/mlp/c_fc/w".
      rank: how many singular values stay; `kept_energy(params, name)[rank - 1]` is their share.

    Raises:
      ValueError: no tensor has this name, it is no matrix, or the rank is not from 1 to its shorter side.
    """
    flat, w = flatten(params), _matrix(params, name)
    rank = whole_number(f"the rank of {name}", rank, 1, min(w.shape))
    u, s, vt = _svd(w)
    nearest = product(u[:, :rank] * s[:rank], vt[:rank]).astype(w.dtype)
    return unflatten(flat | {name: module_of(w).asarray(nearest)})


def kept_energy(params: Params, name: str) -> Any:
    """Return the share of a matrix's sum of squares that ranks 1, 2, ... keep: [shorter side], rising to 1.

    Raises:
      ValueError: no tensor has this name, or it is no matrix.
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
