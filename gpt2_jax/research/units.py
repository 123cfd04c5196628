"""Heads and neurons: remove them from the weights, and view a layer's attention weights by head.

Shape letters: D n_embd, N heads, H head width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from gpt2_jax.checks import whole_number
from gpt2_jax.config import GPT2Config
from gpt2_jax.explicit_axes import whole_on_auto_axes
from gpt2_jax.jax_defaults import under_jax_defaults
from gpt2_jax.params import Params, flatten, unflatten
from gpt2_jax.research.trees import flat_of, module_of, product, require_alike, wide

Places = Iterable[tuple[int, int]]  # (layer, head) or (layer, neuron)
Heads = dict[str, dict[str, Any]]


@under_jax_defaults
@whole_on_auto_axes
def ablate_heads(config: GPT2Config, params: Params, heads: Places, mean: Any = None) -> Params:
    """Remove what some heads add to the residual stream: their rows of attn/c_proj/w become 0.

    The bias attn/c_proj/b belongs to the layer, and does not change. The weights of the heads' queries, keys and values
    do not change either.

    Args:
      config, params: the model.
      heads: pairs (layer, head).
      mean: [len(heads), H], the constant z of each head; None means 0. An example is the mean of `h3/attn/z` over a
        text. What c_proj computes from it is added to attn/c_proj/b.

    Raises:
      ValueError: a layer or head is out of range or named twice, or `mean` has another shape.
    """
    return _ablate(config, params, "attn", heads, mean)


@under_jax_defaults
@whole_on_auto_axes
def prune_heads(config: GPT2Config, params: Params, heads: Places, mean: Any = None) -> Params:
    """Set all weights of some heads to 0: as `ablate_heads`, and their columns of attn/c_attn/w and b become 0 too.

    No array gets smaller. A GPT-2 has n_head heads of width n_embd / n_head in every layer, so a tree without a head
    would not be a GPT-2. The logits are those of `ablate_heads`.
    """
    return _prune(config, params, "attn", heads, mean)


@under_jax_defaults
@whole_on_auto_axes
def ablate_neurons(config: GPT2Config, params: Params, neurons: Places, mean: Any = None) -> Params:
    """Remove what some MLP neurons add to the residual stream: their rows of mlp/c_proj/w become 0.

    The bias mlp/c_proj/b belongs to the layer, and does not change.

    Args:
      config, params: the model.
      neurons: pairs (layer, neuron), neurons 0 to 4 D - 1.
      mean: [len(neurons)], the constant value of each neuron (`h3/mlp/post`), as in `ablate_heads`; None means 0.

    Raises:
      ValueError: a layer or neuron is out of range or named twice, or `mean` has another shape.
    """
    return _ablate(config, params, "mlp", neurons, mean)


@under_jax_defaults
@whole_on_auto_axes
def prune_neurons(config: GPT2Config, params: Params, neurons: Places, mean: Any = None) -> Params:
    """Set all weights of some neurons to 0: as `ablate_neurons`, and their columns of mlp/c_fc/w and b become 0 too.

    No array gets smaller: the MLP of a GPT-2 is 4 n_embd wide in every layer.
    """
    return _prune(config, params, "mlp", neurons, mean)


def _ablate(config: GPT2Config, params: Params, part: str, places: Places, mean: Any) -> Params:
    flat, places = flat_of(config, params), list(places)
    _, width = _units(config, part)
    if mean is not None:
        shape = (len(places), width)[: 2 if part == "attn" else 1]
        if np.shape(mean) != shape:
            raise ValueError(f"mean must have the shape {shape}, not {np.shape(mean)}: one entry for each pair")
        mean = module_of(*jax.tree.leaves(mean)).asarray(mean).reshape(len(places), width)
    for layer, (which, rows) in _rows(config, part, places).items():
        w_name, b_name = f"h{layer}/{part}/c_proj/w", f"h{layer}/{part}/c_proj/b"
        w, b = flat[w_name], flat[b_name]
        if mean is not None:
            flat[b_name] = (wide(b) + product(mean[which].reshape(-1), w[rows])).astype(b.dtype)
        flat[w_name] = _zeroed(w, rows)
    return unflatten(flat)


def _prune(config: GPT2Config, params: Params, part: str, places: Places, mean: Any) -> Params:
    places = list(places)
    flat = flatten(_ablate(config, params, part, places, mean))
    for layer, (_, rows) in _rows(config, part, places).items():
        if part == "attn":  # the columns of q, k and v
            name, columns = f"h{layer}/attn/c_attn", np.concatenate([rows + i * config.n_embd for i in range(3)])
        else:
            name, columns = f"h{layer}/mlp/c_fc", rows
        flat[f"{name}/w"] = _zeroed(flat[f"{name}/w"], (slice(None), columns))
        flat[f"{name}/b"] = _zeroed(flat[f"{name}/b"], columns)
    return unflatten(flat)


def _rows(config: GPT2Config, part: str, places: list[tuple[int, int]]) -> dict[int, tuple[list[int], np.ndarray]]:
    """Return {layer: (the indices of its places, their rows of c_proj)}."""
    what = {"attn": "head", "mlp": "neuron"}[part]
    count, width = _units(config, part)
    found: dict[int, dict[int, int]] = {}
    for i, place in enumerate(places):
        if np.shape(place) != (2,):
            raise ValueError(f"{what}s must be pairs, [(layer, {what}), ...], not {place!r}")
        layer, number = place
        numbers = found.setdefault(whole_number("layer", layer, 0, config.n_layer - 1), {})
        if numbers.setdefault(whole_number(what, number, 0, count - 1), i) != i:
            raise ValueError(f"{what} {number} of layer {layer} is named twice")
    return {
        layer: (list(numbers.values()), (np.array(list(numbers))[:, None] * width + np.arange(width)).reshape(-1))
        for layer, numbers in found.items()
    }


def _units(config: GPT2Config, part: str) -> tuple[int, int]:
    """Return how many heads or neurons a layer has, and how many rows of c_proj each one has."""
    return (config.n_head, config.head_dim) if part == "attn" else (4 * config.n_embd, 1)


def _zeroed(array: Any, index: Any) -> Any:
    """Return a copy of an array with zeros at an index."""
    if isinstance(array, jax.Array):
        return array.at[index].set(0)
    array = array.copy()
    array[index] = 0
    return array


# ---- views


@under_jax_defaults
@whole_on_auto_axes
def split_heads(config: GPT2Config, params: Params, layer: int) -> Heads:
    """Return the attention weights of a layer by head.

    Returns:
      {"q": {"w": [D, N, H], "b": [N, H]}, "k": the same, "v": the same, "out": {"w": [N, H, D], "b": [D]}}. Head n
      computes q = x @ w[:, n] + b[n] and adds z @ out_w[n] to the stream. NumPy arrays are views of the params' memory.

    Raises:
      ValueError: the layer is out of range.
    """
    flat, name = flat_of(config, params), f"h{whole_number('layer', layer, 0, config.n_layer - 1)}/attn"
    heads = (config.n_head, config.head_dim)
    w_D3NH = flat[f"{name}/c_attn/w"].reshape(config.n_embd, 3, *heads)
    b_3NH = flat[f"{name}/c_attn/b"].reshape(3, *heads)
    out = {"w": flat[f"{name}/c_proj/w"].reshape(*heads, config.n_embd), "b": flat[f"{name}/c_proj/b"]}
    return {part: {"w": w_D3NH[:, i], "b": b_3NH[i]} for i, part in enumerate("qkv")} | {"out": out}


@under_jax_defaults
@whole_on_auto_axes
def join_heads(config: GPT2Config, params: Params, layer: int, heads: Heads) -> Params:
    """Return params with `heads` as the attention weights of a layer. It is the exact inverse of `split_heads`.

    Raises:
      ValueError: the layer is out of range, or `heads` have other names, shapes or dtypes than `split_heads` returns.
    """
    expected = flatten(split_heads(config, params, layer))
    require_alike("heads do not fit the layer", flatten(heads), expected)
    qkv = [heads[part] for part in "qkv"]
    xp = module_of(*jax.tree.leaves(qkv))
    joined = {
        "c_attn/w": xp.stack([part["w"] for part in qkv], axis=1).reshape(config.n_embd, -1),
        "c_attn/b": xp.stack([part["b"] for part in qkv]).reshape(-1),
        "c_proj/w": heads["out"]["w"].reshape(config.n_embd, config.n_embd),
        "c_proj/b": heads["out"]["b"],
    }
    return unflatten(flatten(params) | {f"h{layer}/attn/{name}": array for name, array in joined.items()})
