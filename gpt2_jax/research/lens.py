"""The logit lens: what each layer's residual stream predicts if it is read like the last one.

The stream after each layer goes through ln_f and the output head, as if no layer followed (nostalgebraist 2020,
"interpreting GPT: the logit lens").

Shape letters: B batch, T query, D n_embd, V vocab, L activations read, K tokens kept.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import struct

from gpt2_jax.activations import Tap, axes, select
from gpt2_jax.changes import Changes
from gpt2_jax.checks import whole_number
from gpt2_jax.config import GPT2Config
from gpt2_jax.edits import Edit
from gpt2_jax.explicit_axes import on_auto_axes, whole_on_auto_axes
from gpt2_jax.jax_defaults import may_return_nan, under_jax_defaults
from gpt2_jax.model import GPT2
from gpt2_jax.params import Params
from gpt2_jax.research._changes import changes_of
from gpt2_jax.research._forward import as_params, as_tokens, places

STREAM = ("^h0/resid_pre$", "/resid_post$")
CHUNK = 256  # positions whose logits are in memory at a time: 51 MB of float32 for 50,257 tokens


@struct.dataclass
class Lens:
    """What each activation predicts at each position.

    Some values are NaN by design. In a `jit` of your own that returns them, `jax_debug_nans` raises an error.

    Attributes:
      names: the names of the L activations, in the order of computation.
      ids: int32 [L, B, T, K], the most likely tokens, the most likely first.
      logprobs: [L, B, T, K], their log-probabilities, base e, at least float32.
      next_logprobs: [L, B, T], the log-probability of the next token of the row; NaN at the last token and at padding.
      next_ranks: int32 [L, B, T], how many tokens are more likely than the next token of the row: 0 means that it is
        the prediction. -1 at the last token, at padding, and where logits are NaN.
    """

    names: tuple[str, ...] = struct.field(pytree_node=False)
    ids: jax.Array
    logprobs: jax.Array
    next_logprobs: jax.Array
    next_ranks: jax.Array


@struct.dataclass
class Translators:
    """Affine maps of some activations into the basis of the last residual stream: x + x @ w + b. It is a pytree.

    Attributes:
      names: the names of the L activations.
      w_LDD: [L, D, D]; 0 changes nothing.
      b_LD: [L, D].
    """

    names: tuple[str, ...] = struct.field(pytree_node=False)
    w_LDD: jax.Array
    b_LD: jax.Array

    @under_jax_defaults
    def __call__(self, name: str, stream: jax.Array) -> jax.Array:
        """Return an activation [..., D] in the basis of the last stream. One without a translator is unchanged."""
        if name not in self.names:
            return stream
        i = self.names.index(name)
        return Translators((name,), self.w_LDD[i], self.b_LD[i]).translate(stream)

    def translate(self, stream: jax.Array) -> jax.Array:
        """Return stream + stream @ w + b, with w [D, D] and b [D] of one activation."""
        with jax.default_matmul_precision("highest"):
            return stream + (stream @ self.w_LDD + self.b_LD)


@may_return_nan
@whole_on_auto_axes
def logit_lens(
    config: GPT2Config,
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None = None,
    *,
    names: str | Sequence[str] = STREAM,
    k: int = 5,
    edits: Edit | Sequence[Edit] = (),
    taps: Mapping[str, Tap] | None = None,
    translators: Translators | None = None,
) -> Lens:
    """Read the residual stream of every layer as a prediction: the k most likely next tokens, and the true one.

    One compiled program does it, with the logits of `CHUNK` positions in memory at a time. `stream_logits` returns all
    logits of one activation.

    Args:
      config, params: the model.
      tokens_BT, mask_BT: as `forward` takes them.
      names: regular expressions, like `capture` of `forward`, of the activations [B, T, D] to read. The default is
        h0/resid_pre, which is the embeddings, and each layer's resid_post. The last one gives the model's output.
      k: how many tokens to keep.
      edits, taps: as `forward` takes them. A change of ln_f does not apply to the lens itself.
      translators: maps of activations before they are read: the tuned lens, from `train_tuned_lens`.

    Raises:
      ValueError: as `forward`; an activation is not [B, T, D]; k is not from 1 to n_vocab; or translators do not fit.
    """
    tokens_BT, params = as_tokens(config, tokens_BT), as_params(config, params)
    changes = changes_of(config, edits, taps, tokens_BT, mask_BT)
    k = whole_number("k", k, 1, config.n_vocab)
    names = tuple(select(config, names))
    for name in names:
        if axes(name) != "BTD":
            raise ValueError(f"{name} cannot be read as the residual stream: its axes are {axes(name)}, not BTD")
    if translators is not None and translators.w_LDD.shape[1:] != (config.n_embd, config.n_embd):
        raise ValueError(f"the translators are {translators.b_LD.shape[-1]} wide, not {config.n_embd} (n_embd)")
    return Lens(names, **_read(config, names, k, params, tokens_BT, mask_BT, changes, translators))


@under_jax_defaults
def stream_logits(config: GPT2Config, params: Params, stream_BTD: jax.Array) -> jax.Array:
    """Return the logits [B, T, V] of a residual stream, read through ln_f and the head like the model's last one.

    Args:
      config, params: the model.
      stream_BTD: an activation that `forward` captured, or any other array [..., D].

    Raises:
      ValueError: params do not match the config, or the stream is not n_embd wide.
    """
    params, stream_BTD = as_params(config, params), jnp.asarray(stream_BTD)
    if stream_BTD.shape[-1:] != (config.n_embd,):
        raise ValueError(f"the stream must have the shape [..., {config.n_embd}] (n_embd), not {stream_BTD.shape}")
    return _logits(config, params, stream_BTD)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: GPT2Config, params: Params, stream: jax.Array) -> jax.Array:
    return GPT2(config).apply({"params": params}, stream, method=_read_out)


@on_auto_axes
def _read_out(model: GPT2, x: jax.Array) -> jax.Array:
    return model.unembed(model.ln_f(x))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _read(
    config: GPT2Config,
    names: tuple[str, ...],
    k: int,
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None,
    changes: Changes,
    translators: Translators | None = None,
) -> dict[str, jax.Array]:
    run = {"taps": changes.by_name(config), "capture": names, "method": "run"}
    _, _, captured = GPT2(config).apply({"params": params}, tokens_BT, mask_BT, **run)
    streams = [captured[name] if translators is None else translators(name, captured[name]) for name in names]
    stream_LBTD = jnp.stack(streams)
    next_LBT = jnp.broadcast_to(_next_tokens(tokens_BT, mask_BT), stream_LBTD.shape[:-1])

    def read(place: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        stream_D, token = place
        logits_V = _logits(config, params, stream_D)
        total = jax.nn.logsumexp(logits_V)
        best_K, ids_K = jax.lax.top_k(logits_V, k)
        known = (token >= 0) & (token < config.n_vocab)
        logit = jnp.where(known, logits_V[token], jnp.nan)
        rank = jnp.where(jnp.isnan(logit - total), -1, (logits_V > logit).sum())
        return {"ids": ids_K, "logprobs": best_K - total, "next_logprobs": logit - total, "next_ranks": rank}

    places = stream_LBTD.reshape(-1, config.n_embd), next_LBT.reshape(-1)
    found = jax.lax.map(read, places, batch_size=CHUNK)
    return {name: values.reshape(*next_LBT.shape, *values.shape[1:]) for name, values in found.items()}


def _next_tokens(tokens_BT: jax.Array, mask_BT: jax.Array | None) -> jax.Array:
    """Return the real token after each one in its row, int32; -1 where there is none, and at padding."""
    n_tokens = tokens_BT.shape[1]
    mask_BT = places(mask_BT, tokens_BT.shape) >= 0
    nearest_BT = jax.lax.cummin(jnp.where(mask_BT, jnp.arange(n_tokens), n_tokens), axis=1, reverse=True)
    next_BT = jnp.pad(nearest_BT[:, 1:], [(0, 0), (0, 1)], constant_values=n_tokens)
    token_BT = jnp.take_along_axis(tokens_BT, next_BT, axis=1, mode="fill", fill_value=-1)
    return jnp.where(mask_BT, token_BT.astype(jnp.int32), -1)
