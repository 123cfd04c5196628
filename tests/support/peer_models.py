"""GPT-2 with the parameter names and orientations of three other projects, in NumPy float64.

Each has a tree of random float32 params and the logits [T, V] of one row. They share no code with the package.
"""

import numpy as np
import numpy_reference


def normal(rng, *shape):
    scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.3
    return rng.normal(0, scale, shape).astype(np.float32)


def norm(x, gain, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain + bias


def mix(q, k, v, n_head, hidden):
    """Causal attention of all heads, from queries, keys and values [T, D] to [T, D]."""
    mixed = []
    for q_TH, k_TH, v_TH in zip(*(np.split(part, n_head, axis=-1) for part in (q, k, v)), strict=True):
        scores = np.where(np.tri(len(q_TH), dtype=bool), q_TH @ k_TH.T / np.sqrt(q_TH.shape[-1]), hidden)
        pattern = np.exp(scores - scores.max(-1, keepdims=True))
        mixed.append(pattern / pattern.sum(-1, keepdims=True) @ v_TH)
    return np.concatenate(mixed, axis=-1)


# ---- FlaxGPT2LMHeadModel (huggingface/transformers 4, models/gpt2/modeling_flax_gpt2.py): kernels are (out, in)


def flax_tree(config, rng):
    d = config.n_embd

    def dense(n_in, n_out):
        return {"kernel": normal(rng, n_out, n_in), "bias": normal(rng, n_out)}

    def layer_norm():
        return {"scale": 1 + normal(rng, d), "bias": normal(rng, d)}

    def block():
        attn = {"c_attn": dense(d, 3 * d), "c_proj": dense(d, d)}
        mlp = {"c_fc": dense(d, 4 * d), "c_proj": dense(4 * d, d)}
        return {"ln_1": layer_norm(), "attn": attn, "ln_2": layer_norm(), "mlp": mlp}

    blocks = {str(i): block() for i in range(config.n_layer)}
    embeddings = {
        "wte": {"embedding": normal(rng, config.n_vocab, d)},
        "wpe": {"embedding": normal(rng, config.n_ctx, d)},
    }
    return {"transformer": {**embeddings, "h": blocks, "ln_f": layer_norm()}}


def flax_logits(tree, tokens_T, n_head):
    tree = numpy_reference.as_float64(tree)["transformer"]

    def dense(x, p):
        return x @ p["kernel"].T + p["bias"]

    def normed(x, p):
        return norm(x, p["scale"], p["bias"])

    x = tree["wte"]["embedding"][tokens_T] + tree["wpe"]["embedding"][: len(tokens_T)]
    for i in range(len(tree["h"])):
        block = tree["h"][str(i)]
        q, k, v = np.split(dense(normed(x, block["ln_1"]), block["attn"]["c_attn"]), 3, axis=-1)
        x = x + dense(mix(q, k, v, n_head, -1e4), block["attn"]["c_proj"])
        hidden = numpy_reference.gelu_tanh(dense(normed(x, block["ln_2"]), block["mlp"]["c_fc"]))
        x = x + dense(hidden, block["mlp"]["c_proj"])
    return normed(x, tree["ln_f"]) @ tree["wte"]["embedding"].T


# ---- nanoGPT (karpathy/nanoGPT, model.py): nn.Linear is (out, in), and GELU is the exact one


def nanogpt_state(config, rng, bias=True):
    """A state dict. With `bias=False`, linear layers and norms have no biases."""
    d, state = config.n_embd, {}
    shapes = {"attn.c_attn": (3 * d, d), "attn.c_proj": (d, d), "mlp.c_fc": (4 * d, d), "mlp.c_proj": (d, 4 * d)}
    state["transformer.wte.weight"] = normal(rng, config.n_vocab, d)
    state["transformer.wpe.weight"] = normal(rng, config.n_ctx, d)
    norms = [f"h.{i}.ln_{n}" for i in range(config.n_layer) for n in (1, 2)]
    for name in [*norms, "ln_f"]:
        state[f"transformer.{name}.weight"] = 1 + normal(rng, d)
        state[f"transformer.{name}.bias"] = normal(rng, d)
    for i in range(config.n_layer):
        for name, shape in shapes.items():
            state[f"transformer.h.{i}.{name}.weight"] = normal(rng, *shape)
            state[f"transformer.h.{i}.{name}.bias"] = normal(rng, shape[0])
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return {key: array for key, array in state.items() if bias or not key.endswith("bias")}


def nanogpt_logits(state, tokens_T, n_head, gelu=numpy_reference.gelu_erf):
    state = {key.removeprefix("transformer."): np.asarray(array, np.float64) for key, array in state.items()}

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    def normed(x, name):
        return norm(x, state[f"{name}.weight"], state.get(f"{name}.bias", 0))

    x = state["wte.weight"][tokens_T] + state["wpe.weight"][: len(tokens_T)]
    for i in range(sum(key.endswith("c_attn.weight") for key in state)):
        q, k, v = np.split(linear(normed(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, axis=-1)
        x = x + linear(mix(q, k, v, n_head, -np.inf), f"h.{i}.attn.c_proj")
        x = x + linear(gelu(linear(normed(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj")
    return normed(x, "ln_f") @ state["lm_head.weight"].T


# ---- GPTModel (rasbt/LLMs-from-scratch, chapter 4): nn.Linear is (out, in), query, key and value apart


def book_state(config, rng):
    d = config.n_embd
    state = {"tok_emb.weight": normal(rng, config.n_vocab, d), "pos_emb.weight": normal(rng, config.n_ctx, d)}
    for i in range(config.n_layer):
        block = f"trf_blocks[{i}]"
        for name, shape in {
            "att.W_query": (d, d), "att.W_key": (d, d), "att.W_value": (d, d), "att.out_proj": (d, d),
            "ff.layers[0]": (4 * d, d), "ff.layers[2]": (d, 4 * d),
        }.items():  # fmt: skip
            state[f"{block}.{name}.weight"] = normal(rng, *shape)
            state[f"{block}.{name}.bias"] = normal(rng, shape[0])
        for name in ("norm1", "norm2"):
            state |= {f"{block}.{name}.scale": 1 + normal(rng, d), f"{block}.{name}.shift": normal(rng, d)}
    state |= {"final_norm.scale": 1 + normal(rng, d), "final_norm.shift": normal(rng, d)}
    return state | {"out_head.weight": state["tok_emb.weight"]}


def book_params(state, n_layer):
    """What the book's download_and_load_gpt2 returns for the same weights: the inverse of its load_weights_into_gpt."""

    def dense(*names):
        weights = [state[f"{name}.weight"].T for name in names]
        return {"w": np.concatenate(weights, -1), "b": np.concatenate([state[f"{name}.bias"] for name in names])}

    def block(i):
        at = f"trf_blocks[{i}]"
        c_attn = dense(*(f"{at}.att.W_{part}" for part in ("query", "key", "value")))
        norms = {f"ln_{n}": {"g": state[f"{at}.norm{n}.scale"], "b": state[f"{at}.norm{n}.shift"]} for n in (1, 2)}
        attn = {"c_attn": c_attn, "c_proj": dense(f"{at}.att.out_proj")}
        return norms | {
            "attn": attn,
            "mlp": {"c_fc": dense(f"{at}.ff.layers[0]"), "c_proj": dense(f"{at}.ff.layers[2]")},
        }

    last = {"g": state["final_norm.scale"], "b": state["final_norm.shift"]}
    blocks = [block(i) for i in range(n_layer)]
    return {"wte": state["tok_emb.weight"], "wpe": state["pos_emb.weight"], "blocks": blocks, **last}


def book_logits(state, tokens_T, n_head):
    state = {key: np.asarray(array, np.float64) for key, array in state.items()}

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def normed(x, name):
        return norm(x, state[f"{name}.scale"], state[f"{name}.shift"])

    x = state["tok_emb.weight"][tokens_T] + state["pos_emb.weight"][: len(tokens_T)]
    for i in range(sum(key.endswith("W_query.weight") for key in state)):
        block = f"trf_blocks[{i}]"
        h = normed(x, f"{block}.norm1")
        q, k, v = (linear(h, f"{block}.att.W_{part}") for part in ("query", "key", "value"))
        x = x + linear(mix(q, k, v, n_head, -np.inf), f"{block}.att.out_proj")
        hidden = numpy_reference.gelu_tanh(linear(normed(x, f"{block}.norm2"), f"{block}.ff.layers[0]"))
        x = x + linear(hidden, f"{block}.ff.layers[2]")
    return normed(x, "final_norm") @ state["out_head.weight"].T
