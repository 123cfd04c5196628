"""GPT-2's activations by name, and edits of them, in plain NumPy float64: what research.forward should give.

B batch, T query, S key, D n_embd, N heads, H head width, F mlp width, V vocab."""

import math

import numpy as np
import numpy_reference

import gpt2_jax

CONFIG = gpt2_jax.GPT2Config(n_vocab=53, n_ctx=211, n_embd=15, n_head=3, n_layer=2)
MASKED = -1e10
LN = ["scale", "normalized", "out"]
OF_BLOCK = [
    "resid_pre", *(f"ln_1/{name}" for name in LN), *(f"attn/{name}" for name in ["q", "k", "v"]),
    "attn/scores", "attn/pattern", "attn/z", "attn/out", "resid_mid", *(f"ln_2/{name}" for name in LN),
    "mlp/pre", "mlp/post", "mlp/out", "resid_post",
]  # fmt: skip
PER_HEAD = {"q": "BTN", "k": "BTN", "v": "BTN", "z": "BTN", "scores": "BNT", "pattern": "BNT"}


def names(n_layer):
    """All names in the order of computation."""
    blocks = [f"h{i}/{name}" for i in range(n_layer) for name in OF_BLOCK]
    return ["embed", "pos_embed", *blocks, *(f"ln_f/{name}" for name in LN)]


def edit(how, name, value, positions=None, heads=None):
    """What `change` takes; `how` is "replace", "add" or "scale"."""
    return how, name, np.asarray(value, np.float64), positions, heads


def change(edits, name, x, place_BT):
    """The activation with its edits made in turn, one place and one head at a time."""
    for how, of, value, positions, heads in edits:
        if of != name:
            continue
        x, old, value = x.copy(), x, np.broadcast_to(value, x.shape)
        letters = PER_HEAD.get(name.split("/")[-1], "BT")
        for index in np.ndindex(*x.shape[: len(letters)]):
            b, t, n = (index[letters.index(axis)] if axis in letters else None for axis in "BTN")
            if (positions is None or place_BT[b, t] in positions) and (heads is None or n in heads):
                x[index] = {"replace": value, "add": old + value, "scale": old * value}[how][index]
    return x


def forward(config, params, tokens_BT, mask_BT=None, edits=()):
    """Logits [B, T, V] and {name: activation}. What padding holds has no meaning; no other token sees it."""
    params, seen = numpy_reference.as_float64(params), {}
    tokens_BT = np.asarray(tokens_BT)
    mask_BT = np.ones(tokens_BT.shape, bool) if mask_BT is None else np.asarray(mask_BT)
    n_rows, length = tokens_BT.shape
    place_BT = np.where(mask_BT, mask_BT.cumsum(-1) - 1, -1)
    visible_BTS = np.tri(length, dtype=bool) & mask_BT[:, None, :]

    def see(name, x):
        seen[name] = change(edits, name, x, place_BT)
        return seen[name]

    def norm(name, x_BTD, p):
        x_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
        scale_BT1 = see(f"{name}/scale", np.sqrt((x_BTD**2).mean(-1, keepdims=True) + 1e-5))
        return see(f"{name}/out", see(f"{name}/normalized", x_BTD / scale_BT1) * p["g"] + p["b"])

    def attention(name, x_BTD, p):
        qkv = np.split(x_BTD @ p["c_attn"]["w"] + p["c_attn"]["b"], 3, axis=-1)
        heads = (n_rows, length, config.n_head, config.n_embd // config.n_head)
        q_BTNH, k_BTNH, v_BTNH = (see(f"{name}/{n}", x.reshape(heads)) for n, x in zip("qkv", qkv, strict=True))
        scores_BNTS = np.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH) / math.sqrt(heads[-1])
        scores_BNTS = see(f"{name}/scores", np.where(visible_BTS[:, None], scores_BNTS, MASKED))
        pattern_BNTS = np.exp(scores_BNTS - scores_BNTS.max(-1, keepdims=True))
        pattern_BNTS = see(f"{name}/pattern", pattern_BNTS / pattern_BNTS.sum(-1, keepdims=True))
        z_BTNH = see(f"{name}/z", np.einsum("BNTS,BSNH->BTNH", pattern_BNTS, v_BTNH))
        return see(f"{name}/out", z_BTNH.reshape(x_BTD.shape) @ p["c_proj"]["w"] + p["c_proj"]["b"])

    def mlp(name, x_BTD, p):
        pre_BTF = see(f"{name}/pre", x_BTD @ p["c_fc"]["w"] + p["c_fc"]["b"])
        post_BTF = see(f"{name}/post", numpy_reference.gelu_tanh(pre_BTF))
        return see(f"{name}/out", post_BTF @ p["c_proj"]["w"] + p["c_proj"]["b"])

    embed_BTD = see("embed", params["wte"][np.where(mask_BT, tokens_BT, 0)])
    x_BTD = embed_BTD + see("pos_embed", params["wpe"][np.maximum(place_BT, 0)])
    for i in range(config.n_layer):
        h, block = f"h{i}", params[f"h{i}"]
        x_BTD = see(f"{h}/resid_pre", x_BTD)
        x_BTD = see(
            f"{h}/resid_mid", x_BTD + attention(f"{h}/attn", norm(f"{h}/ln_1", x_BTD, block["ln_1"]), block["attn"])
        )
        x_BTD = see(f"{h}/resid_post", x_BTD + mlp(f"{h}/mlp", norm(f"{h}/ln_2", x_BTD, block["ln_2"]), block["mlp"]))
    return norm("ln_f", x_BTD, params["ln_f"]) @ params["wte"].T, seen


def weights(config=CONFIG, seed=3):
    """Weights in which every parameter matters."""
    return numpy_reference.random_params(config, np.random.default_rng(seed))


def real(name, x, mask_BT):
    """The activation where queries, and keys of scores and patterns, are real tokens; 0 elsewhere."""
    letters = PER_HEAD.get(name.split("/")[-1], "BT")
    if letters != "BNT":
        return np.where(mask_BT.reshape(*mask_BT.shape, *[1] * (x.ndim - 2)), x, 0)
    return np.where(mask_BT[:, None, :, None] & mask_BT[:, None, None, :], x, 0)


def has_heads(name):
    return name.split("/")[-1] in PER_HEAD


def shape_of(name, n_rows, n_tokens, config=CONFIG):
    last, width = name.split("/")[-1], config.n_embd
    if has_heads(name):
        place = (n_rows, n_tokens, config.n_head)
        return (*place, width // config.n_head) if last in "qkvz" else (n_rows, config.n_head, n_tokens, n_tokens)
    is_neuron = name.endswith(("mlp/pre", "mlp/post"))
    return n_rows, n_tokens, 1 if last == "scale" else 4 * width if is_neuron else width


def error(ours, theirs):
    """The largest difference, relative to the largest value; masked scores count by their own size."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.isfinite(theirs).all()
    hidden = np.abs(theirs) > 1e8
    assert not hidden.any() or np.abs(ours[hidden] / theirs[hidden] - 1).max() < 1e-6
    return np.abs(ours - theirs)[~hidden].max() / np.abs(theirs[~hidden]).max()


def assert_agrees(ours, params, tokens_BT, mask_BT=None, edits=(), *, config=CONFIG, bound):
    """`ours` is what research.forward gave, logits and what it captured, for the edits that `edit` describes."""
    out, seen = ours
    logits_BTV, expected = forward(config, params, tokens_BT, mask_BT, edits)
    real_BT = np.ones(tokens_BT.shape, bool) if mask_BT is None else mask_BT
    for name, value in seen.items():
        assert error(*(real(name, np.asarray(x), real_BT) for x in (value, expected[name]))) < bound, name
    assert error(np.asarray(out.logits)[real_BT], logits_BTV[real_BT]) < bound
