"""The forward pass with eyes and hands: activations out by name, edits in."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gpt2_jax.activations import Tap, select
from gpt2_jax.config import GPT2Config
from gpt2_jax.edits import Edit, check_edits, taps_of
from gpt2_jax.generation.prompts import check_prompt
from gpt2_jax.kv_cache import KVCache
from gpt2_jax.model import GPT2, Output, check_params
from gpt2_jax.params import Params
from gpt2_jax.sharding import placed


def forward(
    config: GPT2Config,
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None = None,
    *,
    capture: str | Sequence[str] = (),
    edits: Edit | Sequence[Edit] = (),
    cache: KVCache | None = None,
) -> tuple[Output, dict[str, jax.Array]]:
    r"""Run the model, and return the activations asked for: `forward(config, params, tokens, capture="resid_post$")`.

    Compiled once for each config, shape, choice of names and kinds of edits: other values, positions and heads compile
    nothing. Of the activations, what is not asked for is in no program. It may be called under `jit`, `vmap` and `grad`
    too; a `jit` of yours that drops the logits [B, T, V] drops all that only they need.

    An edit that changes nothing gives the very same bits in float32 and float64, but for one of attn/scores where
    sqrt(head width) is no power of two (it is 8 in all released sizes): there XLA may leave a rounding out where nobody
    looks, and in bfloat16 it may keep whole sums in float32.

    Args:
      config: the model's hyperparameters.
      params: its parameters, as `load` gives them; nothing is folded, centred or renamed.
      tokens_BT: token ids.
      mask_BT: bool, True for real tokens, wherever the padding stands; None means all.
      capture: a regular expression, or several; activations in whose names one is found are returned, as they are
        behind the edits. ".*" is all of them, which is much memory: [B, N, T, T] twice a layer.
      edits: what to change on the way: `replace`, `add`, `scale`, `patch`. Those of one activation are made in turn.
      cache: what came before, as GPT2 takes it.

    Returns:
      Output with the logits [B, T, V], and {name: activation} in the order of computation; `gpt2_jax.activations.AXES`
      says what each is, and its axes.

    Raises:
      ValueError: as GPT2, a pattern that is found in no name, or an edit that does not fit.
    """
    tokens_BT, params = as_tokens(config, tokens_BT), as_params(config, params)
    names = tuple(select(config, capture)) if capture else ()
    edits = check_edits(config, edits)
    out, captured = _forward(GPT2(config), names, params, tokens_BT, mask_BT, cache, edits)
    return out, {name: captured[name] for name in names}  # a program gives them by the alphabet


def as_tokens(config: GPT2Config, tokens_BT: jax.Array | Sequence[Sequence[int]]) -> jax.Array:
    """Return token ids as an array [B, T]; of lists and NumPy arrays each id is checked, in a program none can be.

    Raises:
      ValueError: not rows of ids of the vocabulary, or rows of several lengths.
    """
    if isinstance(tokens_BT, jax.Array):
        if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
            raise ValueError(f"tokens must be whole numbers of shape [B, T], not {tokens_BT.dtype}{tokens_BT.shape}")
        return tokens_BT
    if not hasattr(tokens_BT, "__len__") or len(tokens_BT) == 0:
        raise ValueError(f"tokens must be rows of ids, [B, T], not {tokens_BT!r}")
    if np.ndim(tokens_BT[0]) == 0:
        raise ValueError("tokens must be rows of ids, [B, T], not one row: put it into a list, [ids]")
    rows = [check_prompt(config, f"tokens[{b}]", row) for b, row in enumerate(tokens_BT)]
    if len({len(row) for row in rows}) > 1:
        lengths = ", ".join(str(len(row)) for row in rows)
        raise ValueError(f"the rows of tokens have {lengths} ids: pad them to one length, and say where in mask_BT")
    return cast(jax.Array, np.stack(rows).astype(np.int32))  # programs take NumPy's arrays as they are


def as_params(config: GPT2Config, params: Params) -> Params:
    """Return the params of this config, on devices unless they are being traced.

    Raises:
      ValueError: they are not those of this config.
    """
    check_params(config, params, dtypes=False)
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(params))
    return params if traced else placed(params)


def places(mask_BT: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    """Return the place of each token in its row, [B, T], padding left out: 0, 1, ...; -1 at padding.

    Raises:
      ValueError: a mask of another shape than the tokens'.
    """
    mask_BT = jnp.ones(shape, bool) if mask_BT is None else jnp.asarray(mask_BT).astype(bool)
    if mask_BT.shape != shape:
        raise ValueError(f"mask must be bool{shape}, as the tokens, not of shape {mask_BT.shape}")
    return jnp.where(mask_BT, jnp.cumsum(mask_BT, axis=-1) - 1, -1)


def slots(place_BT: jax.Array, at_BP: jax.Array) -> jax.Array:
    """Return the slot t at which each row has a place, [B, P]; T, which is none, where it has no token there.

    Args:
      place_BT: of `places`.
      at_BP: the places to find; a negative one is nowhere.
    """
    here_BPT = (place_BT[:, None] == at_BP[..., None]) & (at_BP[..., None] >= 0)
    return jnp.where(here_BPT.any(-1), here_BPT.argmax(-1), place_BT.shape[1])


@functools.partial(jax.jit, static_argnames=("model", "names"))
def _forward(
    model: GPT2,
    names: tuple[str, ...],
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None,
    cache: KVCache | None,
    edits: tuple[Edit, ...],
) -> tuple[Output, dict[str, jax.Array]]:
    captured: dict[str, jax.Array] = {}
    taps = taps_of(edits)
    taps.update({name: _keep(captured, name, taps.get(name)) for name in names})
    out = model.apply({"params": params}, tokens_BT, mask_BT, cache, taps=taps)
    return out, captured


def _keep(captured: dict[str, jax.Array], name: str, tap: Tap | None) -> Tap:
    """Return a tap that notes what goes on."""

    def keep(value: jax.Array, position_BT: jax.Array) -> jax.Array:
        captured[name] = value if tap is None else tap(value, position_BT)
        return captured[name]

    return keep
