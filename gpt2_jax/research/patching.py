"""Activation patching: what a run gives when some activations of it are those of another run.

`activation_patching` tries every place of a grid, layer by position or by head, in one compiled call;
`attribution_patching` estimates all of them from one gradient.

Two runs of as many tokens: "The Eiffel Tower is in" and "The Colosseum is in". Denoising patches the corrupted run with
activations of the clean one, and asks what suffices to get the answer back; noising patches the clean run with those of
the corrupted one, and asks what is needed for it. They are the same function with the runs swapped: here `tokens_BT` is
always the run that is patched, and `source` the one that activations are taken from (Heimersheim and Nanda 2024, "How
to use and interpret activation patching").

Shape letters: B batch, T query, N heads, V vocab; L layers patched, P patches of a layer, K places of a patch.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.activations import BLOCK, axes, select, shape
from gpt2_jax.checks import whole_number
from gpt2_jax.config import GPT2Config
from gpt2_jax.edits import Where, patch, replace, taps_of
from gpt2_jax.model import GPT2
from gpt2_jax.params import Params
from gpt2_jax.research._forward import as_params, as_tokens, forward
from gpt2_jax.research.metrics import Metric, as_place, logits_at, traceable

Axis = Literal["head", "position"]

# Tokens of the patched runs that go together. At the 124M shape on two CPU cores 512 go at 88 % of the rate of matrix
# products alone, and 32 at half of it. Elsewhere nothing was measured: memory bounds it.
TOKENS_TOGETHER = {"cpu": 512}
TOKENS_TOGETHER_ELSEWHERE = 8192


def activation_patching(
    config: GPT2Config,
    params: Params,
    tokens_BT: jax.Array,
    source: jax.Array | Mapping[str, jax.Array],
    metric: Metric,
    activation: str = "resid_pre",
    *,
    each: Axis | Sequence[Axis] = "position",
    layers: Where = None,
    positions: Where | slice = None,
    heads: Where = None,
    at: Where = -1,
    mask_BT: jax.Array | None = None,
    together: int | None = None,
) -> jax.Array:
    """Return the metric of a run under each of many patches, [layers, heads, positions], in one compiled call.

    By default each layer's residual stream at each position. With "attn/z" and each="head" the output of each head at
    all positions; with each=("head", "position") at one position at a time; with each=() a whole layer.

    A patched run begins where its patch is: what is below costs nothing. Other tokens, activations, places (as many of
    them) and numbers in `metric` compile nothing.

    Args:
      config, params: the model.
      tokens_BT: the run that is patched: the corrupted one to denoise, the clean one to noise.
      source: the run that activations are taken from: its tokens, of the same shape, or its activations, as `forward`
        captures them or what broadcasts to them (their means over a text, say).
      metric: logits [B, V] -> a number, or an array whose axes then come last. A function is compiled once if it is
        defined once; `logit_difference` makes one.
      activation: one of a block's, without its "h3/": "resid_pre", "attn/out", "mlp/out", "attn/z", "attn/q", ...
        `gpt2_jax.activations.BLOCK` has them all. The position of scores and pattern is the query's.
      each: the axes to patch place by place: "position", "head" or both.
      layers: which, place by place; None means all.
      positions, heads: which; None means all. Those that `each` does not name are patched together.
      at: the place in each row, one for all or one for each, whose logits the metric takes, -1 for the last; None gives
        it [B, T, V]. No others are computed.
      mask_BT: bool, True for real tokens, of both runs; places count these alone.
      together: how many patched runs to compute at once, each of all rows. None chooses by the device; memory grows
        with it.

    Raises:
      ValueError: as `forward`, runs of two shapes, an activation that was not captured or is no block's, heads where it
        has none, or places out of range.
    """
    tokens_BT, params = as_tokens(config, tokens_BT), as_params(config, params)
    if activation not in BLOCK:
        raise ValueError(f"{activation!r} is no activation of a block: there are {', '.join(BLOCK)}")
    each = (each,) if isinstance(each, str) else tuple(each)
    layers = tuple(_places("layers", layers, config.n_layer).tolist())
    chosen = _chosen(config, activation, each, heads, positions, tokens_BT.shape[1])
    counts = tuple(len(places) for axis, places in chosen.items() if axis in each)
    return _patched_runs(
        GPT2(config),
        activation,
        layers,
        counts,
        params,
        tokens_BT,
        mask_BT,
        _source(config, tokens_BT, source, [f"h{i}/{activation}" for i in layers]),
        _grid(chosen, each),
        _groups(math.prod(counts), together, tokens_BT.size),
        traceable(metric),
        as_place(at, tokens_BT.shape),
    )


@functools.partial(jax.jit, static_argnames=("model", "activation", "layers", "counts"))
def _patched_runs(
    model: GPT2,
    activation: str,
    layers: tuple[int, ...],
    counts: tuple[int, ...],
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None,
    source: jax.Array | dict[str, jax.Array],
    grid: dict[str, jax.Array],
    groups: jax.Array,
    metric: Metric,
    at_B: jax.Array | None,
) -> jax.Array:
    run = functools.partial(forward, model.config, params, mask_BT=mask_BT)
    kept = [*_kept(activation), activation]
    _, before = run(tokens_BT, capture=[f"^h{layer}/{name}$" for layer in layers for name in kept])
    if not isinstance(source, dict):
        _, source = run(source, capture=[f"^h{layer}/{activation}$" for layer in layers])

    def patched(layer: int, p: jax.Array) -> jax.Array:
        edits = [replace(f"h{layer}/{name}", before[f"h{layer}/{name}"]) for name in kept]
        position_K, head_K = (grid[axis][p] if axis in grid else None for axis in ("position", "head"))
        edits.append(patch(f"h{layer}/{activation}", source, position_K, head_K))
        return metric(logits_at(model, params, tokens_BT, mask_BT, at_B, taps_of(edits)))

    values = [jax.lax.map(jax.vmap(functools.partial(patched, layer)), groups) for layer in layers]
    values_LP = jnp.stack([value.reshape(-1, *value.shape[2:]) for value in values])[:, : math.prod(counts)]
    return values_LP.reshape(len(layers), *counts, *values_LP.shape[2:])


def _kept(activation: str) -> list[str]:
    """Return activations of the block from before a patch, of which all that comes behind follows.

    Put in place they make all before them dead code, which XLA drops: the layers below, and products of their own.
    """
    before = list(BLOCK)[: list(BLOCK).index(activation)]
    return [name for name in ("resid_pre", "attn/q", "attn/k", "attn/v", "resid_mid") if name in before]


# ---- by the gradient


def attribution_patching(
    config: GPT2Config,
    params: Params,
    tokens_BT: jax.Array,
    source: jax.Array | Mapping[str, jax.Array],
    metric: Metric,
    names: str | Sequence[str] = ".",
    *,
    at: Where = -1,
    mask_BT: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Estimate how much patches change the metric, at every place of many activations, from one backward pass.

    To first order a patch changes it by (a in the source - a in the patched run) . (d metric / d a in the patched run).
    That is exact where all that follows `a` is linear, and poor where LayerNorm or a softmax bend much, as for the
    whole stream of an early layer (Nanda 2023, "Attribution patching: activation patching at industrial scale"; Syed
    et al. 2023, "Attribution patching outperforms automated circuit discovery").

    Args:
      config, params, tokens_BT, source, at, mask_BT: as `activation_patching` takes them.
      metric: logits -> a number.
      names: regular expressions, as `forward`'s `capture`, of the activations to estimate; by default all, or all that
        are in `source`. Four arrays of each are held: of attn/scores and attn/pattern [B, N, T, T] a layer, which is
        5.8 GB for a row of 1,024 tokens at the 124M shape, and 1.6 GB with "resid_pre" alone.

    Returns:
      {name: [T], or [N, T] where there are heads}: the change by a patch at each slot, in all rows, to compare with
      `activation_patching` less the metric without a patch. To first order the changes of several patches add up.

    Raises:
      ValueError: as `activation_patching`, or a pattern is found in no name.
    """
    tokens_BT, params = as_tokens(config, tokens_BT), as_params(config, params)
    chosen = select(config, names)
    if isinstance(source, Mapping) and names == ".":
        chosen = [name for name in chosen if name in source] or chosen
    source = _source(config, tokens_BT, source, chosen)
    args = (params, tokens_BT, mask_BT, source, traceable(metric), as_place(at, tokens_BT.shape))
    estimates = _estimates(GPT2(config), tuple(chosen), *args)
    return {name: estimates[name] for name in chosen}  # a program gives them by the alphabet


@functools.partial(jax.jit, static_argnames=("model", "names"))
def _estimates(
    model: GPT2,
    names: tuple[str, ...],
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None,
    source: jax.Array | dict[str, jax.Array],
    metric: Metric,
    at_B: jax.Array | None,
) -> dict[str, jax.Array]:
    def value(added: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        seen: dict[str, jax.Array] = {}

        def see(name: str, x: jax.Array, position_BT: jax.Array) -> jax.Array:
            seen[name] = x
            return x + added[name].astype(x.dtype)

        taps = {name: functools.partial(see, name) for name in names}
        judged = metric(logits_at(model, params, tokens_BT, mask_BT, at_B, taps))
        if jnp.shape(judged) != ():
            raise ValueError(f"the metric must give one number to take a gradient of, not {jnp.shape(judged)}")
        return judged, seen

    if not isinstance(source, dict):
        _, source = forward(model.config, params, source, mask_BT, capture=[f"^{name}$" for name in names])
    wide = jnp.promote_types(model.config.compute_dtype, jnp.float32)
    nothing = {name: jnp.zeros(shape(model.config, name, *tokens_BT.shape), wide) for name in names}
    slopes, before = jax.grad(value, has_aux=True)(nothing)

    moved = {name: source[name].astype(wide) - before[name].astype(wide) for name in names}
    changes = {name: (moved[name] * slopes[name]).sum((0, -1)) for name in names}
    return {name: change.T if axes(name) == "BTNH" else change for name, change in changes.items()}


# ---- arguments


def _source(
    config: GPT2Config, tokens_BT: jax.Array, source: jax.Array | Mapping[str, jax.Array], names: Sequence[str]
) -> jax.Array | dict[str, jax.Array]:
    """Return the tokens of the run that activations are taken from, or those of its activations that are needed."""
    if isinstance(source, Mapping):
        if missing := [name for name in names if name not in source]:
            raise ValueError(f"{missing[0]} was not captured in the run to patch from: there are {', '.join(source)}")
        return {name: source[name] for name in names}
    source_BT = as_tokens(config, source)
    if source_BT.shape != tokens_BT.shape:
        raise ValueError(f"the runs must have tokens of one shape, not {tokens_BT.shape} and {source_BT.shape}")
    return source_BT


def _chosen(
    config: GPT2Config, activation: str, each: tuple[str, ...], heads: Where, positions: Where | slice, n_tokens: int
) -> dict[str, np.ndarray]:
    """Return the heads and positions to patch, in this order; without those that are all, and not in `each`."""
    if wrong := set(each) - {"head", "position"}:
        raise ValueError(f'each must be "position", "head" or both, not {wrong.pop()!r}')
    if "N" not in BLOCK[activation] and ("head" in each or heads is not None):
        raise ValueError(f"{activation} is not divided into heads: its axes are {BLOCK[activation]}")
    asked = {"head": (heads, config.n_head), "position": (positions, n_tokens)}
    asked = {axis: of for axis, of in asked.items() if axis in each or of[0] is not None}
    return {axis: _places(f"{axis}s", *of) for axis, of in asked.items()}


def _places(what: str, places: Where | slice, count: int) -> np.ndarray:
    if places is None or isinstance(places, slice):
        array = np.arange(count)[places or slice(None)]
    else:
        array = np.atleast_1d(np.asarray(places))
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{what} must be whole numbers, one at least, not {places!r}")
    if not ((array >= 0) & (array < count)).all():
        raise ValueError(f"{what} must be from 0 to {count - 1}, not {places!r}")
    return array.astype(np.int32)


def _grid(chosen: dict[str, np.ndarray], each: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return the heads and positions of each patch, [P, K]: one of those in `each`, all of the others."""
    options = [places[:, None] if axis in each else places[None] for axis, places in chosen.items()]
    patches = list(itertools.product(*options))
    return {axis: np.stack([places[i] for places in patches]) for i, axis in enumerate(chosen)}


def _groups(n_patches: int, together: int | None, n_tokens: int) -> np.ndarray:
    """Return the patches [groups, in a group] that go together: groups of one size, the last repeating some patches."""
    if together is None:
        together = max(1, TOKENS_TOGETHER.get(jax.default_backend(), TOKENS_TOGETHER_ELSEWHERE) // n_tokens)
    together = whole_number("together", together, 1)
    n_groups = -(-n_patches // together)
    size = -(-n_patches // n_groups)
    return (np.arange(n_groups * size, dtype=np.int32) % n_patches).reshape(n_groups, size)
