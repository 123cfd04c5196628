"""Fold LayerNorm's parameters and value biases into other weights, and center weights. Probabilities do not change.

Nothing in the package does this on its own. Each function returns weights of a GPT-2, and rounds the new weights to the
dtype of the old ones. So fold float32 weights, and cast afterwards. `process_weights` does all of it, in the order of
TransformerLens's defaults.

Why these changes are free. Every reader of the residual stream is a LayerNorm, which subtracts the mean over D. So what
is written to the stream may be centered over D. With g = 1 and b = 0, LayerNorm's output has the mean 0 over D. So the
rows of a matrix that reads it may be centered over D too.

The output head of GPT-2 is tied: `wte` is also the embedding. Its rows also multiply ln_f's output, whose sum over D is
not 0. So `wte` is centered over D only in a model whose head is not tied: `untie_head` makes one. ln_f keeps its g and
b in all models, because GPT-2's head has no bias that could take b: `unembedding` returns them folded into a matrix and
a bias.

Shape letters: B batch, T query, D n_embd, V vocab.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from gpt2_jax.config import GPT2Config
from gpt2_jax.explicit_axes import whole_on_auto_axes
from gpt2_jax.jax_defaults import under_jax_defaults
from gpt2_jax.params import Params, flatten, output_head, unflatten
from gpt2_jax.research.trees import flat_of, module_of, product, wide

READERS = {"ln_1": "attn/c_attn", "ln_2": "mlp/c_fc"}  # only this layer reads the norm's output
WRITERS = ("attn/c_proj", "mlp/c_proj")


@under_jax_defaults
@whole_on_auto_axes
def process_weights(config: GPT2Config, params: Params) -> tuple[GPT2Config, Params]:
    """Change the weights as TransformerLens does by default. Logits decrease by their mean at each position.

    It is `untie_head`, `fold_layer_norm`, `center_reading_weights`, `center_writing_weights`, `fold_value_biases` and
    `center_unembed`, in this order. The activations, parts of logits and scores of the new model are those of a
    processed model of TransformerLens. `unembedding` returns its W_U and b_U.

    Returns:
      The config with tie_word_embeddings=False, and its params, with an `lm_head`.

    Raises:
      ValueError: as `fold_layer_norm`.
    """
    config, params = untie_head(config, params)
    params = center_reading_weights(config, fold_layer_norm(config, params))
    params = fold_value_biases(config, center_writing_weights(config, params))
    return config, center_unembed(params)


@under_jax_defaults
@whole_on_auto_axes
def untie_head(config: GPT2Config, params: Params) -> tuple[GPT2Config, Params]:
    """Return the model with an output head of its own, `lm_head`, a copy of `wte`. Logits are the same, to the bit.

    Returns:
      The config with tie_word_embeddings=False, and its params. A head that is not tied is returned unchanged.

    Raises:
      ValueError: params do not match the config.
    """
    flat = flat_of(config, params)
    flat.setdefault("lm_head", flat["wte"].copy())  # a copy, because the training step donates each array once
    return config.replace(tie_word_embeddings=False), unflatten(flat)


@under_jax_defaults
@whole_on_auto_axes
def fold_layer_norm(config: GPT2Config, params: Params) -> Params:
    """Move g and b of every ln_1 and ln_2 into the weights that read them. Logits are the same, up to rounding.

    With the normalized stream n, (n * g + b) @ w + c becomes n @ (g[:, None] * w) + (b @ w + c). Then g is 1 and b is
    0. ln_f does not change: the text at the top of the module says why.

    Raises:
      ValueError: params do not match the config, or the config's qkv_bias is False. Then the model holds c_attn's bias
        at 0, so ln_1's b cannot move there.
    """
    if not config.qkv_bias:
        raise ValueError("ln_1's b moves to the bias of c_attn: pass config.replace(qkv_bias=True), and keep using it")
    flat = flat_of(config, params)
    for layer in range(config.n_layer):
        for norm, reader in READERS.items():
            g_name, b_name = f"h{layer}/{norm}/g", f"h{layer}/{norm}/b"
            w_name, c_name = f"h{layer}/{reader}/w", f"h{layer}/{reader}/b"
            g, b, w, c = (flat[name] for name in (g_name, b_name, w_name, c_name))
            flat[w_name] = (wide(g)[:, None] * wide(w)).astype(w.dtype)
            flat[c_name] = (product(b, w) + wide(c)).astype(c.dtype)
            flat[g_name], flat[b_name] = module_of(g).ones_like(g), module_of(b).zeros_like(b)
    return unflatten(flat)


@under_jax_defaults
@whole_on_auto_axes
def center_unembed(params: Params) -> Params:
    """Subtract the mean over the vocabulary from each column of the output head.

    All logits of a position decrease by the same number, their mean. Probabilities are the same, up to rounding. If the
    head is `wte`, the mean is added to each row of `wpe`: the sum of a token's and a position's embedding does not
    change, so the stream is the same. If there is an untied `lm_head`, only `lm_head` changes.

    Raises:
      ValueError: `wte` or `wpe` is missing.
    """
    flat = flatten(params)
    if missing := [name for name in ("wte", "wpe") if name not in flat]:
        raise ValueError(f"params have no {' and no '.join(missing)}")
    name = "lm_head" if "lm_head" in flat else "wte"
    head_VD = wide(flat[name])
    mean_D = head_VD.mean(0)
    flat[name] = (head_VD - mean_D).astype(flat[name].dtype)
    if name == "wte":
        flat["wpe"] = (wide(flat["wpe"]) + mean_D).astype(flat["wpe"].dtype)
    return unflatten(flat)


@under_jax_defaults
@whole_on_auto_axes
def fold_value_biases(config: GPT2Config, params: Params) -> Params:
    """Move the value biases into the bias of attention's c_proj. Logits are the same, up to rounding.

    The weights of an attention pattern sum to 1, so each head adds its value bias once to z. The new z has none, and
    attention's output is the same. This does not hold where an edit changes the sum of a pattern, or under dropout of
    attention weights.

    Raises:
      ValueError: params do not match the config.
    """
    flat = flat_of(config, params)
    for layer in range(config.n_layer):
        b_name, w_name, c_name = (f"h{layer}/attn/{name}" for name in ("c_attn/b", "c_proj/w", "c_proj/b"))
        b, w, c = flat[b_name], flat[w_name], flat[c_name]
        values = 2 * config.n_embd  # c_attn's columns are queries, keys and values
        flat[c_name] = (product(b[values:], w) + wide(c)).astype(c.dtype)
        flat[b_name] = module_of(b).concatenate([b[:values], module_of(b).zeros_like(b[values:])])
    return unflatten(flat)


@under_jax_defaults
@whole_on_auto_axes
def center_reading_weights(config: GPT2Config, params: Params) -> Params:
    """Subtract the mean over D from each column of the matrices c_attn and c_fc. Logits are the same, up to rounding.

    These matrices, [D, 3D] and [D, F], read ln_1 and ln_2. With g = 1 and b = 0 the norm's output has the mean 0 over
    D, so a constant column adds 0. Call `fold_layer_norm` first.

    Raises:
      ValueError: params do not match the config, or an ln_1 or ln_2 is not folded (checked if its values are known).
    """
    flat = flat_of(config, params)
    for layer in range(config.n_layer):
        for norm, reader in READERS.items():
            g, b = flat[f"h{layer}/{norm}/g"], flat[f"h{layer}/{norm}/b"]
            if not isinstance(g, Tracer) and not isinstance(b, Tracer) and ((g != 1).any() or (b != 0).any()):
                raise ValueError(f"g and b of h{layer}/{norm} must be 1 and 0: call fold_layer_norm first")
            flat[f"h{layer}/{reader}/w"] = _centered(flat[f"h{layer}/{reader}/w"], axis=0)
    return unflatten(flat)


@under_jax_defaults
@whole_on_auto_axes
def center_writing_weights(config: GPT2Config, params: Params) -> Params:
    """Subtract the mean over D from all that is written to the residual stream. Logits are the same, up to rounding.

    These are the rows of `wpe`, and the rows of w and the b of both c_proj. The rows of `wte` are centered too if the
    head is not tied: then the stream is that of `centered_stream`. If the head is tied, the mean of the stream is that
    of the token's row of `wte`, in all layers.

    Raises:
      ValueError: params do not match the config.
    """
    flat = flat_of(config, params)
    names = ["wpe"] if config.tie_word_embeddings else ["wpe", "wte"]
    names += [f"h{i}/{writer}/{leaf}" for i in range(config.n_layer) for writer in WRITERS for leaf in ("w", "b")]
    return unflatten(flat | {name: _centered(flat[name]) for name in names})


@under_jax_defaults
@whole_on_auto_axes
def unembedding(config: GPT2Config, params: Params) -> tuple[Any, Any]:
    """Return w_DV and b_V, with which logits are `ln_f/normalized @ w_DV + b_V`: the head with ln_f folded into it.

    They are W_U and b_U of TransformerLens if it folds LayerNorm. If you call `center_unembed` first, they are also
    centered over the vocabulary. They are at least float32.

    Returns:
      w_DV: [D, V], g * head.T, whose columns have the mean 0 over D. (`ln_f/normalized` has the mean 0 over D too.)
      b_V: [V], head @ b.

    Raises:
      ValueError: params do not match the config.
    """
    flat = flat_of(config, params)
    head_VD = wide(output_head(params))
    return _centered(wide(flat["ln_f/g"])[:, None] * head_VD.T, axis=0), product(head_VD, flat["ln_f/b"])


@under_jax_defaults
def centered_stream(stream_BTD: jax.Array) -> jax.Array:
    """Subtract the mean over D: the residual stream of a model whose writing weights are centered.

    Dictionaries (sparse autoencoders, transcoders) that were trained on processed models of TransformerLens expect this
    stream. Their reconstruction may replace the model's own stream: no reader sees the mean.

    Args:
      stream_BTD: resid_pre, resid_mid or resid_post, or attn/out, mlp/out, embed or pos_embed; any array [..., D].

    Raises:
      ValueError: it has no axes, or is not an array of floats.
    """
    stream_BTD = jnp.asarray(stream_BTD)
    if stream_BTD.ndim == 0 or not jnp.issubdtype(stream_BTD.dtype, jnp.floating):
        raise ValueError(f"a stream must be floats [..., D], not {stream_BTD.dtype}{stream_BTD.shape}")
    return _centered(stream_BTD)


def _centered(array: Any, axis: int = -1) -> Any:
    """Return an array minus its mean over an axis, computed in at least float32, in the array's dtype."""
    return (wide(array) - wide(array).mean(axis, keepdims=True)).astype(array.dtype)
