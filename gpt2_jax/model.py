"""GPT-2 as Flax linen modules, whose parameters have OpenAI's names and shapes.

Shape letters, here and in all files: B batch, T query, S cache slot, D n_embd, N heads, H head width, F mlp width,
V vocab.
Source: openai/gpt-2, src/model.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.errors import InvalidRngError, ScopeParamShapeError
from jax.core import Tracer
from jax.nn.initializers import Initializer, normal, ones, zeros
from jax.sharding import Mesh

from gpt2_jax.activations import NO_TAPS, Tap, Taps, check_names, layer_of, taps_by_name
from gpt2_jax.attention import MASKED_SCORE, attention, causal_attention, open_causal_attention, unchanged
from gpt2_jax.branches import NO_CHANGES, QKV_BRANCHES, qkv_changes, result_change
from gpt2_jax.checks import whole_number
from gpt2_jax.config import GPT2Config
from gpt2_jax.dropout import Dropout
from gpt2_jax.explicit_axes import automatic, on_auto_axes
from gpt2_jax.fused_attention import Padding, fused_attention, kernels
from gpt2_jax.jax_defaults import under_jax_defaults
from gpt2_jax.kv_cache import KVCache, check_cache, write_slots
from gpt2_jax.params import Params, check, flatten, unflatten
from gpt2_jax.products import product
from gpt2_jax.tensor_parallel import divided, n_heads

EPSILON = 1e-5  # the original's value; Flax's default is 1e-6
ACTIVATION_FUNCTIONS = {
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@struct.dataclass
class Output:
    """The result of a forward pass.

    Attributes:
      logits: [B, T, V], float32 (float64 under a float64 `compute_dtype`).
      cache: the cache with this call's tokens added; None if none was passed.
      stream: [B, T, D], the residual stream where `research.forward` was told to stop; else None.
    """

    logits: jax.Array
    cache: KVCache | None = None
    stream: jax.Array | None = None


def param(module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...]) -> jax.Array:
    """Return a module's parameter, as `module.param` does. With this function, tracing a model takes half the time.

    Flax traces the initial values to compare shapes. This function only compares the parameter's shape with `shape`.
    """
    if module.is_initializing() or not module.has_variable("params", name):
        return module.param(name, init, shape, module.config.param_dtype)
    value = module.get_variable("params", name)
    if jnp.shape(value) != shape:
        place = "/".join([*module.path, name])
        raise ScopeParamShapeError(name, place, shape, jnp.shape(value))
    return automatic(value)


class LayerNorm(nn.Module):
    """Layer normalization with biased variance, computed in at least float32."""

    config: GPT2Config

    @nn.compact
    def __call__(self, x_BTD: jax.Array, taps: Taps = NO_TAPS) -> jax.Array:
        """Return x_BTD normalized over D, scaled by `g` and shifted by `b`, in `compute_dtype`."""
        g_D = param(self, "g", ones, (x_BTD.shape[-1],))
        b_D = param(self, "b", zeros, (x_BTD.shape[-1],))
        x_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
        x_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
        variance_BT1 = jnp.square(x_BTD).mean(-1, keepdims=True) + EPSILON
        inverse_BT1 = jax.lax.rsqrt(variance_BT1)
        if taps.on(self, "scale"):
            scale_BT1 = jnp.sqrt(variance_BT1)
            inverse_BT1 = inverse_BT1 * (scale_BT1 / taps(self, "scale", scale_BT1))  # times 1 without a change
        x_BTD = taps(self, "normalized", x_BTD * inverse_BT1)
        return taps(self, "out", (x_BTD * g_D + b_D).astype(self.config.compute_dtype))


class Conv1D(nn.Module):
    """A dense layer, `x @ w + b` with w (in, out). The original calls it a convolution of width 1."""

    config: GPT2Config
    n_out: int
    train_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [..., n_out] for x [..., n_in], in `compute_dtype`."""
        w = param(self, "w", normal(0.02), (x.shape[-1], self.n_out))
        b = param(self, "b", zeros, (self.n_out,))
        if not self.train_bias:
            b = jax.lax.stop_gradient(b)
        dtype = self.config.compute_dtype
        return product(x.astype(dtype), w.astype(dtype)) + b.astype(dtype)


class Attention(nn.Module):
    """Multi-head attention. The columns of c_attn are q, k and v, in this order; `by_heads`: those of each head."""

    config: GPT2Config
    layer: int = 0
    mesh: Mesh | None = None
    by_heads: bool = False

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        mask_BTS: jax.Array,
        kv: tuple[jax.Array, jax.Array] | None,
        start: jax.Array | int,
        past: tuple[jax.Array, jax.Array, jax.Array] | None,
        deterministic: bool,
        taps: Taps,
        padding: Padding | None = None,
        qkv_changes: Mapping[str, jax.Array] = NO_CHANGES,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Attend over the slots of this layer. The T new tokens are written to slots from `start` on.

        Args:
          x_BTD: the normalized residual stream.
          mask_BTS: bool, True where query t may attend to slot s.
          kv: this layer's k_BNHS and v_BNSH of a cache; None means that there are only the T new tokens (S = T).
          start: the first slot to write in `kv`.
          past: k_BNHS, v_BNSH and mask_BTS of earlier slots, if the cache keeps them separately.
          deterministic: True means no dropout.
          taps: functions that read and change activations.
          padding: the padding of the new tokens, as in `mask_BTS`; None if all are real.
          qkv_changes: {"q", "k" or "v": what is added to what this computes, [B, T, N, H]}, from changed branch inputs.

        Returns:
          What attention adds to the residual stream [B, T, D], and the layer's new (k_BNHS, v_BNSH).
        """
        config = self.config
        qkv = dict(zip("qkv", self._qkv(x_BTD), strict=True))
        qkv |= {name: qkv[name] + change_BTNH for name, change_BTNH in qkv_changes.items()}
        q_BTNH, k_BTNH, v_BTNH = (taps(self, *pair) for pair in qkv.items())
        k_BNHS, v_BNSH = k_BTNH.transpose(0, 2, 3, 1), v_BTNH.transpose(0, 2, 1, 3)
        if kv is not None:
            k_BNHS, v_BNSH = write_slots(kv[0], k_BNHS, start, axis=3), write_slots(kv[1], v_BNSH, start, axis=2)
        real = config.n_head if self.by_heads else None
        dropout = functools.partial(Dropout(config.attn_pdrop, real), deterministic=deterministic)
        # A change must not let a token attend to a later one or to padding. So both are masked again behind it.
        see = [
            functools.partial(taps, self, name, masked=masked) if taps.on(self, name) else unchanged
            for name, masked in (("scores", MASKED_SCORE), ("pattern", 0.0))
        ]
        opened, dropped = taps.on(self, "scores", "pattern"), config.attn_pdrop > 0 and not deterministic
        divisor = self.layer + 1 if config.scale_attn_by_inverse_layer_idx else 1
        if past is not None or k_BNHS.shape[-1] != x_BTD.shape[1]:
            z_BTNH = attention(q_BTNH, k_BNHS, v_BNSH, mask_BTS, dropout, past, *see, divisor=divisor)
        # From here on there are only the new tokens: `start` is 0.
        elif platforms := kernels(config, self.mesh, x_BTD.shape[1], padding, bool(taps), opened, dropped):
            z_BTNH = fused_attention(q_BTNH, k_BTNH, v_BTNH, mask_BTS, padding, divisor, platforms, self.mesh)
        elif opened:
            z_BTNH = open_causal_attention(q_BTNH, k_BNHS, v_BNSH, mask_BTS, dropout, *see, divisor=divisor)
        else:
            z_BTNH = causal_attention(q_BTNH, k_BNHS, v_BNSH, mask_BTS, dropout, divisor)
        z_BTNH = taps(self, "z", z_BTNH)
        out_BTD = Conv1D(config, config.n_embd, name="c_proj")(z_BTNH.reshape(*x_BTD.shape[:2], -1))
        if taps.on(self, "result"):
            params = jax.tree.map(automatic, self.variables["params"])
            w_NHD = params["c_proj"]["w"].reshape(*z_BTNH.shape[2:], -1).astype(config.compute_dtype)
            out_BTD = result_change(self, taps, z_BTNH, w_NHD, out_BTD)
        out_BTD = Dropout(config.resid_pdrop)(out_BTD, deterministic)
        return taps(self, "out", out_BTD), (k_BNHS, v_BNSH)

    def _qkv(self, x_BTD: jax.Array) -> list[jax.Array]:
        """Return q_BTNH, k_BTNH and v_BTNH."""
        config, shape = self.config, x_BTD.shape[:2]
        n = n_heads(config, self.mesh) if self.by_heads else config.n_head
        qkv = Conv1D(config, 3 * n * config.head_dim, train_bias=config.qkv_bias, name="c_attn")(x_BTD)
        if not self.by_heads:
            return [part.reshape(*shape, n, config.head_dim) for part in jnp.split(qkv, 3, axis=-1)]
        qkv_BTN3H = divided(qkv.reshape(*shape, n, 3, config.head_dim), self.mesh, parts=2)
        return [qkv_BTN3H[:, :, :, i] for i in range(3)]


class MLP(nn.Module):
    """Two dense layers with an activation function between them, the tanh form of GELU by default. F is 4 D."""

    config: GPT2Config

    @nn.compact
    def __call__(self, x_BTD: jax.Array, deterministic: bool = True, taps: Taps = NO_TAPS) -> jax.Array:
        """Return what the MLP adds to the residual stream [B, T, D]."""
        h_BTF = taps(self, "pre", Conv1D(self.config, 4 * self.config.n_embd, name="c_fc")(x_BTD))
        h_BTF = taps(self, "post", ACTIVATION_FUNCTIONS[self.config.activation_function](h_BTF))
        out_BTD = Conv1D(self.config, self.config.n_embd, name="c_proj")(h_BTF)
        return taps(self, "out", Dropout(self.config.resid_pdrop)(out_BTD, deterministic))


class Block(nn.Module):
    """One pre-norm layer: attention, then MLP. Each is added to the residual stream."""

    config: GPT2Config
    layer: int = 0
    mesh: Mesh | None = None
    by_heads: bool = False

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        mask_BTS: jax.Array,
        kv: tuple[jax.Array, jax.Array] | None = None,
        start: jax.Array | int = 0,
        past: tuple[jax.Array, jax.Array, jax.Array] | None = None,
        deterministic: bool = True,
        taps: Taps = NO_TAPS,
        padding: Padding | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Return the residual stream after this layer, and its new (k_BNHS, v_BNSH). Arguments: see Attention."""
        x_BTD = taps(self, "resid_pre", x_BTD)
        h_BTD = LayerNorm(self.config, name="ln_1")(x_BTD, taps)
        attn = Attention(self.config, self.layer, self.mesh, self.by_heads, name="attn")
        changes = self._branch_changes(x_BTD, taps)
        h_BTD, kv = attn(h_BTD, mask_BTS, kv, start, past, deterministic, taps, padding, changes)
        x_BTD = taps(self, "resid_mid", divided(x_BTD + h_BTD, self.mesh))
        h_BTD = LayerNorm(self.config, name="ln_2")(taps(self, "mlp/in", x_BTD), taps)
        x_BTD = divided(x_BTD + MLP(self.config, name="mlp")(h_BTD, deterministic, taps), self.mesh)
        return taps(self, "resid_post", x_BTD), kv

    def _branch_changes(self, x_BTD: jax.Array, taps: Taps) -> dict[str, jax.Array]:
        """Return what changed inputs of heads change in their queries, keys and values, as Attention takes it."""
        if not taps.on(self, *QKV_BRANCHES):
            return {}
        params = jax.tree.map(automatic, self.variables["params"])

        def normalize(x_BTND: jax.Array) -> jax.Array:
            ln_1: Any = LayerNorm(self.config, parent=None)
            return ln_1.apply({"params": params["ln_1"]}, x_BTND)

        n = n_heads(self.config, self.mesh) if self.by_heads else self.config.n_head
        w_DX = params["attn"]["c_attn"]["w"].astype(self.config.compute_dtype)
        by_kind = (len(w_DX), n, 3, -1) if self.by_heads else (len(w_DX), 3, n, -1)
        w_3DNH = jnp.moveaxis(w_DX.reshape(by_kind), by_kind.index(3), 0)
        return qkv_changes(self, taps, x_BTD, normalize, w_3DNH)


class Score(nn.Module):
    """The head of a classifier: a linear layer without bias."""

    config: GPT2Config

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """Return the logits [..., labels] of hidden states [..., D], at least float32."""
        w = param(self, "w", normal(0.02), (self.config.n_embd, len(self.config.labels)))
        dtype = self.config.compute_dtype
        return product(h.astype(dtype), w.astype(dtype), dtype=jnp.promote_types(dtype, jnp.float32))


class GPT2(nn.Module):
    """The whole model: `GPT2(config).apply({"params": params}, tokens_BT).logits`.

    `__call__` is `hidden`, then `unembed`. Each can be called separately: `apply(..., method="hidden")`.

    On a mesh with Explicit axes, results are divided as the tokens are, the new cache as the given one, and values that
    taps get by rows.

    Attributes:
      config: the hyperparameters.
      remat: rematerialization: keep only the residual stream before each block; the backward pass recomputes the rest.
        "elementwise" also keeps the results of products, so that only elementwise operations and sums are recomputed.
      mesh: the devices that the program runs on, from `make_mesh`. Rows are divided over its axis `data`, and the
        residual stream is not divided over `model`. Fused attention needs it if the process has several accelerators or
        compiles for others.
      by_heads: the params are those of `gpt2_jax.tensor_parallel.by_heads`, and heads are divided over `model`.
    """

    config: GPT2Config
    remat: bool | Literal["elementwise"] = False
    mesh: Mesh | None = None
    by_heads: bool = False

    if TYPE_CHECKING:  # the return type depends on `method`

        def apply(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
            ...

    def setup(self):
        """Declare wte, wpe, h0 ..., ln_f, and lm_head if the head is not tied."""
        config = self.config
        if "float64" in (config.param_dtype.name, config.compute_dtype.name) and not _has_float64():
            raise ValueError('float64 needs jax.config.update("jax_enable_x64", True); without it JAX uses float32')
        self.wte = param(self, "wte", normal(0.02), (config.n_vocab, config.n_embd))
        self.wpe = param(self, "wpe", normal(0.01), (config.n_ctx, config.n_embd))
        for i in range(config.n_layer):
            setattr(self, f"h{i}", Block(config, i, self.mesh, self.by_heads))
        self.ln_f = LayerNorm(config)
        tied = config.tie_word_embeddings
        self.head = self.wte if tied else param(self, "lm_head", normal(0.02), (config.n_vocab, config.n_embd))
        self.embd_dropout = Dropout(config.embd_pdrop)
        if config.labels:
            self.score = Score(config)

    def __call__(
        self,
        tokens_BT: jax.Array,
        mask_BT: jax.Array | None = None,
        cache: KVCache | None = None,
        deterministic: bool = True,
        taps: Mapping[str, Tap] | None = None,
    ) -> Output:
        """Compute the logits of the next token at every position.

        Args:
          tokens_BT: token ids, any integer dtype. A compiled program cannot raise errors. So an id outside the
            vocabulary, a position beyond n_ctx or a full cache gives NaN in its row, not the values of another token.
          mask_BT: bool, True for real tokens; None means all. Padding may be anywhere in a row. Positions count only
            real tokens, and no token attends to padding. So a row gives the same results with and without padding.
          cache: the earlier tokens, from `init_cache` or an earlier call; None means that there are none.
          deterministic: False applies dropout, and needs `rngs={"dropout": key}`.
          taps: {activation name or regular expression: function (value, position_BT) -> new value, or None}.
            position_BT, int32, has the tokens' positions in the row. The result must have the shape of the value, and
            is cast to its dtype. Scores and patterns are masked again behind a tap. `gpt2_jax.activations` lists the
            names. With `remat` a tap must not store its value: `run` captures activations.

        Returns:
          Output with logits [B, T, V] and the new cache.

        Raises:
          ValueError: a shape or dtype does not fit; a call without a mask has more than n_ctx tokens (with a mask,
            padding does not count); the cache fits another model or number of rows, or has fewer slots than tokens; a
            tap has an unknown name, or returns something else than an array of the value's shape.
        """
        h_BTD, cache = self.hidden(tokens_BT, mask_BT, cache, deterministic, taps)
        if self.config.labels and self.is_initializing():
            self.score(h_BTD)
        return Output(logits=self.unembed(h_BTD), cache=cache)

    def hidden(
        self,
        tokens_BT: jax.Array,
        mask_BT: jax.Array | None = None,
        cache: KVCache | None = None,
        deterministic: bool = True,
        taps: Mapping[str, Tap] | None = None,
        right_padded: bool = False,
        segments_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Return the residual stream after ln_f [B, T, D], and the new cache. Arguments: see `__call__` and `run`."""
        how: dict[str, Any] = {"right_padded": right_padded, "segments_BT": segments_BT}
        return self.run(tokens_BT, mask_BT, cache, deterministic, taps, **how)[:2]

    def classify(
        self,
        tokens_BT: jax.Array,
        mask_BT: jax.Array | None = None,
        deterministic: bool = True,
        taps: Mapping[str, Tap] | None = None,
    ) -> jax.Array:
        """Return the logits [B, labels] of a classifier, at least float32. Arguments: see `__call__`.

        Raises:
          ValueError: as `__call__`; or the config has no labels.
        """
        h_BTD, _ = self.hidden(tokens_BT, mask_BT, None, deterministic, taps)
        return self.classify_hidden(h_BTD, jnp.ones(h_BTD.shape[:2], bool) if mask_BT is None else mask_BT)

    @under_jax_defaults
    @on_auto_axes
    def classify_hidden(self, h_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
        """Return the logits [B, labels] of hidden states, whose real tokens are those of the mask."""
        if not self.config.labels:
            raise ValueError("this model is no classifier: its config has no labels")
        return self.score(pooled(h_BTD, mask_BT, self.config.pooling))

    @under_jax_defaults
    @on_auto_axes
    def run(
        self,
        tokens_BT: jax.Array,
        mask_BT: jax.Array | None = None,
        cache: KVCache | None = None,
        deterministic: bool = True,
        taps: Mapping[str, Tap] | None = None,
        right_padded: bool = False,
        capture: Sequence[str] = (),
        stop_at_layer: int | None = None,
        segments_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None, dict[str, jax.Array]]:
        """Return the residual stream after ln_f [B, T, D], the new cache, and captured activations by name.

        Args:
          tokens_BT, mask_BT, cache, deterministic, taps: see `__call__`.
          right_padded: the promise that `mask_BT` has padding only after the tokens of a row. Fused attention on a GPU
            needs this promise.
          capture: the names of activations to return, with their values after the taps.
          stop_at_layer: run only the blocks before this one, and return the residual stream after them, without ln_f.
            0 runs none. None runs all.
          segments_BT: int, several texts in a row ("packing"): the number of the text to which a token belongs, 1 or
            more; 0 is padding. The tokens of a text stand next to each other. They attend only to each other, and their
            positions count from 0. Instead of a mask and a cache.

        Raises:
          ValueError: as `__call__`; a captured activation is not computed; there is a cache, which needs all layers; or
            there are segments together with a mask or a cache.
        """
        stop = self._stop(stop_at_layer, capture, cache)
        if segments_BT is not None:
            if mask_BT is not None or cache is not None:
                raise ValueError("segments_BT replaces mask_BT, and does not work with a cache")
            mask_BT = jnp.asarray(segments_BT) > 0
        padded = mask_BT is not None
        tokens_BT, mask_BT = self._check(tokens_BT, mask_BT, cache, deterministic)
        start, n_tokens_B1 = (0, 0) if cache is None else (cache.length, cache.n_tokens_B[:, None])
        position_BT = jnp.where(mask_BT, n_tokens_B1 + jnp.cumsum(mask_BT, axis=-1) - 1, 0)
        if cache is None:
            mask_BS = mask_BT
        else:
            mask_BS = write_slots(cache.mask_BS, mask_BT, start, axis=1)
            full = start + tokens_BT.shape[1] > cache.n_slots
            position_BT = jnp.where(full, self.config.n_ctx, position_BT)
        mask_BTS = _causal_mask(tokens_BT.shape[1], mask_BS, start)
        if segments_BT is not None:
            position_BT = _positions_in_segments(segments_BT)
            mask_BTS &= segments_BT[:, :, None] == segments_BT[:, None]
        length_B = mask_BT.sum(-1, dtype=jnp.int32) if right_padded else None
        padding = Padding(mask_BT, length_B, segments_BT) if padded else None
        seen = self._taps(taps, capture, position_BT, mask_BS, cache, segments_BT is not None)

        x_BTD = divided(self._embed(tokens_BT, mask_BT, position_BT, seen), self.mesh)
        x_BTD = self.embd_dropout(x_BTD, deterministic)
        new_kv = []

        def block(module: Block, x_BTD, kv, past):
            taps = seen.without_captured()
            x_BTD, kv = module(x_BTD, mask_BTS, kv, start, past, deterministic, taps, padding)
            return x_BTD, kv, taps.captured

        if self.remat:
            policy = jax.checkpoint_policies.dots_saveable if self.remat == "elementwise" else None
            block = nn.remat(block, policy=policy)
        for i in range(stop):
            kv = None if cache is None else (cache.k_BNHS[i], cache.v_BNSH[i])
            past = None
            if cache is not None and cache.past is not None:
                past = (cache.past.k_BNHS[i], cache.past.v_BNSH[i], cache.past.mask_BS[:, None])
            x_BTD, kv, captured = block(getattr(self, f"h{i}"), x_BTD, kv, past)
            new_kv.append(kv)
            seen.captured.update(captured)
        if cache is not None:
            k_BNHS, v_BNSH = zip(*new_kv, strict=True)
            cache = KVCache(k_BNHS, v_BNSH, mask_BS, cache.length + tokens_BT.shape[1], cache.past)
        h_BTD = self.ln_f(x_BTD, seen) if stop_at_layer is None else x_BTD
        return divided(h_BTD, self.mesh), cache, seen.captured

    @under_jax_defaults
    @on_auto_axes
    def unembed(self, h_BTD: jax.Array) -> jax.Array:
        """Return the logits [..., V] of hidden states [..., D]: a product with the output head.

        The head is `wte`, or `lm_head` if the config's tie_word_embeddings is False. Sums are at least float32.
        """
        dtype = self.config.compute_dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        h_BTD = divided(h_BTD, self.mesh)
        return product(h_BTD.astype(dtype), self.head.astype(dtype), transposed=True, dtype=wide)

    @property
    def n_heads(self) -> int:
        """The number of heads of the cache: with `by_heads` it may be more than `config.n_head`."""
        return n_heads(self.config, self.mesh) if self.by_heads else self.config.n_head

    def _stop(self, stop_at_layer: int | None, capture: Sequence[str], cache: KVCache | None) -> int:
        """Return the number of blocks to run."""
        check_names(self.config, capture)
        if stop_at_layer is None:
            return self.config.n_layer
        stop = whole_number("stop_at_layer", stop_at_layer, 0, self.config.n_layer)
        if cache is not None:
            raise ValueError(
                "stop_at_layer needs a pass without cache: a cache holds the keys and values of all layers"
            )
        for name in capture:
            layer = layer_of(name)
            if name.startswith("ln_f/") or (layer is not None and layer >= stop):
                raise ValueError(f"{name} cannot be captured with stop_at_layer={stop}: it is computed later")
        return stop

    def _taps(
        self,
        taps: Mapping[str, Tap] | None,
        capture: Sequence[str],
        position_BT: jax.Array,
        mask_BS: jax.Array,
        cache: KVCache | None,
        in_segments: bool,
    ) -> Taps:
        if not taps and not capture:
            return NO_TAPS
        masks = [mask_BS] if cache is None or cache.past is None else [cache.past.mask_BS, mask_BS]
        mask_BS = jnp.concatenate(masks, axis=1)
        key_position_BS = position_BT if in_segments else jnp.cumsum(mask_BS, axis=-1) - 1
        key_position_BS = jnp.where(mask_BS, key_position_BS, -1)
        by_name = taps_by_name(self.config, taps or {})
        return Taps(by_name, capture, (position_BT, key_position_BS), n_outer=len(self.path))

    def _embed(self, tokens_BT: jax.Array, mask_BT: jax.Array, position_BT: jax.Array, taps: Taps) -> jax.Array:
        known_BT = (tokens_BT >= 0) & (tokens_BT < self.config.n_vocab)
        tokens_BT = jnp.where(known_BT, tokens_BT, self.config.n_vocab)
        # Padding may hold any id, such as -1. It must not become NaN: 0 * NaN would spread over its row.
        tokens_BT = jnp.where(mask_BT, tokens_BT, 0)
        embed_BTD = taps(self, "embed", _rows(self.wte, tokens_BT))
        pos_embed_BTD = taps(self, "pos_embed", _rows(self.wpe, position_BT))
        dtype = self.config.compute_dtype
        wide = jnp.promote_types(self.config.param_dtype, dtype)  # float16 weights may be computed with in float32
        return (embed_BTD.astype(wide) + pos_embed_BTD.astype(wide)).astype(dtype)

    def _check(
        self, tokens_BT: jax.Array, mask_BT: jax.Array | None, cache: KVCache | None, deterministic: bool
    ) -> tuple[jax.Array, jax.Array]:
        given = tokens_BT if isinstance(tokens_BT, jax.Array) else np.asarray(tokens_BT)
        if given.ndim != 2 or not jnp.issubdtype(given.dtype, jnp.integer):
            raise ValueError(f"tokens must be whole numbers of shape [B, T], not {given.dtype}{given.shape}")
        if isinstance(given, np.ndarray):  # JAX would cut 64 bits to 32, and read another token
            given = np.clip(given.astype(np.int64), -1, self.config.n_vocab)
        tokens_BT = jnp.asarray(given)
        tokens_BT = tokens_BT.astype(jnp.promote_types(tokens_BT.dtype, jnp.int32))
        if mask_BT is None:
            if tokens_BT.shape[1] > self.config.n_ctx:
                raise ValueError(f"{tokens_BT.shape[1]} tokens do not fit the model's n_ctx of {self.config.n_ctx}")
            mask_BT = jnp.ones(tokens_BT.shape, bool)
        mask_BT = jnp.asarray(mask_BT)
        if mask_BT.shape != tokens_BT.shape or jnp.issubdtype(mask_BT.dtype, jnp.floating):
            raise ValueError(f"mask must be bool{tokens_BT.shape}, like the tokens, not {mask_BT.dtype}{mask_BT.shape}")
        if cache is not None:
            n_rows, n_tokens = tokens_BT.shape
            check_cache(cache, self.config, n_rows, n_tokens, self.n_heads)
        if not deterministic and not self.has_rng("dropout"):
            raise ValueError('dropout (deterministic=False) needs a key: apply(..., rngs={"dropout": key})')
        return tokens_BT, mask_BT.astype(bool)


def _causal_mask(n_queries: int, mask_BS: jax.Array, start: jax.Array | int) -> jax.Array:
    """Return mask_BTS: query t, in slot start + t, attends to the real tokens up to its own slot."""
    query_T = start + jnp.arange(n_queries)
    slot_S = jnp.arange(mask_BS.shape[1])
    return (slot_S <= query_T[:, None]) & mask_BS[:, None, :]


def _positions_in_segments(segments_BT: jax.Array) -> jax.Array:
    """Return the position of each token in its segment; 0 for padding."""
    place_T = jnp.arange(segments_BT.shape[1])
    begins_BT = jnp.diff(segments_BT, axis=1, prepend=-1) != 0
    position_BT = place_T - jax.lax.cummax(jnp.where(begins_BT, place_T, 0), axis=1)
    return jnp.where(segments_BT > 0, position_BT, 0)


def pooled(h_BTD: jax.Array, mask_BT: jax.Array, pooling: str) -> jax.Array:
    """Return what a classifier's head reads of each row [B, D]: see `GPT2Config.pooling`. Sums are at least float32."""
    n_tokens = h_BTD.shape[1]
    if pooling == "mean":
        weight_BT = mask_BT / jnp.maximum(mask_BT.sum(-1, keepdims=True), 1)
        wide = jnp.promote_types(h_BTD.dtype, jnp.float32)
        return jnp.einsum("BT,BTD->BD", weight_BT.astype(wide), h_BTD.astype(wide)).astype(h_BTD.dtype)
    ends_B = n_tokens - 1 - jnp.argmax(mask_BT[:, ::-1], axis=1)
    index_B = jnp.argmax(mask_BT, axis=1) if pooling == "first" else ends_B
    return jnp.take_along_axis(h_BTD, index_B[:, None, None], axis=1)[:, 0]


def _rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """Return table[index], with NaN for an index outside the table, which JAX's indexing would clamp or wrap."""
    return jnp.asarray(table).at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _has_float64() -> bool:
    return jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]  JAX defines it at import


@under_jax_defaults
def init_params(config: GPT2Config, key: jax.Array) -> Params:
    """Return new params with the original's initial values: w and wte N(0, 0.02), wpe N(0, 0.01), b 0, g 1.

    N(m, s) is the normal distribution with mean m and standard deviation s. An untied lm_head is N(0, 0.02).

    Raises:
      ValueError: `key` is not a key (`jax.random.key(seed)`).
    """
    try:
        return dict(GPT2(config).init(key, jnp.zeros((1, 1), jnp.int32)))["params"]
    except InvalidRngError as error:
        raise ValueError(f"key must be a key, jax.random.key(seed), not {key!r}") from error


def abstract_params(config: GPT2Config) -> Params:
    """Return the params tree with jax.ShapeDtypeStruct leaves: names, shapes and dtypes without memory."""
    return unflatten(_abstract_leaves(config, _has_float64()))


@functools.lru_cache
def _abstract_leaves(config: GPT2Config, x64: bool) -> Mapping[str, jax.ShapeDtypeStruct]:
    one = config.replace(n_layer=1)  # all layers are alike, and tracing 48 of them takes seconds
    tree = jax.eval_shape(lambda: init_params(one, jax.random.key(0)))
    flat = flatten({**tree, **{f"h{i}": tree["h0"] for i in range(config.n_layer)}})
    # New structs: the traced leaves have the sharding of a mesh, if one is set.
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flat.items()}


def check_params(config: GPT2Config, params: Params, dtypes: bool = True) -> None:
    """Check that params match the config in names, shapes and dtypes; `dtypes=False` accepts any float dtypes.

    Raises:
      ValueError: they do not match; the message lists all that is missing, extra, or of another shape or dtype. Or
        `config.qkv_bias` is False, and the biases of a c_attn are not zero (checked if their values are known).
    """
    check(params, _abstract_leaves(config, _has_float64()), dtypes)
    for i in range(0 if config.qkv_bias else config.n_layer):
        b = params[f"h{i}"]["attn"]["c_attn"]["b"]
        if not isinstance(b, Tracer | jax.ShapeDtypeStruct) and (b != 0).any():
            raise ValueError(
                f"the config says qkv_bias=False, but h{i}/attn/c_attn/b is not zero: these weights, like all the "
                "released ones, have query, key and value biases; set qkv_bias=True"
            )
