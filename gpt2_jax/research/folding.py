"""LayerNorm's parameters folded away and the output head centred: other weights, the same model.

Nothing in the package does this on its own. Each function gives the params of a plain GPT-2 again, and rounds the new
weights to the dtype of the old: fold float32 weights, and cast after.

The output head is tied, `wte` being the embedding too, and so two things that are done to untied models are not here:

- ln_f's g and b stay. Multiplying the head's columns by g would multiply the embedding by it.
- What is written to the residual stream is not centred over D. Every LayerNorm takes the mean off again, but the rows
  of `wte` are also what ln_f's output, whose sum over D is not 0, is multiplied with.
"""

from __future__ import annotations

from gpt2_jax.config import GPT2Config
from gpt2_jax.params import Params, flatten, unflatten
from gpt2_jax.research.trees import flat_of, module_of, product, wide

READERS = {"ln_1": "attn/c_attn", "ln_2": "mlp/c_fc"}  # each norm's output goes to this layer alone


def fold_layer_norm(config: GPT2Config, params: Params) -> Params:
    """Move g and b of every ln_1 and ln_2 into the weights that read them: the logits are the same, up to rounding.

    Of (n * g + b) @ w + c, with n the normalised stream, it makes n @ (g[:, None] * w) + (b @ w + c): g becomes 1 and
    b becomes 0. ln_f stays as it is: see the module.

    Raises:
      ValueError: params are not those of the config, or the config's qkv_bias is False: then c_attn has no bias that
        could take in ln_1's b.
    """
    if not config.qkv_bias:
        raise ValueError("ln_1's b goes into the bias of c_attn: pass config.replace(qkv_bias=True), and use it after")
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


def center_unembed(params: Params) -> Params:
    """Take the mean over the vocabulary off each column of `wte`, and add it to each row of `wpe`.

    The sum of a token's and a position's embedding stays, so the stream is the same; all logits of a position become
    less by one number, their mean, and probabilities are the same, up to rounding.

    Raises:
      ValueError: there is no `wte` or `wpe`.
    """
    flat = flatten(params)
    if missing := [name for name in ("wte", "wpe") if name not in flat]:
        raise ValueError(f"params have no {' and no '.join(missing)}")
    wte_VD, wpe_CD = wide(flat["wte"]), wide(flat["wpe"])
    mean_D = wte_VD.mean(0)
    flat["wte"] = (wte_VD - mean_D).astype(flat["wte"].dtype)
    flat["wpe"] = (wpe_CD + mean_D).astype(flat["wpe"].dtype)
    return unflatten(flat)
