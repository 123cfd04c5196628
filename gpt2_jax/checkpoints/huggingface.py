"""Hugging Face's format of GPT-2: config.json and safetensors, with Hugging Face's names and OpenAI's orientation.

Hugging Face's GPT-2 keeps OpenAI's Conv1D, so nothing is transposed. A file that this project wrote contains a sha256
of each tensor. In other files, only the header, the names, the shapes and the finiteness of the values can be checked.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.checkpoints import safetensors
from gpt2_jax.checkpoints.huggingface_tokenizer import write_json
from gpt2_jax.checkpoints.integrity import DamagedError, Leaves, read_manifest, sha256, stored_dtype, write_manifest
from gpt2_jax.config import DROPOUT_RATES, HPARAMS, SIZES, VARIANTS, GPT2Config
from gpt2_jax.files import read_json
from gpt2_jax.model import abstract_params
from gpt2_jax.params import differences, flatten

HEAD, EMBEDDING = "lm_head.weight", "wte.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ROOT = "transformer."
CHUNK = 2**23  # bytes of two tensors that are compared at a time
MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, which old files store as a tensor

HPARAM_NAMES = {
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}
OTHER_NAMES = {  # names that transformers also accepts in config.json; if both are there, it uses these
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
ARITHMETIC = {  # the allowed values of each field; the first one is also the default
    "model_type": ("gpt2",),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
    "pruned_heads": ({}, None),
}


def hugging_face_name(name: str) -> str:
    """Return Hugging Face's name of a parameter: "h0/attn/c_attn/w" becomes "transformer.h.0.attn.c_attn.weight"."""
    if name == "lm_head":
        return HEAD
    *path, last = re.sub(r"^h(\d+)/", r"h/\1/", name).split("/")
    return ROOT + ".".join([*path, {"w": "weight", "g": "weight", "b": "bias"}.get(last, f"{last}.weight")])


def read_config(directory: Path) -> GPT2Config:
    """Read config.json. The param_dtype is always float32, and the head is tied if the file says so or says nothing.

    The weights may have another dtype, and an output head of their own: `read` returns the config that fits them.

    Raises:
      FileNotFoundError: the file is not there.
      ValueError: it is malformed, or requires arithmetic that GPT2Config does not have. The message names the field.
    """
    path = directory / "config.json"
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold fields and values")
    fields |= {name: fields[other] for other, name in OTHER_NAMES.items() if other in fields}
    for field, allowed in ARITHMETIC.items():
        value = fields.get(field, allowed[0])
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            raise ValueError(f"{path} has {field} = {value!r}, which is not supported: GPT-2 has {allowed[0]!r}")
    if missing := [name for name in HPARAM_NAMES.values() if name not in fields]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    more = {name: fields[name] for name in (*DROPOUT_RATES, *VARIANTS) if name in fields}
    try:
        config = GPT2Config(**{ours: fields[theirs] for ours, theirs in HPARAM_NAMES.items()}, **more)
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

    The prefix `transformer.` of keys is optional. Mask buffers are skipped by name.

    Returns:
      config, leaves. The config's param_dtype is the dtype of the tensors. Each leaf is read when it is requested. As
      in transformers 5, the output head is tied if config.json says so and no other head is stored.

    Warns:
      UserWarning: config.json says that the head is tied, but `lm_head.weight` is not equal to `wte.weight`.

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
        wrong = [name for name in (*HPARAMS, *VARIANTS) if getattr(saved, name) != getattr(config, name)]
        if wrong:
            message = ", ".join(f"{name} = {getattr(config, name)} instead of {getattr(saved, name)}" for name in wrong)
            raise DamagedError(f"{directory / 'config.json'} does not match {source}: it has {message}")
        config = config.replace(qkv_bias=saved.qkv_bias)
    if not config.tie_word_embeddings and HEAD not in tensors:
        raise ValueError(f"config.json says tie_word_embeddings = False, but {source} has no {HEAD}: the output head")
    config = config.replace(tie_word_embeddings=config.tie_word_embeddings and _tied(tensors))
    if config.n_layer > len(tensors):  # checked before a tree of that many layers is built
        raise ValueError(f"config.json says n_layer = {config.n_layer}, but {source} has {len(tensors)} tensors")
    config = config.replace(param_dtype=stored_dtype((tensor.dtype for tensor in tensors.values()), source))
    expected = flatten(abstract_params(config))
    names = {_short(hugging_face_name(name)): name for name in expected}
    if wrong := differences(tensors, {key: expected[name] for key, name in names.items()}):
        raise ValueError(f"{source} does not hold the GPT-2 that config.json describes:\n  " + "\n  ".join(wrong))
    return config, _leaves(tensors, names, hashes)


def _leaves(
    tensors: Mapping[str, safetensors.Stored], names: Mapping[str, str], hashes: Mapping[str, str] | None
) -> Leaves:
    for key, array in safetensors.read(tensors, hashes):
        yield names[key], array


def _tied(tensors: dict[str, safetensors.Stored]) -> bool:
    """Return whether the stored tensors have one array for embedding and head; then leave only the embedding."""
    head = tensors.pop(HEAD, None)
    if head is None:
        return True
    if EMBEDDING not in tensors:  # the same array under its other name
        tensors[EMBEDDING] = head
    elif not _equal(head, tensors[EMBEDDING]):
        tensors[HEAD] = head
        warnings.warn(
            f"config.json says that the output head is tied, but {HEAD} in {head.path} is not equal to {EMBEDDING}: "
            "the head is loaded as a parameter of its own, lm_head, as in transformers 5",
            stacklevel=6,  # the caller of `load`
        )
        return False
    return True


def _equal(a: safetensors.Stored, b: safetensors.Stored) -> bool:
    """Compare the bytes of two stored tensors, a part at a time."""
    if a.shape != b.shape or a.dtype != b.dtype or not isinstance(a.dtype, np.dtype):
        return False
    with a.path.open("rb") as file_a, b.path.open("rb") as file_b:
        file_a.seek(a.offset)
        file_b.seek(b.offset)
        parts = (min(CHUNK, a.n_bytes - start) for start in range(0, a.n_bytes, CHUNK))
        return all(file_a.read(size) == file_b.read(size) for size in parts)


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
    fields |= {name: getattr(config, name) for name in VARIANTS}
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
