"""The forward pass that captures activations by name and applies edits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.activations import Tap, select
from gpt2_jax.config import GPT2Config
from gpt2_jax.edits import Edit, check_edits, taps_of
from gpt2_jax.generation.prompts import check_prompt
from gpt2_jax.jax_defaults import under_jax_defaults
from gpt2_jax.kv_cache import KVCache
from gpt2_jax.model import GPT2, Output, check_params
from gpt2_jax.params import Params


@under_jax_defaults
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
    r"""Run the model and return the requested activations: `forward(config, params, tokens, capture="resid_post$")`.

    It compiles once for each config, shape, set of captured names and kinds of edits. Other values, positions and heads
    compile nothing. The program does not keep activations that you did not request. You can also call it under `jit`,
    `vmap` and `grad`. If your own `jit` drops the logits [B, T, V], XLA does not compute what only they need.

    An edit that changes nothing gives bit-identical results in float32 and float64. There is one exception: an edit of
    attn/scores if sqrt(head width) is not a power of two (it is 8 in all released sizes). Then XLA may skip a rounding
    in the run without the edit. In bfloat16 the bits may differ too, because XLA may keep whole sums in float32.

    Args:
      config: the model's config.
      params: the model's params, as `load` returns them. Nothing is folded, centered or renamed.
      tokens_BT: token ids.
      mask_BT: bool, True for real tokens. Padding may be anywhere in a row. None means that all tokens are real.
      capture: one regular expression or several. Activations whose names match one are returned, with their values
        after the edits. ".*" returns all of them, which takes much memory: [B, N, T, T] twice per layer.
      edits: made with `replace`, `add`, `scale` or `patch`. Several edits of one activation apply in order.
      cache: the KV cache of the tokens before, as GPT2 takes it.

    Returns:
      Output with the logits [B, T, V], and {name: activation} in the order of computation. See
      `gpt2_jax.activations.AXES` for the meaning and the axes of each activation.

    Raises:
      ValueError: as GPT2; a pattern matches no activation name; or an edit does not fit.
    """
    tokens_BT, params = as_tokens(config, tokens_BT), as_params(config, params)
    names = tuple(select(config, capture)) if capture else ()
    edits = check_edits(config, edits)
    out, captured = _forward(GPT2(config), names, params, tokens_BT, mask_BT, cache, edits)
    return out, {name: captured[name] for name in names}  # jit sorts a dict by its keys


def as_tokens(config: GPT2Config, tokens_BT: jax.Array | Sequence[Sequence[int]]) -> jax.Array:
    """Return token ids as an array [B, T]. Ids in lists and NumPy arrays are checked; ids in a JAX array are not.

    Raises:
      ValueError: not rows of ids of the vocabulary, or rows of different lengths.
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
        raise ValueError(f"the rows of tokens have {lengths} ids: pad them to one length, and pass mask_BT")
    return cast(jax.Array, np.stack(rows).astype(np.int32))  # jit takes NumPy arrays


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
    """Return a tap that stores the activation after the edits."""

    def keep(value: jax.Array, position_BT: jax.Array) -> jax.Array:
        captured[name] = value if tap is None else tap(value, position_BT)
        return captured[name]

    return keep
