"""GPT-2's forward pass in plain NumPy float64. It shares no code with the package.

B batch, T query, S key, D n_embd, N heads, H head width, F mlp width, V vocab."""

import math

import numpy as np

MASKED = -1e10


def gelu_tanh(x):
    """The GELU that GPT-2 was trained with."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x):
    """The exact GELU. It is wrong for GPT-2's weights, and shows that the tests detect the difference."""
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def unseen(name, x):
    """The default of `see`: return each activation unchanged."""
    return x


def relu(x):
    return np.maximum(x, 0)


def silu(x):
    return x / (1 + np.exp(-x))


ACTIVATIONS = {"gelu_new": gelu_tanh, "gelu": gelu_erf, "relu": relu, "silu": silu}


def attention(x_TD, p, n_head, see=unseen, name="attn", divisor=1):
    length, width = x_TD.shape
    qkv_T3NH = (x_TD @ p["c_attn"]["w"] + p["c_attn"]["b"]).reshape(length, 3, n_head, width // n_head)
    q_TNH, k_TNH, v_TNH = (see(f"{name}/{part}", qkv_T3NH[:, i]) for i, part in enumerate("qkv"))
    scores_NTS = q_TNH.swapaxes(0, 1) @ k_TNH.transpose(1, 2, 0) / math.sqrt(width // n_head) / divisor
    scores_NTS = see(f"{name}/scores", np.where(np.tri(length, dtype=bool), scores_NTS, MASKED))
    pattern_NTS = np.exp(scores_NTS - scores_NTS.max(-1, keepdims=True, initial=MASKED))
    pattern_NTS = see(f"{name}/pattern", pattern_NTS / pattern_NTS.sum(-1, keepdims=True))
    z_TNH = see(f"{name}/z", (pattern_NTS @ v_TNH.swapaxes(0, 1)).swapaxes(0, 1))
    return see(f"{name}/out", z_TNH.reshape(length, width) @ p["c_proj"]["w"] + p["c_proj"]["b"])


def row(
    params,
    tokens_T,
    n_head,
    see=unseen,
    *,
    eps=1e-5,
    gelu=gelu_tanh,
    first_position=0,
    layers=None,
    inverse_layer=False,
):
    """Logits [T, V] of one text without padding. `see` gets each activation by name and returns its replacement.

    `params` are float64. Tests set `eps`, `gelu`, `first_position` and `layers` (the block order) to wrong values.
    `inverse_layer` also divides the scores of layer i by i + 1. An `lm_head` among the params is the output head."""

    def norm(name, x_TD, p):
        centred_TD = x_TD - x_TD.mean(-1, keepdims=True)
        scale_T1 = see(f"{name}/scale", np.sqrt((centred_TD**2).mean(-1, keepdims=True) + eps))
        return see(f"{name}/out", see(f"{name}/normalized", centred_TD / scale_T1) * p["g"] + p["b"])

    def mlp(name, x_TD, p):
        pre_TF = see(f"{name}/pre", x_TD @ p["c_fc"]["w"] + p["c_fc"]["b"])
        return see(f"{name}/out", see(f"{name}/post", gelu(pre_TF)) @ p["c_proj"]["w"] + p["c_proj"]["b"])

    pos_embed_TD = params["wpe"][first_position : first_position + len(tokens_T)]
    x_TD = see("embed", params["wte"][tokens_T]) + see("pos_embed", pos_embed_TD)
    for layer in range(sum(name.startswith("h") for name in params)) if layers is None else layers:
        h, block = f"h{layer}", params[f"h{layer}"]
        x_TD = see(f"{h}/resid_pre", x_TD)
        normed_TD = norm(f"{h}/ln_1", x_TD, block["ln_1"])
        divisor = layer + 1 if inverse_layer else 1
        x_TD = see(f"{h}/resid_mid", x_TD + attention(normed_TD, block["attn"], n_head, see, f"{h}/attn", divisor))
        x_TD = see(f"{h}/resid_post", x_TD + mlp(f"{h}/mlp", norm(f"{h}/ln_2", x_TD, block["ln_2"]), block["mlp"]))
    return norm("ln_f", x_TD, params["ln_f"]) @ params.get("lm_head", params["wte"]).T


def forward(params, tokens_BT, n_head, mask_BT=None, **wrong):
    """Logits [B, T, V] in float64. Only the real tokens of a padded row are run. Padded positions are NaN."""
    params = as_float64(params)
    mask_BT = np.ones(tokens_BT.shape, bool) if mask_BT is None else np.asarray(mask_BT)
    logits_BTV = np.full((*tokens_BT.shape, len(params["wte"])), np.nan)
    for tokens_T, mask_T, logits_TV in zip(np.asarray(tokens_BT), mask_BT, logits_BTV, strict=True):
        logits_TV[mask_T] = row(params, tokens_T[mask_T], n_head, **wrong)
    return logits_BTV


def as_float64(tree):
    if isinstance(tree, dict):
        return {name: as_float64(branch) for name, branch in tree.items()}
    return np.asarray(tree, np.float64)


def random_params(config, rng):
    """A tree of float32 arrays. Gains are not 1 and biases are not 0, so every parameter affects the result."""
    width = config.n_embd

    def normal(shape, scale, centre=0.0):
        return (centre + scale * rng.standard_normal(shape)).astype(np.float32)

    def norm():
        return {"g": normal(width, 0.3, centre=1.0), "b": normal(width, 0.2)}

    def linear(n_in, n_out):
        return {"w": normal((n_in, n_out), n_in**-0.5), "b": normal(n_out, 0.2)}

    params = {"wte": normal((config.n_vocab, width), 0.15), "wpe": normal((config.n_ctx, width), 0.1), "ln_f": norm()}
    for layer in range(config.n_layer):
        attn = {"c_attn": linear(width, 3 * width), "c_proj": linear(width, width)}
        mlp = {"c_fc": linear(width, 4 * width), "c_proj": linear(4 * width, width)}
        params[f"h{layer}"] = {"ln_1": norm(), "attn": attn, "ln_2": norm(), "mlp": mlp}
    if not config.tie_word_embeddings:
        params["lm_head"] = normal((config.n_vocab, width), 0.15)
    return params
