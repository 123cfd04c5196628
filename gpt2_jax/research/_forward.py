"""The forward pass that captures activations by name and applies edits and taps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gpt2_jax.activations import IN_BLOCK, Tap, layer_of, select, taps_by_name
from gpt2_jax.changes import Changes
from gpt2_jax.checks import whole_number
from gpt2_jax.config import GPT2Config
from gpt2_jax.edits import Edit
from gpt2_jax.jax_defaults import under_jax_defaults
from gpt2_jax.kv_cache import KVCache
from gpt2_jax.model import GPT2, Output, check_params
from gpt2_jax.params import Params
from gpt2_jax.research._changes import changes_of
from gpt2_jax.research._rows import (
    are_lists,
    as_rows,
    as_tokens,
    bucketed,
    bucketed_edit,
    of_rows,
)

__all__ = ["as_params", "as_tokens", "forward", "places", "slots"]


@under_jax_defaults
def forward(
    config: GPT2Config,
    params: Params,
    tokens_BT: jax.Array | Sequence[Sequence[int]],
    mask_BT: jax.Array | None = None,
    *,
    capture: str | Sequence[str] = (),
    edits: Edit | Sequence[Edit] = (),
    taps: Mapping[str, Tap] | None = None,
    cache: KVCache | None = None,
    stop_at_layer: int | None = None,
    logits: bool = True,
) -> tuple[Output, dict[str, Any]]:
    r"""Run the model and return the requested activations: `forward(config, params, tokens, capture="resid_post$")`.

    It compiles once for each config, shape, set of captured names, kinds of edits, and tap functions. Other values,
    positions, heads and layers compile nothing. The program does not keep activations that you did not request. You can
    also call it under `jit`, `vmap` and `grad`. If your own `jit` drops the logits [B, T, V], XLA does not compute what
    only they need.

    Lists of ids are padded to 32, 64, 128, ... tokens, up to n_ctx, and the results are cut to the rows' lengths. So
    there are few programs for many lengths. An array of ids runs with its own shape. So does a list of rows of one
    length with taps, because a tap sees all tokens.

    An edit that changes nothing gives bit-identical results in float32 and float64. There is one exception: an edit of
    attn/scores if sqrt(head width) is not a power of two (it is 8 in all released sizes). Then XLA may skip a rounding
    in the run without the edit. In bfloat16 the bits may differ too, because XLA may keep whole sums in float32.

    No change lets a token attend to a later one or to padding: attn/scores and attn/pattern are masked again behind it.
    A query whose scores are all -inf attends to nothing.

    Args:
      config: the model's config.
      params: the model's params, as `load` returns them. Nothing is folded, centered or renamed.
      tokens_BT: token ids: an array [B, T], or a list of rows of any lengths.
      mask_BT: bool, True for real tokens of an array. Padding may be anywhere in a row. None means that all are real.
      capture: one regular expression or several. Activations whose names match one are returned, with their values
        after the edits and taps. ".*" returns all that are always computed, which takes much memory: [B, N, T, T] twice
        per layer. Those of `gpt2_jax.activations.BRANCHES` need a pattern of their own, such as "attn/result$".
      edits: made with `replace`, `add`, `scale` or `patch`. Several edits of one activation apply in order.
      taps: {activation name or regular expression: function (value, position_BT) -> new value, or None for no change}.
        They apply after the edits. Define a function once, and it compiles once. If it holds arrays, pass
        `jax.tree_util.Partial(function, arrays)`; then they come first in its arguments.
      cache: the KV cache of the tokens before, as GPT2 takes it.
      stop_at_layer: run only the blocks before this one, 0 to n_layer, or negative, counted from the end.
      logits: False computes no logits, and only the blocks that the captured activations need.

    Returns:
      Output and {name: activation} in the order of computation. See `gpt2_jax.activations.AXES` for the meaning and the
      axes of each activation. Output has the logits [B, T, V], or None without them. With `stop_at_layer` it has
      `stream` instead, the residual stream [B, T, D] after the last block that ran. If the rows of a list differ in
      length, each of these is a list of arrays, one for each row, without the axis B.

    Raises:
      ValueError: as GPT2; a pattern matches no activation name; an edit does not fit, or is for a position that no row
        has; a tap returns another shape; or a captured or changed activation comes after `stop_at_layer`.
    """
    lengths: list[int] | None = None
    if are_lists(tokens_BT) and mask_BT is None and cache is None:
        rows = as_rows(config, tokens_BT)
        lengths = [len(row) for row in rows]
        if taps and len(set(lengths)) == 1:
            lengths = None
        else:
            tokens_BT, mask_BT = bucketed(config, rows)
    tokens_BT, params = as_tokens(config, tokens_BT), as_params(config, params)
    names = tuple(select(config, capture)) if capture else ()
    changes = changes_of(config, edits, taps, tokens_BT, mask_BT, whole_rows=cache is None)
    if lengths is not None:
        sizes = (len(lengths), max(lengths), tokens_BT.shape[1])
        edits = tuple(bucketed_edit(config, edit, *sizes) for edit in changes.edits)
        changes = dataclasses.replace(changes, edits=edits)
    stop = _stop(config, names, changes, stop_at_layer, logits, cache)
    wanted: Wanted = "stream" if stop_at_layer is not None else "logits" if logits else "neither"
    found = _forward(GPT2(config), names, stop, wanted, params, tokens_BT, mask_BT, cache, changes)
    out, captured = of_rows(config, found, lengths) if lengths else found
    return out, {name: captured[name] for name in names}  # jit sorts a dict by its keys


def _stop(
    config: GPT2Config,
    names: tuple[str, ...],
    changes: Changes,
    stop_at_layer: int | None,
    logits: bool,
    cache: KVCache | None,
) -> int | None:
    """Return the layer to stop at; None means to run them all."""
    if stop_at_layer is None:
        last = max((_after(config, name) for name in names), default=0)
        return None if logits or cache is not None or last > config.n_layer else last
    stop = whole_number("stop_at_layer", stop_at_layer, -config.n_layer, config.n_layer)
    stop = stop + config.n_layer if stop < 0 else stop
    for edit in changes.edits:
        if _first_after(config, edit) > stop:
            raise ValueError(f"the edit of {edit.name} changes nothing with stop_at_layer={stop}: it is computed later")
    for pattern, tap in zip(changes.tap_names, changes.taps, strict=True):
        if all(_after(config, name) > stop for name in taps_by_name(config, {pattern: tap})):
            raise ValueError(f"the tap of {pattern!r} changes nothing with stop_at_layer={stop}: it is computed later")
    return stop


def _after(config: GPT2Config, name: str) -> int:
    """Return how many blocks must run to compute an activation; n_layer + 1 for those of ln_f."""
    layer = layer_of(name)
    return layer + 1 if layer is not None else config.n_layer + 1 if name.startswith("ln_f/") else 0


def _first_after(config: GPT2Config, edit: Edit) -> int:
    """Return how many blocks must run until an edit changes something. Layers that are traced may be any."""
    if edit.name not in IN_BLOCK:
        return _after(config, edit.name)
    if edit.layers is None or isinstance(edit.layers, Tracer):
        return 1
    return int(np.min(np.asarray(edit.layers) % config.n_layer, initial=config.n_layer)) + 1


def as_params(config: GPT2Config, params: Params) -> Params:
    """Check the params against the config, and return them on devices. Arrays of JAX are returned unchanged.

    Raises:
      ValueError: params do not match the config.
    """
    check_params(config, params, dtypes=False)
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf), params)


def places(mask_BT: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    """Return each token's position in its row, [B, T], without padding: 0, 1, ...; -1 at padding.

    Raises:
      ValueError: the mask does not have the tokens' shape.
    """
    mask_BT = jnp.ones(shape, bool) if mask_BT is None else jnp.asarray(mask_BT).astype(bool)
    if mask_BT.shape != shape:
        raise ValueError(f"mask must be bool{shape}, like the tokens, not of shape {mask_BT.shape}")
    return jnp.where(mask_BT, jnp.cumsum(mask_BT, axis=-1) - 1, -1)


def slots(place_BT: jax.Array, at_BP: jax.Array) -> jax.Array:
    """Return the index t of each requested position, [B, P]. The index is T where the row has no such position.

    Args:
      place_BT: the result of `places`.
      at_BP: the positions to find. A negative position gives T.
    """
    here_BPT = (place_BT[:, None] == at_BP[..., None]) & (at_BP[..., None] >= 0)
    return jnp.where(here_BPT.any(-1), here_BPT.argmax(-1), place_BT.shape[1])


Wanted = Literal["logits", "stream", "neither"]


@functools.partial(jax.jit, static_argnames=("model", "names", "stop", "wanted"))
def _forward(
    model: GPT2,
    names: tuple[str, ...],
    stop: int | None,
    wanted: Wanted,
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None,
    cache: KVCache | None,
    changes: Changes,
) -> tuple[Output, dict[str, jax.Array]]:
    how = {"taps": changes.by_name(model.config), "capture": names, "stop_at_layer": stop, "method": "run"}
    stream_BTD, cache, captured = model.apply({"params": params}, tokens_BT, mask_BT, cache, **how)
    logits_BTV = model.apply({"params": params}, stream_BTD, method="unembed") if wanted == "logits" else None
    out = Output(cast(Any, logits_BTV), cache, stream_BTD if wanted == "stream" else None)
    return out, captured
