"""Byte-level BPE: a `tiktoken.Encoding` made from a model's encoder.json and vocab.bpe. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import tiktoken

from gpt2_jax.checks import whole_number
from gpt2_jax.files import read_json, read_text

END_OF_TEXT = "<|endoftext|>"

OPENAI_FILES = ("encoder.json", "vocab.bpe")
HUGGING_FACE_FILES = VOCAB_JSON, MERGES, TOKENIZER_JSON = ("vocab.json", "merges.txt", "tokenizer.json")
"""Names of vocabulary files. Hugging Face's first two, or its third, have the content of OpenAI's two files."""
TOKENIZER_CONFIG, ADDED_TOKENS = "tokenizer_config.json", "added_tokens.json"  # optional files of Hugging Face

# How the original (openai/gpt-2, src/encoder.py) splits text before merging: contractions, letters, numbers, the rest,
# and whitespace (without its last character if a word follows). Quantifiers are possessive where that changes nothing.
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# `\s+(?!\S)` backtracks, and tiktoken fails on a run of a million characters. So longer runs than this are cut.
LONGEST_RUN = 2**16
_SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"  # White_Space; Python's \s differs
_LONG_RUN = re.compile(rf"(?<!{_SPACE}){_SPACE}{{{LONGEST_RUN},}}+")  # tried only at the start of a run: linear time


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      eot: the id of `<|endoftext|>`, which separates documents.
      n_vocab: number of ids; every id is in [0, n_vocab).
      tokens: {token: id} in order of id, spelled as in OpenAI's encoder.json: one printable character per byte.
      merges: the pairs of tokens that merge, in order of priority.
      added: {token: id} of the tokens that are neither a byte nor the result of a merge: `<|endoftext|>`, and tokens
        added after it, such as "[PAD]". Ordinary text never becomes one of them.
    """

    eot: int
    n_vocab: int
    tokens: dict[str, int]
    merges: list[tuple[str, str]]
    added: dict[str, int]

    def __init__(
        self,
        tokens: dict[str, int],
        merges: Iterable[tuple[str, ...]],
        tokens_from: str | os.PathLike = "the tokens",
        merges_from: str | os.PathLike = "the merges",
        first_line: int = 1,
    ):
        """Take a vocabulary. The last three arguments are for messages: the files, and the line of the first merge.

        Raises:
          ValueError: the ids are not 0, 1, ..., do not follow the order of the merges, or do not match the merges.
        """
        pairs = [tuple(pair) for pair in merges]
        _check_tokens(tokens, tokens_from)
        ids = _match_merges(tokens, pairs, tokens_from, merges_from, first_line)
        self.merges = [(left, right) for left, right in pairs]
        self.tokens = dict(sorted(tokens.items(), key=operator.itemgetter(1)))
        self.eot = tokens[END_OF_TEXT]
        self.n_vocab = len(tokens)
        made = set(ids.values())
        self.added = {token: i for token, i in self.tokens.items() if i not in made}
        self._encoding = tiktoken.Encoding("gpt2-jax", pat_str=SPLIT, mergeable_ranks=ids, special_tokens=self.added)

    @classmethod
    def from_files(
        cls, encoder_json: str | os.PathLike, vocab_bpe: str | os.PathLike, added: Mapping[str, int] | None = None
    ) -> Tokenizer:
        """Read a vocabulary from OpenAI's two files (Hugging Face calls them vocab.json and merges.txt).

        Args:
          encoder_json: the file that maps every token to its id.
          vocab_bpe: the file with the merges, one per line.
          added: {token: id} of tokens that encoder_json does not have.

        Raises:
          FileNotFoundError: a file does not exist.
          ValueError: a file is malformed, or the two do not belong together; the message names the file.
        """
        tokens = read_json(Path(encoder_json))
        if added and isinstance(tokens, dict):
            tokens = {**tokens, **added}
        lines = read_text(Path(vocab_bpe)).splitlines()
        n_head = 1 if lines and lines[0].startswith("#version") else 0
        while lines and not lines[-1]:
            lines.pop()
        merges = (tuple(line.split(" ")) for line in lines[n_head:])
        return cls(tokens, merges, encoder_json, vocab_bpe, first_line=n_head + 1)

    def to_files(self, encoder_json: str | os.PathLike, vocab_bpe: str | os.PathLike) -> None:
        """Write the vocabulary as OpenAI's two files, in the format of the released ones, byte for byte."""
        Path(encoder_json).write_text(json.dumps(self.tokens), encoding="utf-8")
        lines = "".join(f"{left} {right}\n" for left, right in self.merges)
        Path(vocab_bpe).write_text(f"#version: 0.2\n{lines}", encoding="utf-8", newline="\n")

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Return the ids of a text of any length.

        Args:
          text: any str; a lone surrogate is read as U+FFFD.
          allow_special: True turns `<|endoftext|>` in the text into the id `eot`. By default it stays ordinary text.
        """
        if not isinstance(text, str):
            raise ValueError(f"text must be a str, not {type(text).__name__}")
        ids: list[int] = []
        for i, part in enumerate(text.split(END_OF_TEXT) if allow_special else [text]):
            if i:
                ids.append(self.eot)
            for piece in _cut_long_runs(part):
                ids += self._encoding.encode(piece, disallowed_special=())
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of a sequence of ids. Bytes that are not UTF-8 become U+FFFD.

        Raises:
          ValueError: an id is not a whole number in [0, n_vocab).
        """
        try:
            ids = [operator.index(i) for i in (np.asarray(ids) if hasattr(ids, "__array__") else ids)]
        except TypeError as error:
            raise ValueError(f"ids must be a sequence of whole numbers: {error}") from error
        for i in ids:
            if not 0 <= i < self.n_vocab:
                raise ValueError(f"id {i} is outside the vocabulary of {self.n_vocab} ids")
        return self._encoding.decode(ids, errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of one token. They may include parts of characters.

        Raises:
          ValueError: the id is not a whole number in [0, n_vocab).
        """
        return self._encoding.decode_single_token_bytes(whole_number("id", id, 0, self.n_vocab - 1))


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return the sha256 of a tokenizer's tokens and merges, in hexadecimal."""
    merges = [list(pair) for pair in tokenizer.merges]
    return hashlib.sha256(json.dumps([tokenizer.tokens, merges]).encode()).hexdigest()


def _cut_long_runs(text: str) -> Iterable[str]:
    """Cut a text where a token ends anyway: around long runs of whitespace, before their last character.

    The pattern ends a token before every run of whitespace. It takes the whole run, or all except the last character
    if a word follows.
    """
    start = 0
    for run in _LONG_RUN.finditer(text):
        end = run.end() if run.end() == len(text) else run.end() - 1
        yield from (text[start : run.start()], text[run.start() : end])
        start = end
    yield text[start:]


def _check_tokens(tokens: dict[str, int], source: str | os.PathLike) -> None:
    if not isinstance(tokens, dict) or not all(type(i) is int for i in tokens.values()):
        raise ValueError(f"{source} must map each token to its id")
    if sorted(tokens.values()) != list(range(len(tokens))):
        raise ValueError(f"{source} must give its {len(tokens)} tokens the ids 0 to {len(tokens) - 1}, each once")
    if END_OF_TEXT not in tokens:
        raise ValueError(f"{source} has no {END_OF_TEXT}")


def _match_merges(
    tokens: dict[str, int],
    merges: list[tuple[str, ...]],
    tokens_from: str | os.PathLike,
    merges_from: str | os.PathLike,
    first_line: int,
) -> dict[bytes, int]:
    """Return {byte sequence: id}, after checking that ids follow the order of the merges."""
    byte_of = _byte_characters()
    tokens_name = Path(tokens_from).name
    missing = [character for character in byte_of if character not in tokens]
    if missing:
        raise ValueError(f"{tokens_from} has no token for the byte {byte_of[missing[0]]:#04x} ({missing[0]!r})")
    names = list(byte_of)
    last = -1
    for number, pair in enumerate(merges, start=first_line):
        if len(pair) != 2 or any(part not in tokens for part in pair):
            start = " ".join(str(part) for part in pair)
            start = start if len(start) < 60 else f"{start[:60]}..."
            raise ValueError(f"{merges_from}, line {number}: {start!r} is not a pair of tokens of {tokens_name}")
        merged = "".join(pair)
        if tokens.get(merged, -1) <= last:
            raise ValueError(
                f"{merges_from}, line {number}: {merged!r} has id {tokens.get(merged)} in {tokens_name}, "
                f"which is not above {last}, the id of the merge before: the two files do not belong together"
            )
        last = tokens[merged]
        names.append(merged)
    if END_OF_TEXT in names:
        raise ValueError(f"{merges_from} makes {END_OF_TEXT} by merging: ordinary text would become the special token")
    added = {name for name, i in tokens.items() if i > max(last, tokens[END_OF_TEXT])}
    if unmade := tokens.keys() - {*names, END_OF_TEXT} - added:
        extra = min(unmade, key=tokens.__getitem__)
        raise ValueError(f"{tokens_from} holds {extra!r}, id {tokens[extra]}, which no line of {merges_from} makes")
    return {bytes(byte_of[character] for character in name): tokens[name] for name in names}


def _byte_characters() -> dict[str, int]:
    """Return {character: byte}. Both files spell a byte as a printable character: itself, or one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
