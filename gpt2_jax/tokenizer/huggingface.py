"""Any tokenizer that Hugging Face's `tokenizers` library can describe, encoded and written by that library."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gpt2_jax.tokenizer.openai import import_tokenizers, spelled_bytes

if TYPE_CHECKING:
    import tokenizers

MODELS = ("BPE", "WordLevel")
LONGEST = 2**18
_SPACE = re.compile(r"(?<=\S) ")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HuggingFace:
    """Encodes with `tokenizers`, and decodes token by token.

    Attributes:
      fields: the description of the tokenizer, as in tokenizer.json.
      ids: {token: id} of all tokens, added ones too.
      added: the added tokens, each as a dict of content, id, special and how it is searched, in order of id.
      prefix, suffix: the ids that the template puts before and after a text.
    """

    def __init__(self, description: str, split_special: bool = False):
        """Take the content of a tokenizer.json. `split_special` keeps special tokens in a text from being found.

        Raises:
          ValueError: the library cannot read it.
        """
        import_tokenizers()
        import tokenizers

        try:
            self._parsing = tokenizers.Tokenizer.from_str(description)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(" ".join(str(error).split())) from error
        self._parsing.no_truncation()
        self._parsing.no_padding()
        self.split_special = self._parsing.encode_special_tokens = split_special
        self.fields: dict[str, Any] = json.loads(self._parsing.to_str())
        self.ids: dict[str, int] = self._parsing.get_vocab()
        self.added: list[dict[str, Any]] = self.fields["added_tokens"]
        self.prefix, self.suffix = self._template()
        self._added_bytes = {token["id"]: token["content"].encode() for token in self.added}
        self._name_of = {i: token for token, i in self.ids.items()}
        self._bytes_of: dict[int, bytes] = {}

    def encode(self, text: str, special: bool) -> list[int]:
        """Return the ids of a text, without the template. Special tokens are found in it only if `special` is True.

        Raises:
          ValueError: the library fails, as it does on some added tokens that strip spaces and share characters.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as tiktoken does
        tokenizer = self._parsing if special else self._plain
        ids: list[int] = []
        for part in _cut(text) if self._is_cut_by_spaces else [text]:
            ids += _encode(tokenizer, part)
        return ids

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer, for text in which special tokens stay text. The two share the vocabulary."""
        import tokenizers

        if not any(token["special"] for token in self.added):
            return self._parsing
        plain = tokenizers.Tokenizer(self._parsing.model)
        plain.normalizer = self._parsing.normalizer
        plain.pre_tokenizer = self._parsing.pre_tokenizer
        plain.add_tokens([added_token(token) for token in self.added])
        plain.encode_special_tokens = True
        return plain

    @functools.cached_property
    def _is_cut_by_spaces(self) -> bool:
        """Whether a token always ends before a space that follows another character, and none depends on both sides.

        That holds for GPT-2's pattern, also after digits were split, if no added token takes spaces with it.
        """
        splitter = self.fields["pre_tokenizer"] or {}
        *before, last = splitter.get("pretokenizers", [splitter])
        by_pattern = last.get("type") == "ByteLevel" and last["use_regex"] and not self.fields["normalizer"]
        with_spaces = (token["lstrip"] or token["rstrip"] or " " in token["content"] for token in self.added)
        return by_pattern and all(one["type"] == "Digits" for one in before) and not any(with_spaces)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids in the vocabulary."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, i: int) -> bytes:
        """Return the bytes of an id: b"" if the vocabulary leaves the id out."""
        if i not in self._bytes_of:
            self._bytes_of[i] = self._decode_one(i)
        return self._bytes_of[i]

    def _decode_one(self, i: int) -> bytes:
        name = self._name_of.get(i)
        if name is None or i in self._added_bytes:
            return self._added_bytes.get(i, b"")
        if self._is_byte_level:
            spelled = spelled_bytes(name)
            return name.encode() if spelled is None else spelled
        if self.fields["model"].get("byte_fallback") and (byte := _BYTE.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        # What the token adds to a text: some decoders join tokens by spaces, or drop a space at the start.
        before = self._parsing.decode([i], skip_special_tokens=False)
        twice = self._parsing.decode([i, i], skip_special_tokens=False)
        return (twice.removeprefix(before) if len(twice) > len(before) else before).encode()

    @functools.cached_property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps([self.fields["decoder"], self.fields["pre_tokenizer"]])

    def _template(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids that the post-processor puts before and after a text.

        Raises:
          ValueError: it does something else too, such as repeating the text.
        """
        for text in ("a", "e", " ", "0", *list(self.ids)[:100]):
            if own := self._parsing.encode(text, add_special_tokens=False).ids:
                break
        else:
            return (), ()
        encoded = self._parsing.encode(text)
        start = next((k for k, mark in enumerate(encoded.special_tokens_mask) if not mark), len(encoded.ids))
        end = start + len(own)
        if encoded.ids[start:end] != own or not all(encoded.special_tokens_mask[end:]):
            raise ValueError("its post_processor does more than to put tokens before and after a text")
        return tuple(encoded.ids[:start]), tuple(encoded.ids[end:])


def _cut(text: str) -> Iterator[str]:
    """Cut a text before spaces, into parts of LONGEST characters and a little more.

    The library needs about 250 bytes of memory for each character of a part.
    """
    start = 0
    while len(text) - start > LONGEST and (space := _SPACE.search(text, start + LONGEST)):
        yield text[start : space.start()]
        start = space.start()
    yield text[start:]


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    except BaseException as error:  # a panic of the library is not an Exception
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"Hugging Face's tokenizers library cannot encode this text: {error}") from error


def added_token(token: dict[str, Any]) -> tokenizers.AddedToken:
    """Return an added token of tokenizer.json as an object of the library.

    Raises:
      ValueError: it is not an added token.
    """
    import tokenizers

    try:
        return tokenizers.AddedToken(**{name: value for name, value in token.items() if name not in ("id", "__type")})
    except TypeError as error:
        raise ValueError(f"{token!r} is not an added token: {error}") from error


def with_added(fields: dict[str, Any], tokens: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the description of a tokenizer after the library has added tokens to it.

    A token that the vocabulary has keeps its id. The others get the next free ids, in order.

    Raises:
      ValueError: the library cannot read the description, or a token is malformed.
    """
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(fields))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(" ".join(str(error).split())) from error
    tokenizer.add_tokens([added_token(token) for token in tokens])
    return json.loads(tokenizer.to_str())
