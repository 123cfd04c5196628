"""GPT-2's forward pass in plain NumPy float64, sharing nothing with the package it checks.
B batch, T query, S key, D n_embd, N heads, H head width, F mlp width, V vocab."""

import math

import numpy as np


def gelu_tanh(x):
    """The form GPT-2 was trained with."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x):
    """The exact form: wrong for GPT-2's weights, here to show that the tests see the difference."""
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def layer_norm(x, p, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * p["g"] + p["b"]


def attention(x_TD, p, n_head):
    length, width = x_TD.shape
    qkv_T3NH = (x_TD @ p["c_attn"]["w"] + p["c_attn"]["b"]).reshape(length, 3, n_head, width // n_head)
    q_NTH, k_NSH, v_NSH = qkv_T3NH.transpose(1, 2, 0, 3)
    scores_NTS = q_NTH @ k_NSH.swapaxes(-1, -2) / math.sqrt(width // n_head)
    scores_NTS = np.where(np.tri(length, dtype=bool), scores_NTS, -1e10)
    weights_NTS = np.exp(scores_NTS - scores_NTS.max(-1, keepdims=True, initial=-1e10))
    weights_NTS /= weights_NTS.sum(-1, keepdims=True)
    merged_TD = (weights_NTS @ v_NSH).swapaxes(0, 1).reshape(length, width)
    return merged_TD @ p["c_proj"]["w"] + p["c_proj"]["b"]


def forward(params, tokens_BT, n_head, mask_BT=None, *, eps=1e-5, gelu=gelu_tanh, first_position=0):
    """Logits [B, T, V] in float64. A padded row is its real tokens run alone; padded positions are NaN.

    `eps`, `gelu` and `first_position` exist to be set wrongly."""
    params = as_float64(params)
    mask_BT = np.ones(tokens_BT.shape, bool) if mask_BT is None else np.asarray(mask_BT)
    logits_BTV = np.full((*tokens_BT.shape, len(params["wte"])), np.nan)
    for tokens_T, mask_T, logits_TV in zip(np.asarray(tokens_BT), mask_BT, logits_BTV, strict=True):
        real_T = tokens_T[mask_T]
        x_TD = params["wte"][real_T] + params["wpe"][first_position : first_position + len(real_T)]
        for layer in range(sum(name.startswith("h") for name in params)):
            h = params[f"h{layer}"]
            x_TD = x_TD + attention(layer_norm(x_TD, h["ln_1"], eps), h["attn"], n_head)
            a_TF = gelu(layer_norm(x_TD, h["ln_2"], eps) @ h["mlp"]["c_fc"]["w"] + h["mlp"]["c_fc"]["b"])
            x_TD = x_TD + a_TF @ h["mlp"]["c_proj"]["w"] + h["mlp"]["c_proj"]["b"]
        logits_TV[mask_T] = layer_norm(x_TD, params["ln_f"], eps) @ params["wte"].T
    return logits_BTV


def as_float64(tree):
    if isinstance(tree, dict):
        return {name: as_float64(branch) for name, branch in tree.items()}
    return np.asarray(tree, np.float64)


def random_params(config, rng):
    """A tree of float32 arrays in which every parameter matters: gains are not 1, biases are not 0."""
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
    return params
