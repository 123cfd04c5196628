"""What each file of a model's directory is for."""

from __future__ import annotations

import fnmatch
import glob
import re
from pathlib import Path
from typing import Any

from gpt2_jax.tokenizer import (
    ADDED_TOKENS,
    MERGES,
    OPENAI_FILES,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    VOCAB_JSON,
)

# File name patterns and what the files are for, by form, and then for all forms. The first pattern that matches counts.
WEIGHTS = {
    "tensorflow": {
        "checkpoint": "names the checkpoint to read; text",
        "hparams.json": "the five hyperparameters; text",
        "*.index": "where each tensor is in the data file: name, shape, dtype, offset, checksum",
        "*.data-*-of-*": "the weights, one tensor after another",
    },
    "huggingface": {
        "config.json": "the hyperparameters; text",
        "model.safetensors": "a header with names and shapes, then the weights, one tensor after another",
        "model.safetensors.index.json": "which file holds which tensor; text",
        "model-*-of-*.safetensors": "a part of the weights",
    },
    "orbax": {
        "gpt2_jax.json": "the hyperparameters and the sha256 of each tensor; text",
        "params/": "the weights, as Orbax writes them",
    },
    "flax": {
        "config.json": "the hyperparameters; text",
        "flax_model*.msgpack": "the weights, as nested dicts of arrays",
        "flax_model.msgpack.index.json": "which file holds which array; text",
    },
    "llmc": {"*.bin": "a header with the hyperparameters, then the weights, one tensor after another"},
    "orbax_tree": {
        "config.json": "the hyperparameters; text",
        "hparams.json": "the five hyperparameters; text",
        "*/": "the weights, as Orbax writes them, perhaps in a folder inside",
        "_METADATA": "the names of the tensors; text",
    },
    "checkpoint": {
        "checkpoint.json": "the names and shapes of all tensors and the sha256 of each file; text",
        "params/": "the weights, as Orbax writes them",
        "lora/": "LoRA's low-rank matrices, whose product is added to the weights",
    },
    "peft": {
        "adapter_config.json": "the settings of LoRA and the name of the base model; text",
        "adapter_model.safetensors": "LoRA's low-rank matrices, whose product is added to the weights",
    },
}
SHARDED = ("model.safetensors.index.json", "model-*-of-*.safetensors")
IN_TWO = ("the vocabulary: token to id; text", "the merges of byte-pair encoding, in order; text")
TOKENIZER_SETTINGS = {
    TOKENIZER_CONFIG: "Hugging Face's tokenizer settings",
    SPECIAL_TOKENS_MAP: "the names of special tokens",
    ADDED_TOKENS: "tokens that were added to the vocabulary",
}
VOCABULARIES = (  # the first one with a file in the directory is read
    dict(zip(OPENAI_FILES, IN_TWO, strict=True)),
    {TOKENIZER_JSON: "the vocabulary, the merges and how text is split; text"} | TOKENIZER_SETTINGS,
    dict(zip((VOCAB_JSON, MERGES), IN_TWO, strict=True)) | TOKENIZER_SETTINGS,
)
PICKLED = "pickled weights; never opened: a pickle can run code"
NOT_READ = {
    **dict.fromkeys((OPENAI_FILES[0], VOCAB_JSON, TOKENIZER_JSON), "the same vocabulary in another form"),
    **dict.fromkeys((OPENAI_FILES[1], MERGES), "the same merges in another form"),
    "*.meta": "TensorFlow's computation graph; not needed to read the weights",
    "*.index": "another checkpoint's index",
    "*.data-*-of-*": "another checkpoint's weights",
    "model*.safetensors*": "the same weights in another form",
    **dict.fromkeys(("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle"), PICKLED),
    "*.h5": "the weights for Keras",
    "*.msgpack": "the weights for Flax, under Hugging Face's names",
    "*.onnx": "the weights for ONNX",
    "generation_config.json": "Hugging Face's sampling defaults",
    **TOKENIZER_SETTINGS,
    "trainer/": "the optimizer's state, to resume training",
    **dict.fromkeys(("_CHECKPOINT_METADATA", "orbax.checkpoint", "commit_success.txt"), "Orbax's metadata"),
    "*.md": "a description",
    "*": "",
}


def list_files(path: Path, form: str) -> list[dict[str, Any]]:
    """List the files in a model's directory. Those that `load` and `load_tokenizer` read come first.

    Args:
      path: the directory; or the file, or the prefix of a TensorFlow checkpoint, that is read in its folder.
      form: the form of the model.

    Returns:
      For each file or folder ("params/"): name, bytes (of all files in it), used, purpose ("" if it is not known).
    """
    directory = path if path.is_dir() else path.absolute().parent
    paths = {path.name + "/" * path.is_dir(): path for path in sorted(directory.iterdir())}
    vocabulary = next(
        (files for files in VOCABULARIES if (files.keys() - TOKENIZER_SETTINGS.keys()) & paths.keys()), {}
    )
    weights = WEIGHTS[form]
    newest = _newest(directory) if form == "tensorflow" else None
    newest = path.name if path != directory else newest
    if newest and form == "llmc":
        weights = {glob.escape(newest): text for text in weights.values()}
    elif newest:
        weights = {glob.escape(newest): "the weights, one tensor after another", **weights}
        weights = {pattern.replace("*.", glob.escape(newest) + "."): text for pattern, text in weights.items()}
    if "model.safetensors" in paths:  # it is read even if there is an index too
        weights = {pattern: text for pattern, text in weights.items() if pattern not in SHARDED}
    rows = []
    for name, entry in paths.items():
        used = _purpose(name, weights | vocabulary)
        size = sum(part.stat().st_size for part in (entry.rglob("*") if entry.is_dir() else [entry]) if part.is_file())
        purpose = _purpose(name, NOT_READ) if used is None else used
        rows.append({"name": name, "bytes": size, "used": used is not None, "purpose": purpose})
    return sorted(rows, key=lambda row: not row["used"])


def _purpose(name: str, purposes: dict[str, str]) -> str | None:
    return next((text for pattern, text in purposes.items() if fnmatch.fnmatchcase(name, pattern)), None)


def _newest(directory: Path) -> str | None:
    """Return the checkpoint name in TensorFlow's pointer file, without the folder of the machine that wrote it."""
    pointer = directory / "checkpoint"
    text = pointer.read_text("utf-8", errors="replace") if pointer.is_file() else ""
    match = re.search(r'^model_checkpoint_path: "(?:.*[/\\])?(.+)"', text, re.MULTILINE)
    return match and match[1]
