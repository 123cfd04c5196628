"""The files of a vocabulary, as text to write: OpenAI's two, or Hugging Face's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2_jax.tokenizer import (
    END_OF_TEXT,
    MERGES,
    OPENAI_FILES,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    VOCAB_JSON,
    Tokenizer,
)

NAMED = ("bos_token", "eos_token", "unk_token")


def own_files(tokenizer: Tokenizer, n_ctx: int | None = None) -> dict[str, str]:
    """Return {name: content} of encoder.json and vocab.bpe, or of Hugging Face's files if these two cannot hold it."""
    if not tokenizer.fits_openai_files:
        return huggingface_files(tokenizer, n_ctx)
    return dict(zip(OPENAI_FILES, tokenizer.openai_texts(), strict=True))


def huggingface_files(tokenizer: Tokenizer, n_ctx: int | None = None, beside_config: bool = False) -> dict[str, str]:
    """Return {name: content} of the files that transformers opens with the same ids.

    `beside_config` says that a config.json beside the files will hold `special_ids`.

    OpenAI's form has the class GPT2Tokenizer, and vocab.json and merges.txt for programs that need them. Any other
    tokenizer is in tokenizer.json, as Hugging Face's library writes it.
    """
    fields = tokenizer.description()
    settings = _settings(tokenizer, beside_config) | ({} if n_ctx is None else {"model_max_length": n_ctx})
    named = {value for name, value in settings.items() if name.endswith("_token") and isinstance(value, str)}
    named |= {token for token in settings.get("extra_special_tokens", ()) if isinstance(token, str)}
    if tokenizer.is_openai_form and not named & (tokenizer.added.keys() - tokenizer.special):
        texts = dict(zip((VOCAB_JSON, MERGES), tokenizer.openai_texts(), strict=True))
        own = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": n_ctx, "add_prefix_space": False}
        settings = own | settings | {"add_prefix_space": False}
    else:
        texts = {}
        # Without added_tokens_decoder, transformers would make added tokens special because they have a name.
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {}} | settings
    return texts | {TOKENIZER_JSON: _as_json(fields), TOKENIZER_CONFIG: _as_json(settings)}


def _settings(tokenizer: Tokenizer, beside_config: bool) -> dict[str, Any]:
    """Return the fields of tokenizer_config.json that were read, with a name for the end of text.

    Beside a config.json the fields stay as they were unless `eot` was changed, because its eos_token_id holds `eot`.
    """
    if tokenizer.settings is None:  # it was not read from Hugging Face's files
        return dict.fromkeys(NAMED, None if tokenizer.eot is None else name_of(tokenizer, tokenizer.eot))
    settings = dict.fromkeys(NAMED) | dict(tokenizer.settings)  # GPT2Tokenizer would use `<|endoftext|>`
    kept = tokenizer.eot_of_files if beside_config else tokenizer.tokens.get(END_OF_TEXT)
    if tokenizer.eot not in (None, kept):
        settings["eos_token"] = name_of(tokenizer, tokenizer.eot)
    return settings


def name_of(tokenizer: Tokenizer, i: int | None) -> str | None:
    """Return the token with this id."""
    return next((token for token, other in tokenizer.tokens.items() if other == i), None)


def special_ids(tokenizer: Tokenizer, n_vocab: int) -> dict[str, int | None]:
    """Return bos_token_id, eos_token_id and pad_token_id for config.json. An id without a row is left out."""

    settings = {} if tokenizer.settings is None else _settings(tokenizer, beside_config=True)

    def named(name: str) -> int | None:
        i = tokenizer.tokens.get(settings.get(name) or "")
        return i if i is not None and i < n_vocab else None

    end = named("eos_token")
    ids = {"bos_token_id": named("bos_token"), "eos_token_id": tokenizer.eot if end is None else end}
    if ids["bos_token_id"] is None:
        ids["bos_token_id"] = tokenizer.eot
    pad = named("pad_token")
    return ids if pad is None else ids | {"pad_token_id": pad}


def write(directory: Path, files: Mapping[str, str]) -> None:
    """Write files into a folder."""
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a JSON file as Hugging Face does."""
    write(path.parent, {path.name: _as_json(fields)})


def _as_json(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, indent=2) + "\n"
