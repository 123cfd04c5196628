"""Activation patching: what a run outputs if some of its activations come from another run.

`activation_patching` patches every cell of a grid, layers by positions or by heads, in one compiled call.
`attribution_patching` estimates the effect of all these patches from one gradient.

The two runs have the same number of tokens: "The Eiffel Tower is in" and "The Colosseum is in". Denoising patches the
corrupted run with activations of the clean run. It shows what is enough to restore the answer. Noising patches the
clean run with activations of the corrupted run. It shows what the answer needs. Both are the same function with the
runs swapped: `tokens_BT` is always the run that is patched, and `source` is the run that activations are taken from
(Heimersheim and Nanda 2024, "How to use and interpret activation patching").

Shape letters: B batch, T query, N heads, V vocab; L layers patched, P patches of a layer, K positions or heads of a
patch.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gpt2_jax.activations import BEFORE, Tap, axes, select, shape
from gpt2_jax.changes import Changes, taps_of
from gpt2_jax.config import GPT2Config
from gpt2_jax.edits import Edit, Positions, Where, replace
from gpt2_jax.explicit_axes import whole_on_auto_axes
from gpt2_jax.jax_defaults import under_jax_defaults
from gpt2_jax.model import GPT2
from gpt2_jax.params import Params
from gpt2_jax.research._changes import after, changes_of
from gpt2_jax.research._forward import as_params, as_tokens, forward
from gpt2_jax.research._patches import Axis, chosen_places, groups_of, kept_of, patch_grid, windows_of
from gpt2_jax.research.metrics import Metric, as_place, in_order_of, judge, logits_at, traceable


@under_jax_defaults
@whole_on_auto_axes
def activation_patching(
    config: GPT2Config,
    params: Params,
    tokens_BT: jax.Array,
    source: jax.Array | Mapping[str, jax.Array],
    metric: Metric | Mapping[str, Metric],
    activation: str = "resid_pre",
    *,
    each: Axis | Sequence[Axis] = "position",
    layers: Where = None,
    window: int = 1,
    positions: Positions = None,
    heads: Where = None,
    neurons: Where | slice = None,
    key_positions: Positions = None,
    at: Where = -1,
    mask_BT: jax.Array | None = None,
    edits: Edit | Sequence[Edit] = (),
    taps: Mapping[str, Tap] | None = None,
    together: int | None = None,
) -> Any:
    """Return the metric of a run under each of many patches, [layers, heads, positions, ...], in one compiled call.

    The default patches each layer's residual stream at each position. With "attn/z" and each="head", a patch is the
    output of one head at all positions. With each=("head", "position"), it is one head at one position. With each=(),
    it is a whole layer.

    The axes of the result are the layers, and those of `each`: heads, positions, key positions, neurons.

    A patched run starts at its patch: the layers below are not computed again. Other tokens, source activations,
    positions and heads (the same number of them), and numbers in `metric` compile nothing.

    Args:
      config, params: the model.
      tokens_BT: the run that is patched: the corrupted run for denoising, the clean run for noising.
      source: the run that activations are taken from: its tokens, of the same shape, or its activations. Pass them as
        `forward` captures them, or as arrays that broadcast to them, such as means over a text.
      metric: a function of the logits [B, V] that returns a number or an array. The axes of an array come last in the
        result. Define the function once, and it compiles once. `logit_difference` makes one. For several metrics of the
        same runs, give a dict of functions, or return a tuple, list or dict: the result has the same structure.
      activation: an activation of a block, without its "h3/": "resid_pre", "attn/out", "mlp/out", "attn/z", "attn/q",
        ... `gpt2_jax.activations` lists them all. With "embed" or "pos_embed", which are before the blocks, the result
        has no axis of layers.
      each: the axes with one patch for each index: "position", "head", "neuron" (of mlp/pre and mlp/post) or
        "key_position" (of attn/scores and attn/pattern: the token that is looked at; "position" is the one that looks).
      layers: the layers to patch, one at a time; None means all.
      window: how many layers to patch together: those around each of `layers`, cut at the ends of the model.
      positions, heads, neurons, key_positions: the ones to patch; None means all. An axis that is not in `each` is
        patched at all its chosen indices together. Positions count real tokens from 0, or back from -1. A list of lists
        of one length has those of each row: [[3], [7]].
      at: the position whose logits the metric takes, one for all rows or one for each row; -1 is the last. Other logits
        are not computed. None passes all logits, [B, T, V].
      mask_BT: bool, True for real tokens, for both runs. Positions count only real tokens.
      edits, taps: changes of the patched run, without and with patches, as `forward` takes them. A patch comes after
        them. The source run has none: for a source with changes, pass its activations.
      together: how many patched runs to compute at once; each has all rows. None chooses by the device. Memory grows
        with it.

    Raises:
      ValueError: as `forward`; the runs have different shapes; an activation was not captured or is not of a block; an
        axis that the activation does not have; or a layer, position, head or neuron out of range.
    """
    tokens_BT, params = as_tokens(config, tokens_BT), as_params(config, params)
    each = (each,) if isinstance(each, str) else tuple(each)
    windows = windows_of(config, activation, layers, window)
    places = {"head": heads, "position": positions, "key_position": key_positions, "neuron": neurons}
    chosen = chosen_places(config, activation, each, places, *tokens_BT.shape)
    counts = tuple(places.shape[-1] for axis, places in chosen.items() if axis in each)
    values = _patched_runs(
        GPT2(config),
        windows,
        counts,
        params,
        tokens_BT,
        mask_BT,
        _source(config, tokens_BT, source, list(dict.fromkeys(itertools.chain.from_iterable(windows)))),
        patch_grid(chosen, each),
        groups_of(math.prod(counts), together, tokens_BT.size),
        traceable(metric),
        as_place(at, tokens_BT.shape),
        changes_of(config, edits, taps, tokens_BT, mask_BT),
    )
    values = in_order_of(metric, values)
    return jax.tree.map(lambda grid: grid[0], values) if activation in BEFORE else values


@functools.partial(jax.jit, static_argnames=("model", "windows", "counts"))
def _patched_runs(
    model: GPT2,
    windows: tuple[tuple[str, ...], ...],
    counts: tuple[int, ...],
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None,
    source: jax.Array | dict[str, jax.Array],
    grid: dict[str, jax.Array],
    groups: jax.Array,
    metric: Metric,
    at_B: jax.Array | None,
    changes: Changes,
) -> Any:
    grid = {axis: jnp.asarray(places) for axis, places in grid.items()}  # NumPy arrays if jit is disabled
    run = functools.partial(model.apply, {"params": params}, method="run")
    kept = {window: [*kept_of(model.config, window[0]), window[0]] for window in windows}
    changed = changes.by_name(model.config)
    _, _, before = run(tokens_BT, mask_BT, taps=changed, capture=tuple(itertools.chain.from_iterable(kept.values())))
    if not isinstance(source, dict):
        _, _, source = run(source, mask_BT, capture=tuple(itertools.chain.from_iterable(windows)))

    def patched(window: tuple[str, ...], p: jax.Array) -> Any:
        edits = [replace(name, before[name]) for name in kept[window]]
        here: dict[str, Any] = {f"{axis}s": places[p] for axis, places in grid.items()}
        edits += [replace(name, source[name], **here) for name in window]
        taps = after(changed, taps_of(model.config, edits))
        return judge(metric, logits_at(model, params, tokens_BT, mask_BT, at_B, taps))

    def as_grid(*values: jax.Array) -> jax.Array:
        """Return the values of each window [groups, size, ...] as one grid."""
        values_LP = jnp.stack([value.reshape(-1, *value.shape[2:]) for value in values])[:, : math.prod(counts)]
        return values_LP.reshape(len(windows), *counts, *values_LP.shape[2:])

    found = [jax.lax.map(jax.vmap(functools.partial(patched, window)), groups) for window in windows]
    return jax.tree.map(as_grid, *found)


# ---- by the gradient


@under_jax_defaults
@whole_on_auto_axes
def attribution_patching(
    config: GPT2Config,
    params: Params,
    tokens_BT: jax.Array,
    source: jax.Array | Mapping[str, jax.Array],
    metric: Metric | Mapping[str, Metric],
    names: str | Sequence[str] = ".",
    *,
    at: Where = -1,
    mask_BT: jax.Array | None = None,
    edits: Edit | Sequence[Edit] = (),
    taps: Mapping[str, Tap] | None = None,
) -> dict[str, Any]:
    """Estimate how much patches change the metric, for many activations at every index, from one backward pass.

    To first order, a patch of an activation `a` changes the metric by the dot product of
    `a in the source - a in the patched run` and `d metric / d a in the patched run`.
    This is exact where everything after `a` is linear. It is poor where LayerNorm or a softmax is far from linear, as
    for the whole stream of an early layer (Nanda 2023, "Attribution patching: activation patching at industrial
    scale"; Syed et al. 2023, "Attribution patching outperforms automated circuit discovery").

    Args:
      config, params, tokens_BT, source, at, mask_BT, edits, taps: as `activation_patching` takes them.
      metric: a function of the logits that returns a number. For several metrics, give a dict of functions, or return a
        tuple, list or dict of numbers. Each one takes a backward pass; the forward pass is shared.
      names: regular expressions, like `capture` of `forward`, of the activations to estimate. The default is all, or
        all that are in `source`. Four arrays of each are in memory; for attn/scores and attn/pattern they are
        [B, N, T, T] in each layer. At the 124M shape, a row of 1,024 tokens takes 5.8 GB, or 1.6 GB with "resid_pre".

    Returns:
      {name: [T], or [N, T] where there are heads}: the change if this index is patched in all rows. Compare it with the
      result of `activation_patching` minus the metric without a patch. To first order, several changes add up. For
      several metrics, each value has their structure.

    Raises:
      ValueError: as `activation_patching`, or a pattern matches no activation name.
    """
    tokens_BT, params = as_tokens(config, tokens_BT), as_params(config, params)
    chosen = select(config, names)
    if isinstance(source, Mapping) and names == ".":
        chosen = [name for name in chosen if name in source] or chosen
    source = _source(config, tokens_BT, source, chosen)
    changes = changes_of(config, edits, taps, tokens_BT, mask_BT)
    args = (params, tokens_BT, mask_BT, source, traceable(metric), as_place(at, tokens_BT.shape), changes)
    estimates = _estimates(GPT2(config), tuple(chosen), *args)
    return {name: in_order_of(metric, estimates[name]) for name in chosen}  # jit sorts a dict by its keys


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
    changes: Changes,
) -> dict[str, Any]:
    changed = changes.by_name(model.config)

    def value(added: dict[str, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
        seen: dict[str, jax.Array] = {}

        def see(name: str, x: jax.Array, position_BT: jax.Array) -> jax.Array:
            seen[name] = x
            return x + added[name].astype(x.dtype)

        taps = after(changed, {name: functools.partial(see, name) for name in names})
        judged = judge(metric, logits_at(model, params, tokens_BT, mask_BT, at_B, taps))
        for number in jax.tree.leaves(judged):
            if number.shape != ():
                raise ValueError(f"the metric must return one number, not an array of shape {number.shape}")
        return judged, seen

    if not isinstance(source, dict):
        _, source = forward(model.config, params, source, mask_BT, capture=[f"^{name}$" for name in names])
    wide = jnp.promote_types(model.config.compute_dtype, jnp.float32)
    nothing = {name: jnp.zeros(shape(model.config, name, *tokens_BT.shape), wide) for name in names}
    judged, pull_back, before = jax.vjp(value, nothing, has_aux=True)
    moved = {name: source[name].astype(wide) - before[name].astype(wide) for name in names}

    def estimate(slopes: dict[str, jax.Array]) -> list[jax.Array]:
        changes = [(moved[name] * slopes[name]).sum((0, -1)) for name in names]
        return [change.T if "TN" in axes(name) else change for name, change in zip(names, changes, strict=True)]

    numbers, structure = jax.tree.flatten(judged)
    one_at_a_time = [[jnp.full_like(n, i == j) for j, n in enumerate(numbers)] for i in range(len(numbers))]
    found = [estimate(*pull_back(jax.tree.unflatten(structure, one))) for one in one_at_a_time]
    return {name: jax.tree.unflatten(structure, of) for name, of in zip(names, zip(*found, strict=True), strict=True)}


# ---- arguments


def _source(
    config: GPT2Config, tokens_BT: jax.Array, source: jax.Array | Mapping[str, jax.Array], names: Sequence[str]
) -> jax.Array | dict[str, jax.Array]:
    """Return the tokens of the source run, or the activations of it that are needed."""
    if isinstance(source, Mapping):
        if missing := [name for name in names if name not in source]:
            raise ValueError(
                f"{missing[0]} was not captured in the run to patch from: that run has {', '.join(source)}"
            )
        return {name: source[name] for name in names}
    source_BT = as_tokens(config, source)
    if source_BT.shape != tokens_BT.shape:
        raise ValueError(f"the tokens of both runs must have one shape, not {tokens_BT.shape} and {source_BT.shape}")
    return source_BT
