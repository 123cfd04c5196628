"""Hugging Face's format of GPT-2: config.json and safetensors, with Hugging Face's names and OpenAI's orientation.

Hugging Face's GPT-2 keeps OpenAI's Conv1D, so nothing is transposed. A file that this project wrote contains a sha256
of each tensor. In other files, only the header, the names, the shapes and the finiteness of the values can be checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.checkpoints import safetensors
from gpt2_jax.checkpoints.integrity import DamagedError, Leaves, read_manifest, sha256, stored_dtype, write_manifest
from gpt2_jax.checkpoints.vocabulary_files import write_json
from gpt2_jax.config import DROPOUT_RATES, HPARAMS, SIZES, GPT2Config
from gpt2_jax.files import read_json
from gpt2_jax.model import abstract_params
from gpt2_jax.params import differences, flatten

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ROOT = "transformer."
MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, which old files store as a tensor

HPARAM_NAMES = {
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}
ARITHMETIC = {  # the allowed values of each field; the first one is also the default
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "tie_word_embeddings": (True,),
    "quantization_config": (None,),
    "pruned_heads": ({}, None),
}


def hugging_face_name(name: str) -> str:
    """Return Hugging Face's name of a parameter: "h0/attn/c_attn/w" becomes "transformer.h.0.attn.c_attn.weight"."""
    *path, last = re.sub(r"^h(\d+)/", r"h/\1/", name).split("/")
    return ROOT + ".".join([*path, {"w": "weight", "g": "weight", "b": "bias"}.get(last, f"{last}.weight")])


def read_config(directory: Path) -> GPT2Config:
    """Read config.json. The param_dtype is always float32; the weights may have another one.

    Raises:
      FileNotFoundError: the file is not there.
      ValueError: it is malformed, or requires arithmetic that is not GPT-2's. The message names the field.
    """
    path = directory / "config.json"
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold fields and values")
    for field, allowed in ARITHMETIC.items():
        value = fields.get(field, allowed[0])
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            raise ValueError(f"{path} has {field} = {value!r}, which is not supported: GPT-2 has {allowed[0]!r}")
    if missing := [name for name in HPARAM_NAMES.values() if name not in fields]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    rates = {name: fields[name] for name in DROPOUT_RATES if name in fields}
    try:
        config = GPT2Config(**{ours: fields[theirs] for ours, theirs in HPARAM_NAMES.items()}, **rates)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if fields.get("n_inner") not in (None, 4 * config.n_embd):
        raise ValueError(
            f"{path} has n_inner = {fields['n_inner']!r}, which is not supported: GPT-2 has 4 * n_embd = "
            f"{4 * config.n_embd}"
        )
    return config


def read(directory: Path) -> tuple[GPT2Config, Leaves]:
    """Read a directory in Hugging Face's format: one weights file, or several with an index.

    The prefix `transformer.` of keys is optional. Mask buffers are skipped by name. `lm_head.weight` must equal `wte`.

    Returns:
      config, leaves. The config's param_dtype is the dtype of the tensors. Each leaf is read when it is requested.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: config.json describes another architecture, or the tensors do not match config.json.
      DamagedError: a file is damaged.
    """
    config = read_config(directory)
    tensors, manifest, source = _find_tensors(directory)
    hashes = None
    if manifest is not None:
        saved, more = read_manifest(manifest, source)
        hashes = {_short(key): value for key, value in more["sha256"].items()}
        wrong = [name for name in HPARAMS if getattr(saved, name) != getattr(config, name)]
        if wrong:
            message = ", ".join(f"{name} = {getattr(config, name)} instead of {getattr(saved, name)}" for name in wrong)
            raise DamagedError(f"{directory / 'config.json'} does not match {source}: it has {message}")
        config = config.replace(qkv_bias=saved.qkv_bias)
    head = tensors.pop("lm_head.weight", None)
    if head is not None and "wte.weight" not in tensors:  # the same array under its other name
        tensors["wte.weight"], head = head, None
    if config.n_layer > len(tensors):  # checked before a tree of that many layers is built
        raise ValueError(f"config.json says n_layer = {config.n_layer}, but {source} has {len(tensors)} tensors")
    config = config.replace(param_dtype=stored_dtype((tensor.dtype for tensor in tensors.values()), source))
    expected = flatten(abstract_params(config))
    names = {_short(hugging_face_name(name)): name for name in expected}
    if wrong := differences(tensors, {key: expected[name] for key, name in names.items()}):
        raise ValueError(f"{source} does not hold the GPT-2 that config.json describes:\n  " + "\n  ".join(wrong))
    return config, _leaves(tensors, names, hashes, head)


def _leaves(
    tensors: Mapping[str, safetensors.Stored],
    names: Mapping[str, str],
    hashes: Mapping[str, str] | None,
    head: safetensors.Stored | None,
) -> Leaves:
    for key, array in safetensors.read(tensors, hashes):
        if key == "wte.weight" and head is not None:
            _check_tied(array, head)
        yield names[key], array


def _check_tied(wte: np.ndarray, head: safetensors.Stored) -> None:
    """Check that a stored output head is equal to `wte`. GPT-2 uses one array for both."""
    same = head.shape == wte.shape and head.dtype == wte.dtype
    if same:
        _, array = next(safetensors.read({"lm_head.weight": head}, None))
        same = np.array_equal(array.view(np.uint8), wte.view(np.uint8))
    if not same:
        raise ValueError(
            f"lm_head.weight in {head.path} is not equal to wte.weight: a separate output head is not supported, "
            "because GPT-2 uses one array for both"
        )


def _find_tensors(directory: Path) -> tuple[dict[str, safetensors.Stored], str | None, Path]:
    """Return the tensors by their short keys, the manifest or None, and the file to name in messages."""
    index = directory / INDEX
    if (directory / WEIGHTS).is_file() or not index.is_file():
        tensors, metadata = safetensors.read_header(directory / WEIGHTS)
        return _shorten(tensors, directory / WEIGHTS), metadata.get("gpt2_jax"), directory / WEIGHTS
    weight_map = read_json(index)
    weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} must map each tensor to its file, under weight_map")
    found = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise ValueError(f"{index} names {file}, which is not a file in the same folder")
        tensors, _ = safetensors.read_header(directory / file)
        listed = {key for key, where in weight_map.items() if where == file}
        if listed != tensors.keys():
            key = min(listed ^ tensors.keys())
            raise ValueError(f"{index} and {directory / file} do not agree on whether {key} is in that file")
        found |= tensors
    return _shorten(found, index), None, index


def _shorten(tensors: Mapping[str, safetensors.Stored], source: Path) -> dict[str, safetensors.Stored]:
    short = {_short(key): tensor for key, tensor in tensors.items()}
    if len(short) < len(tensors):
        raise ValueError(f"{source} holds names both with and without the prefix {ROOT}")
    return {key: tensor for key, tensor in short.items() if not MASKS.fullmatch(key)}


def _short(key: str) -> str:
    return key.removeprefix(ROOT)


def is_ours(directory: Path) -> bool:
    """Say whether this project wrote a directory's model.safetensors."""
    try:
        return "gpt2_jax" in safetensors.read_header(directory / WEIGHTS)[1]
    except ValueError:
        return False


def write(directory: Path, config: GPT2Config, flat: Mapping[str, np.ndarray]) -> None:
    """Write config.json and model.safetensors, with a sha256 of each tensor, into an empty directory."""
    arrays = {hugging_face_name(name): array for name, array in flat.items()}
    manifest = write_manifest(config, {key: sha256(array) for key, array in arrays.items()})
    safetensors.write(directory / WEIGHTS, arrays, {"format": "pt", "gpt2_jax": manifest})
    fields: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in HPARAM_NAMES.items()}
    fields |= {name: getattr(config, name) for name in DROPOUT_RATES}
    fields |= {field: values[0] for field, values in ARITHMETIC.items() if values[0] not in (None, {})}
    end_of_text = min(config.n_vocab, SIZES["124M"].n_vocab) - 1  # the last id, or GPT-2's if rows were added
    fields |= {
        "architectures": ["GPT2LMHeadModel"],
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": config.param_dtype.name,
        "initializer_range": 0.02,
        "n_inner": None,
        "use_cache": True,
    }
    write_json(directory / "config.json", fields)
