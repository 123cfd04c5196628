"""What attention heads attend to: scores that find induction heads and the heads that these build on.

Shape letters: B batch, T query token, S key token, L layers, N heads.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gpt2_jax.activations import Tap
from gpt2_jax.changes import Changes
from gpt2_jax.checks import whole_number
from gpt2_jax.config import GPT2Config
from gpt2_jax.edits import Edit
from gpt2_jax.explicit_axes import whole_on_auto_axes
from gpt2_jax.jax_defaults import may_return_nan, under_jax_defaults
from gpt2_jax.model import GPT2
from gpt2_jax.params import Params
from gpt2_jax.research._changes import changes_of
from gpt2_jax.research._forward import as_params, as_tokens, places


@struct.dataclass
class HeadScores:
    """How much of its attention each head gives to certain tokens: [L, N], 0 to 1.

    A score is the mean over the query tokens that have such a token before them. It is NaN where none has; in a `jit`
    of your own, `jax_debug_nans` raises an error for it. See Olsson et al. 2022, "In-context Learning and Induction
    Heads".

    Attributes:
      previous: attention to the token before the query token.
      duplicate: attention to earlier tokens that are equal to the query token.
      induction: attention to tokens that directly follow an earlier token equal to the query token.
    """

    previous: jax.Array
    duplicate: jax.Array
    induction: jax.Array


@may_return_nan
@whole_on_auto_axes
def head_scores(
    config: GPT2Config,
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None = None,
    *,
    edits: Edit | Sequence[Edit] = (),
    taps: Mapping[str, Tap] | None = None,
) -> HeadScores:
    """Score every head as a previous-token, duplicate-token and induction head, in one pass.

    In the rows of `repeated_tokens`, each token of the second copy has one equal token before it. There the scores are
    the usual ones. In ordinary text, a token's attention to several such tokens is summed.

    Args:
      config, params: the model.
      tokens_BT, mask_BT, edits, taps: as `forward` takes them. Padding is ignored.

    Raises:
      ValueError: as `forward`.
    """
    tokens_BT, params = as_tokens(config, tokens_BT), as_params(config, params)
    changes = changes_of(config, edits, taps, tokens_BT, mask_BT)
    return HeadScores(**_head_scores(config, params, tokens_BT, mask_BT, changes))


@may_return_nan
@whole_on_auto_axes
def mean_attention(
    config: GPT2Config,
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None = None,
    *,
    to: Mapping[str, Any],
    edits: Edit | Sequence[Edit] = (),
    taps: Mapping[str, Tap] | None = None,
) -> dict[str, jax.Array]:
    """Return {name: [L, N]}: how much of its attention each head gives to tokens that you choose.

    The patterns of only one layer are in memory at a time.

    Args:
      config, params: the model.
      tokens_BT, mask_BT, edits, taps: as `forward` takes them.
      to: {name: bool [B, T, S] or [T, S]}, True where query token t counts its attention to key token s.

    Returns:
      For each name, the mean over query tokens of the summed attention to their chosen key tokens. Only query tokens
      with a chosen key token that they can see count. Padding is ignored. NaN where no query token counts.

    Raises:
      ValueError: as `forward`, or an array of `to` has another shape or dtype.
    """
    tokens_BT, params = as_tokens(config, tokens_BT), as_params(config, params)
    changes = changes_of(config, edits, taps, tokens_BT, mask_BT)
    shape = (*jnp.shape(tokens_BT), jnp.shape(tokens_BT)[1])
    to = {name: jnp.asarray(chosen) for name, chosen in to.items()}
    for name, chosen in to.items():
        if chosen.dtype != bool or chosen.shape not in (shape, shape[1:]):
            raise ValueError(f"to[{name!r}] must be bool{list(shape)}, not {chosen.dtype}{list(chosen.shape)}")
    found = _mean_attention(config, params, tokens_BT, mask_BT, to, changes)
    return {name: found[name] for name in to}


@under_jax_defaults
def repeated_tokens(
    config: GPT2Config, key: jax.Array, n_rows: int, n_tokens: int, first: int | None = None
) -> jax.Array:
    """Return rows of random tokens, each row written twice: int32 [n_rows, 2 n_tokens].

    Only the first copy helps to predict the second copy. Knowledge of ordinary text does not help.

    Args:
      config: the model's config.
      key: `jax.random.key(seed)`.
      n_rows: how many rows.
      n_tokens: how many tokens in one copy. They all differ from one another and from `first`.
      first: a token id to put before both copies, in one more column. For released models use the end-of-text token,
        which starts their texts.

    Raises:
      ValueError: the vocabulary or n_ctx is too small, or an argument is not a valid number or key.
    """
    n_rows, n_tokens = whole_number("n_rows", n_rows, 1), whole_number("n_tokens", n_tokens, 1)
    start = [] if first is None else [whole_number("first", first, 0, config.n_vocab - 1)]
    if n_tokens + len(start) > config.n_vocab or 2 * n_tokens + len(start) > config.n_ctx:
        raise ValueError(
            f"two copies of {n_tokens} different tokens do not fit the model's n_vocab of {config.n_vocab} and n_ctx "
            f"of {config.n_ctx}: ask for fewer tokens"
        )
    try:
        keys = jax.random.split(key, n_rows)
    except TypeError as error:
        raise ValueError(f"key must be a key, jax.random.key(seed), not {key!r}") from error
    ids = jnp.delete(jnp.arange(config.n_vocab), jnp.array(start, int), assume_unique_indices=True)
    once = jax.vmap(lambda key: jax.random.permutation(key, ids)[:n_tokens])(keys)
    return jnp.concatenate([jnp.full((n_rows, len(start)), first or 0), once, once], axis=1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def _head_scores(
    config: GPT2Config, params: Params, tokens_BT: jax.Array, mask_BT: jax.Array | None, changes: Changes
) -> dict[str, jax.Array]:
    tokens_BT = jnp.asarray(tokens_BT)
    place_BT, before_BT = places(mask_BT, tokens_BT.shape), _tokens_before(tokens_BT, mask_BT)
    to = {
        "previous": place_BT[:, None, :] == place_BT[:, :, None] - 1,
        "duplicate": tokens_BT[:, None, :] == tokens_BT[:, :, None],
        "induction": before_BT[:, None, :] == tokens_BT[:, :, None],
    }
    itself = jnp.eye(tokens_BT.shape[1], dtype=bool)  # every token is its own duplicate
    to = {name: chosen & ~itself for name, chosen in to.items()}
    return _mean_attention(config, params, tokens_BT, mask_BT, to, changes)


@functools.partial(jax.jit, static_argnums=0)
def _mean_attention(
    config: GPT2Config,
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None,
    to: dict[str, jax.Array],
    changes: Changes,
) -> dict[str, jax.Array]:
    # The reductions are in the same program, so the next layer's pattern can use the same memory.
    names = tuple(f"h{layer}/attn/pattern" for layer in range(config.n_layer))
    run = {"taps": changes.by_name(config), "capture": names, "method": "run"}
    _, _, captured = GPT2(config).apply({"params": params}, tokens_BT, mask_BT, **run)
    pattern_LBNTS = [captured[name] for name in names]
    place_BT = places(mask_BT, tokens_BT.shape)
    seen_BTS = (place_BT[:, None, :] >= 0) & (place_BT[:, None, :] <= place_BT[:, :, None])
    found = {}
    for name, chosen in to.items():
        chosen_BTS = chosen & seen_BTS
        count = chosen_BTS.any(-1).sum()
        sums = [
            jnp.einsum("BNTS,BTS->N", pattern, chosen_BTS.astype(pattern.dtype), precision="highest")
            for pattern in pattern_LBNTS
        ]
        found[name] = jnp.stack(sums) / count
    return found


def _tokens_before(tokens_BT: jax.Array, mask_BT: jax.Array | None) -> jax.Array:
    """Return the real token before each one in its row, or -1, which is not a token id, where there is none."""
    n_tokens = tokens_BT.shape[1]
    slot_BT = jnp.where(places(mask_BT, tokens_BT.shape) < 0, -1, jnp.arange(n_tokens))
    before_BT = jnp.pad(jax.lax.cummax(slot_BT, axis=1)[:, :-1], [(0, 0), (1, 0)], constant_values=-1)
    before_BT = jnp.where(before_BT < 0, n_tokens, before_BT)  # past the row: a negative index would wrap
    return jnp.take_along_axis(tokens_BT, before_BT, axis=1, mode="fill", fill_value=-1)
