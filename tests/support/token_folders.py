"""Text to prepare and tokens to read, for the tests of training data."""

import json
from pathlib import Path

import numpy as np

from gpt2_jax.data.token_files import Tokens

DOCUMENTS = [
    "First Citizen:\nBefore we proceed any further, hear me speak.\n",
    "Speak, speak.",
    "You are all resolved rather to die than to famish? \n\n",
    "  A caf\xe9, \u6f22\u5b57 and \U0001f98a; it's 7 o'clock.\r\n",
    "<|endoftext|> is text here",
]


def write_jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def expected_ids(tokenizer, documents) -> list[int]:
    """The ids of each document, with an end-of-text after it."""
    return [i for document in documents for i in [*tokenizer.encode(document), tokenizer.eot]]


def held(tokens: Tokens) -> list[int]:
    """All ids of a split."""
    return tokens.read(0, tokens.n_tokens)[0].tolist()


def snapshot(folder: Path) -> dict:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def counting(path: Path, n_tokens: int, mask: np.ndarray | None = None) -> Tokens:
    """Tokens whose ids are their positions in the text."""
    np.arange(n_tokens, dtype="<u2").tofile(path)
    if mask is not None:
        mask.astype(np.uint8).tofile(path.with_suffix(".mask"))
    return Tokens(path, n_tokens, 0xFFFF, None if mask is None else path.with_suffix(".mask"))
