"""Directories of every format that the loader reads, built without the package's own writers.

A model is `flat`: {"h0/attn/c_attn/w": numpy array (in, out)}, like OpenAI's variables without `model/` and the 1.
"""

import json
import shutil
import warnings
from pathlib import Path

import jax
import ml_dtypes  # noqa: F401  (numpy learns bfloat16)
import numpy as np
import pytest
import safetensors.numpy

import gpt2_jax

CONFIG = gpt2_jax.GPT2Config(n_vocab=37, n_ctx=11, n_embd=15, n_head=3, n_layer=2)
FORMATS = ("tensorflow", "huggingface", "orbax")
DATA = "model.ckpt.data-00000-of-00001"
INDEX = "model.ckpt.index"
SAFETENSORS = "model.safetensors"


def shapes(config) -> dict[str, tuple[int, ...]]:
    """The release's variables, listed a second time so that the tests find mistakes in the package's own list."""
    d = config.n_embd
    found = {"wte": (config.n_vocab, d), "wpe": (config.n_ctx, d), "ln_f/g": (d,), "ln_f/b": (d,)}
    if not config.tie_word_embeddings:
        found["lm_head"] = found["wte"]
    if config.labels:
        found["score/w"] = (d, len(config.labels))
    dense = {"attn/c_attn": (d, 3 * d), "attn/c_proj": (d, d), "mlp/c_fc": (d, 4 * d), "mlp/c_proj": (4 * d, d)}
    for h in (f"h{i}" for i in range(config.n_layer)):
        found |= {f"{h}/{norm}/{leaf}": (d,) for norm in ("ln_1", "ln_2") for leaf in "gb"}
        for name, shape in dense.items():
            found |= {f"{h}/{name}/w": shape, f"{h}/{name}/b": shape[1:]}
    return found


def random_model(config=CONFIG, seed=5) -> dict[str, np.ndarray]:
    """Ordinary finite values. No two arrays are equal."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=shape).astype(np.float32).astype(config.param_dtype)
        for name, shape in shapes(config).items()
    }


def random_bits(config, seed) -> dict[str, np.ndarray]:
    """Random finite bit patterns, with denormals, the largest numbers and -0.0."""
    rng, dtype = np.random.default_rng(seed), np.dtype(config.param_dtype)
    words = np.dtype(f"uint{8 * dtype.itemsize}")
    special = np.array([0, 1, 1 << (8 * dtype.itemsize - 1)], words).view(dtype)  # 0, the least denormal, -0.0

    def draw(shape):
        values = rng.integers(0, np.iinfo(words).max, shape, words, endpoint=True).view(dtype)
        with np.errstate(invalid="ignore"):  # a signaling NaN
            finite = np.isfinite(values)
        values = np.where(finite, values, rng.choice(special, shape)).astype(dtype)
        values.reshape(-1)[: special.size] = special[: values.size]
        return values

    return {name: draw(shape) for name, shape in shapes(config).items()}


def nested(flat):
    """The params tree of a flat model."""
    tree = {}
    for name, array in flat.items():
        *path, leaf = name.split("/")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[leaf] = array
    return tree


def leaves(params) -> dict[str, np.ndarray]:
    """The flat model of a params tree."""
    return {
        "/".join(k.key for k in path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def difference(params, flat) -> str:
    """The differences between a loaded tree and a flat model, to the bit. Empty if there are none."""
    found = leaves(params)
    if found.keys() != flat.keys():
        return f"names: {sorted(found.keys() ^ flat.keys())}"
    for name, array in flat.items():
        if found[name].dtype != array.dtype or found[name].shape != array.shape:
            return f"{name} is {found[name].dtype}{found[name].shape}, not {array.dtype}{array.shape}"
        if found[name].tobytes() != array.tobytes():
            return f"{name} differs"
    return ""


def assert_loads_as(directory, config, flat, **options):
    """Load, and compare every bit and the config."""
    loaded_config, params = gpt2_jax.load(directory, **options)
    assert difference(params, flat) == ""
    assert loaded_config.to_hparams() == config.to_hparams()
    assert loaded_config.param_dtype == np.dtype(config.param_dtype)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    return loaded_config, params


def refusal(source, error=(ValueError, FileNotFoundError)) -> str:
    """Load what must be refused, and return the message, which is a clear sentence."""
    with pytest.raises(error) as caught:
        gpt2_jax.load(source)
    assert is_clear(caught.value), caught.value
    return str(caught.value)


def is_clear(error: Exception) -> bool:
    """The message is one sentence of ours, with an optional list, not a parser's error or its repr."""
    ours = isinstance(error, ValueError | FileNotFoundError) and not isinstance(
        error, UnicodeError | json.JSONDecodeError
    )
    first = str(error).split(":\n  ")[0]
    return ours and len(first) > 20 and "\n" not in first and "Error(" not in first


# ---- OpenAI's TensorFlow format


def import_tensorflow():
    """TensorFlow. Its own warnings are not errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow as tf
    return tf


def variables_of(flat):
    return {f"model/{name}": array[None] if name.endswith("/w") else array for name, array in flat.items()}


def write_variables(prefix: Path, variables):
    tf = import_tensorflow()
    with tf.device("CPU"):
        tf.raw_ops.SaveV2(
            prefix=str(prefix),
            tensor_names=list(variables),
            shape_and_slices=[""] * len(variables),
            tensors=list(variables.values()),
        )


def write_tensorflow(directory: Path, config, flat, prefix="model.ckpt", pointer=None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    write_variables(directory / prefix, variables_of(flat))
    pointer = prefix if pointer is None else pointer
    (directory / "checkpoint").write_text(f'model_checkpoint_path: "{pointer}"\n', encoding="utf-8")
    (directory / "hparams.json").write_text(json.dumps(config.to_hparams()), encoding="utf-8")
    return directory


# ---- Hugging Face's format


def hf_name(name: str) -> str:
    *modules, leaf = name.split("/")
    leaf = {"w": "weight", "g": "weight", "b": "bias", "wte": "wte.weight", "wpe": "wpe.weight"}[leaf]
    return ".".join([f"h.{part[1:]}" if part[:1] == "h" else part for part in modules] + [leaf])


def hf_tensors(flat, prefix="transformer."):
    names = {name: "lm_head.weight" if name == "lm_head" else prefix + hf_name(name) for name in flat}
    return {names[name]: array for name, array in flat.items()}


def hf_config(config, **changes):
    """The config.json of the hub's gpt2, with changes. `...` deletes a field; None is the value null."""
    content = {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": config.n_vocab - 1, "embd_pdrop": 0.1, "eos_token_id": config.n_vocab - 1,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": config.n_ctx,
        "n_embd": config.n_embd, "n_head": config.n_head, "n_layer": config.n_layer, "n_positions": config.n_ctx,
        "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": config.n_vocab,
    }  # fmt: skip
    return {name: value for name, value in (content | changes).items() if value is not ...}


def write_huggingface(directory: Path, config, tensors, shards=1, **changes) -> Path:
    """Write a directory with the named tensors, in one file or in several with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(config, **changes)), encoding="utf-8")
    if shards == 1:
        safetensors.numpy.save_file(tensors, directory / SAFETENSORS, {"format": "pt"})
        return directory
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        safetensors.numpy.save_file(part, directory / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    write_shard_index(directory, weight_map)
    return directory


def write_shard_index(directory: Path, weight_map):
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


# ---- vocabularies


def copy_vocabulary(source: Path, directory: Path, names=("encoder.json", "vocab.bpe")):
    for name, target in zip(("encoder.json", "vocab.bpe"), names, strict=True):
        shutil.copyfile(source / name, directory / target)


def merges_of(source: Path) -> list[list[str]]:
    lines = (source / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    return [line.split(" ") for line in lines[1:] if line]


def write_tokenizer_json(path: Path, source: Path, pairs=False, **changes):
    """A tokenizer.json like that of the hub's gpt2, with merges as "a b" or, as newer ones, ["a", "b"]."""
    ids = json.loads((source / "encoder.json").read_text(encoding="utf-8"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": ids,
        "merges": [pair if pairs else " ".join(pair) for pair in merges_of(source)],
    }  # fmt: skip
    content = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": ids["<|endoftext|>"], "content": "<|endoftext|>", **flags}],
        "normalizer": None, "pre_tokenizer": level, "post_processor": level, "decoder": level, "model": model,
    }  # fmt: skip
    path.write_text(json.dumps(content | changes), encoding="utf-8")
