"""Folders of models that other programs write: nanoGPT, Flax, the build-an-LLM book and llm.c.

The weights and the reference logits are those of `peer_models`, which shares no code with the package.
"""

import json
from pathlib import Path

import checkpoint_forms as forms
import numpy as np
import peer_models
import safetensors.numpy
from flax import serialization

import gpt2_jax

# An odd width, and n_vocab and n_ctx that are no multiples of it: no two sides are equal by chance.
CONFIG = gpt2_jax.GPT2Config(n_vocab=37, n_ctx=11, n_embd=15, n_head=3, n_layer=2)
TOKENS = np.array([3, 1, 4, 1, 5, 9, 2, 6])
BOOK = {
    "vocab_size": 37, "context_length": 11, "emb_dim": 15, "n_heads": 3, "n_layers": 2, "drop_rate": 0.1,
    "qkv_bias": True,
}  # fmt: skip
NANOGPT = {"n_layer": 2, "n_head": 3, "n_embd": 15, "block_size": 11, "bias": True, "vocab_size": 37, "dropout": 0.0}


def write(directory: Path, fields, tensors, name="model.safetensors") -> Path:
    """Write config.json and a safetensors file. Safetensors holds no two names of one array."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    whole = {key: np.array(array, order="C") for key, array in tensors.items()}
    safetensors.numpy.save_file(whole, directory / name, {"format": "pt"})
    return directory


def nanogpt(bias=True):
    return peer_models.nanogpt_state(CONFIG, np.random.default_rng(7), bias)


def flax():
    """FlaxGPT2LMHeadModel's params as nested dicts."""
    return peer_models.flax_tree(CONFIG, np.random.default_rng(7))


def dotted(tree, path=()):
    """The names with dots of the arrays in nested dicts."""
    found = {}
    for name, branch in tree.items():
        found |= dotted(branch, (*path, name)) if isinstance(branch, dict) else {".".join((*path, name)): branch}
    return found


def book(qkv_bias=True, tied=True):
    """The book's model in peer_models' names, which have brackets."""
    state = peer_models.book_state(CONFIG, np.random.default_rng(7))
    if not qkv_bias:
        state = {key: array * 0 if "W_" in key and key.endswith("bias") else array for key, array in state.items()}
    if not tied:
        state["out_head.weight"] = peer_models.normal(np.random.default_rng(8), CONFIG.n_vocab, CONFIG.n_embd)
    return state


def in_torch_names(state, qkv_bias=True):
    """The book's state dict as torch saves it, with its mask buffers."""
    found = {key.replace("[", ".").replace("]", ""): array for key, array in state.items()}
    if not qkv_bias:
        found = {key: array for key, array in found.items() if not ("W_" in key and key.endswith("bias"))}
    masks = {f"trf_blocks.{i}.att.mask": np.triu(np.ones((11, 11), np.float32), 1) for i in range(CONFIG.n_layer)}
    return found | masks


def write_llmc(path: Path, config, flat, version=3, rows=128) -> Path:
    """A model file of llm.c (karpathy/llm.c, train_gpt2.py: write_model), from OpenAI's orientation."""
    header = np.zeros(256, "<i4")
    header[:8] = [20240326, version, config.n_ctx, config.n_vocab, config.n_layer, config.n_head, config.n_embd, rows]
    dtype = {3: np.dtype("f4"), 5: np.dtype("bfloat16")}[version]
    wte = np.zeros((rows, config.n_embd), dtype)
    wte[: config.n_vocab] = flat["wte"]
    parts = [wte, flat["wpe"]]
    order = (
        "ln_1/g ln_1/b attn/c_attn/w attn/c_attn/b attn/c_proj/w attn/c_proj/b ln_2/g ln_2/b mlp/c_fc/w mlp/c_fc/b "
        "mlp/c_proj/w mlp/c_proj/b"
    )
    for name in order.split():
        parts += [flat[f"h{i}/{name}"].T for i in range(config.n_layer)]
    parts += [flat["ln_f/g"], flat["ln_f/b"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + b"".join(np.ascontiguousarray(part, dtype).tobytes() for part in parts))
    return path


def write_flax(directory: Path, config, flat):
    """config.json and flax_model.msgpack of FlaxGPT2LMHeadModel, whose kernels are (out, in)."""
    words, tree = {"w": "kernel", "g": "scale", "b": "bias"}, {}
    for name, array in flat.items():
        path, last = forms.hf_name(name).split(".")[:-1], name.split("/")[-1]
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[words.get(last, "embedding")] = array.T if last == "w" else array
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "flax_model.msgpack").write_bytes(serialization.to_bytes({"transformer": tree}))
    (directory / "config.json").write_text(json.dumps(forms.hf_config(config)), encoding="utf-8")


def write_orbax(directory: Path, config, flat):
    """hparams.json beside the params as Orbax's StandardCheckpointer writes them."""
    import orbax.checkpoint as ocp

    directory.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.resolve() / "tree", forms.nested(flat))
    (directory / "hparams.json").write_text(json.dumps(config.to_hparams()), encoding="utf-8")


def write_v1_folder(directory: Path, config, flat):
    write_v1(directory / "model.ckpt", forms.variables_of(flat))
    (directory / "hparams.json").write_text(json.dumps(config.to_hparams()), encoding="utf-8")


def write_v1(path: Path, variables) -> Path:
    """A TensorFlow checkpoint of version V1: one file."""
    tf = forms.import_tensorflow()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.device("CPU"):
        tf.raw_ops.Save(filename=str(path), tensor_names=list(variables), data=[*map(tf.constant, variables.values())])
    return path
