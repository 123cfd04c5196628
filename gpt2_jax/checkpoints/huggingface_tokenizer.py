"""Hugging Face's tokenizer files: vocab.json, merges.txt, tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpt2_jax.files import read_json
from gpt2_jax.tokenizer import (
    ADDED_TOKENS,
    END_OF_TEXT,
    MERGES,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    VOCAB_JSON,
    Tokenizer,
)


def read(directory: Path) -> Tokenizer:
    """Read vocab.json and merges.txt, or tokenizer.json if they are missing.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is malformed, or describes something other than GPT-2's byte-level BPE.
    """
    settings = directory / TOKENIZER_CONFIG
    asked = read_json(settings) if settings.is_file() else {}
    for field in ("add_prefix_space", "add_bos_token"):
        if isinstance(asked, dict) and asked.get(field):
            raise ValueError(f"{settings} has {field} = {asked[field]!r}, which GPT-2's tokenizer does not support")
    if (directory / VOCAB_JSON).is_file() or not (directory / TOKENIZER_JSON).is_file():
        added = directory / ADDED_TOKENS
        more = read_json(added) if added.is_file() else {}
        return Tokenizer.from_files(directory / VOCAB_JSON, directory / MERGES, more)
    path = directory / TOKENIZER_JSON
    fields = read_json(path)
    try:
        model, splitter = fields["model"], fields["pre_tokenizer"]
        byte_level = (
            splitter["type"] == "ByteLevel" and not splitter["add_prefix_space"] and splitter.get("use_regex", True)
        )
        plain = model.get("type", "BPE") == "BPE" and not fields.get("normalizer") and not model.get("dropout")
        plain = plain and not model.get("ignore_merges")
        plain = plain and (fields.get("post_processor") or {"type": "ByteLevel"})["type"] == "ByteLevel"
        added = {token["content"]: token["id"] for token in fields.get("added_tokens", [])}
        merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        tokens = model["vocab"] | added
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} does not describe a byte-level BPE: its model (vocab, merges), pre_tokenizer or added_tokens are "
            "not in the format of Hugging Face's tokenizers library"
        ) from error
    if not byte_level or not plain:
        raise ValueError(f"{path} does not split text as GPT-2's byte-level BPE does")
    return Tokenizer(tokens, merges, path, path, first_line=1)


def write(directory: Path, tokenizer: Tokenizer, n_ctx: int) -> None:
    """Write vocab.json, merges.txt, tokenizer.json, tokenizer_config.json, and the end-of-text ids of config.json."""
    tokenizer.to_files(directory / VOCAB_JSON, directory / MERGES)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    write_json(
        directory / TOKENIZER_JSON,
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": token, **plain} for token, i in tokenizer.added.items()],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": byte_level | {"trim_offsets": False},
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": tokenizer.tokens,
                "merges": [f"{left} {right}" for left, right in tokenizer.merges],
            },
        },
    )
    write_json(
        directory / TOKENIZER_CONFIG,
        {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": n_ctx,
            "add_prefix_space": False,
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
        },
    )
    fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    write_json(directory / "config.json", fields | {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot})


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """Write a JSON file as Hugging Face does."""
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
