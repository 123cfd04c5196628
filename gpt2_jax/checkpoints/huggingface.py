"""Hugging Face's format of GPT-2: config.json and safetensors, with Hugging Face's names and OpenAI's orientation.

Hugging Face's GPT-2 keeps OpenAI's Conv1D, so nothing is transposed. Names and orientations of other programs are read
too (`names`). A file that this project wrote contains a sha256 of each tensor. In other files, only the header, the
names, the shapes and the finiteness of the values can be checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.checkpoints import huggingface_labels, names, pickles, safetensors
from gpt2_jax.checkpoints.config_words import in_hugging_face_words, leaves_nanogpts_gelu_open
from gpt2_jax.checkpoints.integrity import DamagedError, Leaves, read_manifest, warn, write_manifest
from gpt2_jax.checkpoints.vocabulary_files import write_json
from gpt2_jax.config import DROPOUT_RATES, HPARAMS, SIZES, VARIANTS, GPT2Config
from gpt2_jax.files import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

HPARAM_NAMES = {
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
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
_NOT_STORED = re.compile(rf"{names.BUFFER.pattern}|{names.OTHER_HEAD.pattern}|(lm_head|wte)\.weight")


def hugging_face_name(name: str) -> str:
    """Return Hugging Face's name of a parameter: "h0/attn/c_attn/w" becomes "transformer.h.0.attn.c_attn.weight"."""
    return ("" if name in ("lm_head", "score/w") else names.ROOT) + names.hugging_face_keys(name)[0]


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
    try:
        fields = in_hugging_face_words(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
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


def read(directory: Path, dtype: np.dtype | None = None) -> tuple[GPT2Config, Leaves]:
    """Read a directory in Hugging Face's format: one weights file, or several with an index.

    The tensors may have the names of any program in `names`, with the prefixes of wrappers. The head of a classifier
    (GPT2ForSequenceClassification) is read with its labels. Mask buffers and heads for other tasks are skipped by name.

    Args:
      directory: the folder.
      dtype: the dtype into which the caller casts. Then the tensors may have any float dtypes, also different ones.

    Returns:
      config, leaves. The config's param_dtype is the dtype of the tensors, or `dtype`. Each leaf is read when it is
      requested, in its stored dtype. As in transformers 5, the output head is tied if config.json says so and no other
      head is stored.

    Warns:
      UserWarning: a head for another task is left out; config.json says that the head is tied, but the stored one is
        not equal to `wte`; config.json does not say which GELU the weights of nanoGPT have; or an adapter of PEFT is
        left out.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: config.json describes another architecture, or the tensors do not match config.json.
      DamagedError: a file is damaged.
    """
    config = read_config(directory)
    tensors, manifest, source = _find_tensors(directory)
    hashes = saved = None
    if manifest is not None:
        saved, more = read_manifest(manifest, source)
        hashes = {names.short(key): value for key, value in more["sha256"].items()}
        wrong = [name for name in (*HPARAMS, *VARIANTS) if getattr(saved, name) != getattr(config, name)]
        if wrong:
            message = ", ".join(f"{name} = {getattr(config, name)} instead of {getattr(saved, name)}" for name in wrong)
            raise DamagedError(f"{directory / 'config.json'} does not match {source}: it has {message}")
        config = config.replace(qkv_bias=saved.qkv_bias)
    config = huggingface_labels.with_labels(config, directory / "config.json", tensors, saved)
    matched = names.match(tensors, config, source, "config.json", lambda some: safetensors.read(some, None), dtype)
    first = names.hugging_face_keys("h0/attn/c_attn/w")[0]
    if first in matched.transposed and any(key.endswith(names.ROOT + first) for key in tensors):
        _warn_of_guessed_gelu(directory / "config.json", config.activation_function)
    for adapter in pickles.ADAPTERS:
        if (directory / adapter).is_file():
            warn(
                f"{directory / adapter} is left out, because its folder holds a model too: to load an adapter, give it "
                "a folder of its own, with adapter_config.json"
            )
    return matched.config, matched.leaves(safetensors.read(matched.tensors, hashes))


def _warn_of_guessed_gelu(path: Path, assumed: str) -> None:
    """Warn if weights have nanoGPT's names and orientation, and config.json does not say which GELU they have.

    mlx-lm has the same orientation, and other prefixes. Its GELU is OpenAI's.
    """
    if leaves_nanogpts_gelu_open(read_json(path)):
        warn(
            f"{path} does not name activation_function, and the weights are those of nanoGPT: {assumed} is assumed; "
            'write "activation_function": "gelu" into it for nanoGPT since June 2023, or "gelu_new" for older '
            "versions, build-nanogpt and minGPT"
        )


def _find_tensors(directory: Path) -> tuple[dict[str, safetensors.Stored], str | None, Path]:
    """Return the tensors by their names, the manifest or None, and the file to name in messages."""
    index = directory / INDEX
    if (directory / WEIGHTS).is_file() or not index.is_file():
        tensors, metadata = safetensors.read_header(directory / WEIGHTS)
        return tensors, metadata.get("gpt2_jax"), directory / WEIGHTS
    weight_map = read_index(index)
    found: dict[str, safetensors.Stored] = {}
    for file in sorted(set(weight_map.values())):
        tensors, _ = safetensors.read_header(directory / file)
        if twice := sorted(found.keys() & tensors.keys()):
            raise ValueError(f"{found[twice[0]].path} and {directory / file} both hold {twice[0]}")
        _check_listed(weight_map, file, tensors, index)
        found |= tensors
    return found, None, index


def read_index(path: Path) -> dict[str, str]:
    """Return {tensor: file} of an index of several files of weights.

    Raises:
      FileNotFoundError: the index does not exist.
      ValueError: it is malformed, or names a file in another folder.
    """
    fields = read_json(path)
    weight_map = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{path} must map each tensor to its file, under weight_map")
    if wrong := sorted(file for file in weight_map.values() if Path(file).name != file):
        raise ValueError(f"{path} names {wrong[0]}, which is not a file in the same folder")
    return weight_map


def _check_listed(weight_map: Mapping[str, str], file: str, tensors: Mapping[str, Any], index: Path) -> None:
    """Check that an index and one of its files agree on the tensors in that file.

    Some programs leave a tensor out of the index, or list what the files do not hold: buffers, heads for other tasks,
    and a tied output head under its other name.
    """
    listed = {key for key, where in weight_map.items() if where == file}
    absent = {key for key in listed - tensors.keys() if not _NOT_STORED.fullmatch(names.short(key))}
    unlisted = {key for key in tensors.keys() - listed if key in weight_map}
    if wrong := sorted(absent | unlisted):
        raise ValueError(f"{index} and {index.parent / file} do not agree on whether {wrong[0]} is in that file")


def is_ours(directory: Path) -> bool:
    """Say whether this project wrote a directory's model.safetensors."""
    try:
        return "gpt2_jax" in safetensors.read_header(directory / WEIGHTS)[1]
    except ValueError:
        return False


def write(directory: Path, config: GPT2Config, flat: Mapping[str, np.ndarray]) -> None:
    """Write config.json and model.safetensors, with a sha256 of each tensor, into an empty directory."""
    arrays = {hugging_face_name(name): array.T if name == "score/w" else array for name, array in flat.items()}

    def metadata(hashes: Mapping[str, str]) -> dict[str, str]:
        return {"format": "pt", "gpt2_jax": write_manifest(config, hashes)}

    with safetensors.writing(directory / WEIGHTS, arrays, metadata) as add:
        for key, array in arrays.items():
            add(key, array)
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
    if config.labels:
        fields |= huggingface_labels.fields_of(config, end_of_text)
    write_json(directory / "config.json", fields)
