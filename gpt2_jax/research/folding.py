"""Fold LayerNorm's parameters into other weights, and center the output head. The model's probabilities do not change.

Nothing in the package does this on its own. Each function returns the params of a plain GPT-2, and rounds the new
weights to the dtype of the old ones. So fold float32 weights, and cast afterwards.

The output head of GPT-2 is tied: `wte` is also the embedding. So two changes that are common for untied models are
missing here. They are missing for an untied head (`lm_head`) too, so that all models are treated alike:

- ln_f's g and b stay. Multiplying a tied head's columns by g would multiply the embedding by it.
- What is written to the residual stream is not centered over D. Every LayerNorm subtracts the mean, but the rows of
  a tied head are also multiplied with ln_f's output, whose sum over D is not 0.
"""

from __future__ import annotations

from gpt2_jax.config import GPT2Config
from gpt2_jax.explicit_axes import whole_on_auto_axes
from gpt2_jax.jax_defaults import under_jax_defaults
from gpt2_jax.params import Params, flatten, unflatten
from gpt2_jax.research.trees import flat_of, module_of, product, wide

READERS = {"ln_1": "attn/c_attn", "ln_2": "mlp/c_fc"}  # only this layer reads the norm's output


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
