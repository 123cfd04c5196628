"""Text to token ids and back, by tiktoken for OpenAI's form and by Hugging Face `tokenizers` for all others.

Nothing is downloaded. `openai` and `huggingface` hold the two backends; both encode a text, decode ids, and give the
bytes of a token.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.checks import whole_number
from gpt2_jax.files import read_json, read_text
from gpt2_jax.tokenizer import description as describe
from gpt2_jax.tokenizer import openai
from gpt2_jax.tokenizer.huggingface import HuggingFace
from gpt2_jax.tokenizer.openai import END_OF_TEXT as END_OF_TEXT
from gpt2_jax.tokenizer.openai import Tiktoken

OPENAI_FILES = ("encoder.json", "vocab.bpe")
HUGGING_FACE_FILES = VOCAB_JSON, MERGES, TOKENIZER_JSON = ("vocab.json", "merges.txt", "tokenizer.json")
"""Names of vocabulary files. Hugging Face's first two, or its third, have the content of OpenAI's two files."""
TOKENIZER_CONFIG, ADDED_TOKENS = "tokenizer_config.json", "added_tokens.json"  # optional files of Hugging Face
SPECIAL_TOKENS_MAP = "special_tokens_map.json"

# The merges of OpenAI's release. They are canonical, so that loading them need not take the time to find out.
_RELEASED = "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0"


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      eot: the id of the token that separates documents, `<|endoftext|>` in most vocabularies; None if there is none.
      n_vocab: the highest id + 1. Some vocabularies leave ids out: their text is empty.
      tokens: {token: id} in order of id, spelled as in the files: in byte-level BPE one printable character per byte.
      merges: the pairs of tokens that merge, in order of priority.
      added: {token: id} of the tokens that `encode` can find in a text as a whole, such as `<|endoftext|>` and "[PAD]".
      special: those of `added` that are found only with allow_special=True. Others, such as a word that was added for
        a fine-tune, are always found.
      prefix, suffix: ids that the template of a Hugging Face tokenizer puts before and after a text; mostly empty.
      settings: the fields of tokenizer_config.json that are kept when the tokenizer is saved in Hugging Face's format,
        such as the names of special tokens; None if it was not read from such files.
      eot_of_files: `eot` as Hugging Face's files gave it. If you set another `eot`, the saved files name it.
    """

    eot: int | None
    n_vocab: int
    tokens: dict[str, int]
    merges: list[tuple[str, str]]
    added: dict[str, int]
    special: set[str]
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    settings: Mapping[str, Any] | None = None
    eot_of_files: int | None = None

    def __init__(
        self,
        tokens: dict[str, int],
        merges: Iterable[tuple[str, ...]],
        tokens_from: str | os.PathLike = "the tokens",
        merges_from: str | os.PathLike = "the merges",
        first_line: int = 1,
        added: Mapping[str, bool] | None = None,
    ):
        """Take a vocabulary in OpenAI's form: all 256 bytes are tokens, and ids follow the order of the merges.

        Args:
          tokens: {token: id}; the ids are 0, 1, ....
          merges: the pairs of tokens that merge, in order of priority.
          tokens_from, merges_from: the files, for messages.
          first_line: the line of the first merge, for messages.
          added: {token: whether it is special}, the tokens that `encode` finds in a text as a whole. None means all
            tokens that are neither a byte nor the result of a merge, as special tokens.

        Raises:
          ValueError: the tokens are not in this form, or do not match the merges.
        """
        pairs = openai.pairs_of(merges, merges_from)
        openai.check_ids(tokens, tokens_from)
        ranks = openai.match_merges(tokens, pairs, tokens_from, merges_from, first_line)
        self.merges = [(left, right) for left, right in pairs]
        self.tokens = dict(sorted(tokens.items(), key=operator.itemgetter(1)))
        openai.check_complete(self.tokens, self.merges, added or (), tokens_from, merges_from)
        made = set(ranks.values())
        if added is None:
            added = dict.fromkeys((token for token, i in self.tokens.items() if i not in made), True)
        for token in {END_OF_TEXT, *added} & self.tokens.keys():
            if self.tokens[token] in made:
                raise ValueError(
                    f"{merges_from} makes {token} by merging: ordinary text would become the special token"
                )
        self.n_vocab = len(tokens)
        self.eot = tokens.get(END_OF_TEXT)
        self.added = {token: i for token, i in self.tokens.items() if token in added}
        self.special = {token for token in self.added if added[token]}
        if _digest(self.merges) == _RELEASED or openai.is_canonical(self.tokens, self.merges):
            self._backend = Tiktoken(ranks, self.tokens, self.added, self.special)
        else:
            self._backend = HuggingFace(json.dumps(self.description()))

    @classmethod
    def from_description(cls, description: Mapping[str, Any], split_special: bool = False) -> Tokenizer:
        """Return a tokenizer that Hugging Face's library runs, from the content of a tokenizer.json.

        Args:
          description: the content of a tokenizer.json.
          split_special: special tokens are never found in a text, not even with allow_special=True.

        Raises:
          ValueError: the library cannot read it.
        """
        self = cls.__new__(cls)
        backend = self._backend = HuggingFace(json.dumps(description), split_special)
        merges = backend.fields["model"].get("merges", [])
        self.merges = [(left, right) for left, right in merges]
        self.tokens = dict(sorted(backend.ids.items(), key=operator.itemgetter(1)))
        self.n_vocab = max(self.tokens.values(), default=-1) + 1
        self.eot = self.tokens.get(END_OF_TEXT)
        self.added = {token["content"]: token["id"] for token in backend.added}
        self.special = {token["content"] for token in backend.added if token["special"]}
        self.prefix, self.suffix = backend.prefix, backend.suffix
        return self

    @classmethod
    def from_files(cls, encoder_json: str | os.PathLike, vocab_bpe: str | os.PathLike) -> Tokenizer:
        """Read a vocabulary from OpenAI's two files.

        Args:
          encoder_json: the file that maps every token to its id.
          vocab_bpe: the file with the merges, one per line.

        Raises:
          FileNotFoundError: a file does not exist.
          ValueError: a file is malformed, or the two do not belong together; the message names the file.
        """
        tokens = read_json(Path(encoder_json))
        merges, first_line = read_merges(Path(vocab_bpe))
        return cls(tokens, merges, encoder_json, vocab_bpe, first_line)

    def to_files(self, encoder_json: str | os.PathLike, vocab_bpe: str | os.PathLike) -> None:
        """Write the vocabulary as OpenAI's two files, in the format of the released ones, byte for byte.

        Raises:
          ValueError: the two files cannot hold this tokenizer.
        """
        if not self.fits_openai_files:
            raise ValueError(
                f"{Path(encoder_json).name} and {Path(vocab_bpe).name} cannot hold this tokenizer: it has more than "
                "the bytes, merges and special tokens of OpenAI's form; save it in Hugging Face's format"
            )
        for path, text in zip((encoder_json, vocab_bpe), self.openai_texts(), strict=True):
            Path(path).write_text(text, encoding="utf-8", newline="\n")

    def openai_texts(self) -> tuple[str, str]:
        """Return the content of OpenAI's two files: the tokens, and the merges."""
        lines = "".join(f"{left} {right}\n" for left, right in self.merges)
        return json.dumps(self.tokens), f"#version: 0.2\n{lines}"

    @property
    def is_openai_form(self) -> bool:
        """Whether text is split and merged as OpenAI's tokenizer does it, by tiktoken."""
        return isinstance(self._backend, Tiktoken)

    @property
    def fits_openai_files(self) -> bool:
        """Whether `from_files` would read the same tokenizer from the files that `to_files` writes."""
        if not isinstance(self._backend, Tiktoken) or self.prefix or self.suffix:
            return False
        own = self.added.keys() == self.special and self.eot == self.tokens.get(END_OF_TEXT)
        return own and len(self.added) + len(self._backend.ranks) == len(self.tokens)

    def encode(self, text: str, allow_special: bool = False, template: bool | None = None) -> list[int]:
        """Return the ids of a text of any length.

        With allow_special=True they are what `tokenizer(text)["input_ids"]` is in Hugging Face transformers.

        Args:
          text: any str; a lone surrogate is read as U+FFFD.
          allow_special: True turns special tokens in the text, such as `<|endoftext|>`, into their ids. By default they
            stay ordinary text.
          template: whether to add `prefix` and `suffix`; None adds them if allow_special is True.
        """
        if not isinstance(text, str):
            raise ValueError(f"text must be a str, not {type(text).__name__}")
        ids = self._backend.encode(text, allow_special)
        if (allow_special if template is None else template) and (self.prefix or self.suffix):
            return [*self.prefix, *ids, *self.suffix]
        return ids

    def prompt(self, text: str, allow_special: bool = False) -> list[int]:
        """Return the ids that a model continues: `prefix` and the text's ids, or `eot` if there are none.

        `suffix` is left out, because it marks the end of a text.

        Raises:
          ValueError: the text is empty, and the vocabulary has no end-of-text token.
        """
        ids = [*self.prefix, *self.encode(text, allow_special, template=False)]
        return ids or [end_of_text(self, "an empty prompt")]

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
        return self._backend.decode(ids)

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of one token. They may include parts of characters.

        Raises:
          ValueError: the id is not a whole number in [0, n_vocab).
        """
        return self._backend.token_bytes(whole_number("id", id, 0, self.n_vocab - 1))

    def description(self) -> dict[str, Any]:
        """Return the content of a tokenizer.json for this tokenizer, as Hugging Face's library writes it."""
        if isinstance(backend := getattr(self, "_backend", None), HuggingFace):
            return backend.fields
        added = [describe.added_fields(token, i, token in self.special) for token, i in self.added.items()]
        return describe.description(self.tokens, self.merges, added, self.prefix, self.suffix)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple, dict[str, Any]]:
        """Pickle the vocabulary, from which the other process makes its own backend."""
        state = {name: getattr(self, name) for name in ("eot", "eot_of_files", "prefix", "suffix", "settings")}
        if isinstance(self._backend, HuggingFace):
            return Tokenizer.from_description, (self._backend.fields, self._backend.split_special), state
        added = {token: token in self.special for token in self.added}
        return Tokenizer, (self.tokens, self.merges, "the tokens", "the merges", 1, added), state


def end_of_text(tokenizer: Tokenizer, what: str) -> int:
    """Return the tokenizer's `eot`. `what` needs it, and is named in the message.

    Raises:
      ValueError: the vocabulary has no end-of-text token.
    """
    if tokenizer.eot is None:
        raise ValueError(
            f"{what} needs an end-of-text token, and the vocabulary has none: name one as eos_token in "
            f"{TOKENIZER_CONFIG}, or set the tokenizer's eot"
        )
    return tokenizer.eot


def read_merges(path: Path) -> tuple[list[tuple[str, ...]], int]:
    """Return the pairs in a file of merges, and the line of the first.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: it is not UTF-8 text.
    """
    lines = read_text(path).splitlines()
    n_head = 1 if lines and lines[0].startswith("#version") else 0
    while lines and not lines[-1]:
        lines.pop()
    return [tuple(line.split(" ")) for line in lines[n_head:]], n_head + 1


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return the sha256, in hexadecimal, of what determines the ids of ordinary text."""
    merges = [list(pair) for pair in tokenizer.merges]
    parts: list[Any] = [tokenizer.tokens, merges]
    if isinstance(tokenizer, Tokenizer) and not (
        tokenizer.is_openai_form and tokenizer.special >= tokenizer.added.keys()
    ):
        fields = tokenizer.description()
        model = {name: value for name, value in fields["model"].items() if name not in ("vocab", "merges")}
        names = ("added_tokens", "normalizer", "pre_tokenizer")
        parts.append(_set_fields([model, *(fields[name] for name in names)]))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _set_fields(value: Any) -> Any:
    """Leave out fields that are empty or false, as fields of later versions of the library will be by default."""
    if isinstance(value, dict):
        return {name: _set_fields(field) for name, field in sorted(value.items()) if field not in (None, False, "", [])}
    return [_set_fields(field) for field in value] if isinstance(value, list) else value


def _digest(merges: list[tuple[str, str]]) -> str:
    return hashlib.sha256("\n".join(map(" ".join, merges)).encode()).hexdigest()
