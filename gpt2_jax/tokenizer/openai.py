"""OpenAI's form of byte-level BPE, encoded by tiktoken. All 256 bytes are tokens, and ids follow the merges."""

from __future__ import annotations

import itertools
import operator
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tiktoken

END_OF_TEXT = "<|endoftext|>"

# How the original (openai/gpt-2, src/encoder.py) splits text before merging: contractions, letters, numbers, the rest,
# and whitespace (without its last character if a word follows). Quantifiers are possessive where that changes nothing.
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# `\s+(?!\S)` backtracks, and tiktoken fails on a run of a million characters. So longer runs than this are cut.
LONGEST_RUN = 2**16
_SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"  # White_Space; Python's \s differs
_LONG_RUN = re.compile(rf"(?<!{_SPACE}){_SPACE}{{{LONGEST_RUN},}}+")  # tried only at the start of a run: linear time


def _byte_characters() -> dict[str, int]:
    """Return {character: byte}. Both files spell a byte as a printable character: itself, or one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_characters()
_LATIN_1 = {ord(character): byte for character, byte in BYTE_OF.items()}


def spelled_bytes(token: str) -> bytes | None:
    """Return the bytes that a token spells; None if a character spells no byte."""
    return token.translate(_LATIN_1).encode("latin-1") if BYTE_OF.keys() >= set(token) else None


class Tiktoken:
    """Encodes and decodes with tiktoken.

    Attributes:
      ranks: {byte sequence: id} of the bytes and merged tokens.
    """

    def __init__(self, ranks: dict[bytes, int], tokens: Mapping[str, int], added: Mapping[str, int], special: set[str]):
        """Take the vocabulary.

        Args:
          ranks: {byte sequence: id} of the bytes and merged tokens.
          tokens: {token: id} of all tokens.
          added: {token: id} of the tokens that are searched in a text before it is split.
          special: those of `added` that are searched only on request.
        """
        self.ranks = ranks
        merged = set(ranks.values())
        others = {token: i for token, i in tokens.items() if i not in merged}
        self._encoding = tiktoken.Encoding("gpt2-jax", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=others)
        self._added, self._special = added, special
        longest_first = sorted(added, key=len, reverse=True)  # of several that begin at one place, the longest counts
        self._search = re.compile("|".join(map(re.escape, longest_first)))

    def encode(self, text: str, special: bool) -> list[int]:
        """Return the ids of a text. Added tokens are found in it; special ones only if `special` is True."""
        if not self._added or not (special or len(self._special) < len(self._added)):
            return self._encode_ordinary(text)
        ids: list[int] = []
        start = 0
        for match in self._search.finditer(text):
            if not special and match[0] in self._special:
                continue
            ids += self._encode_ordinary(text[start : match.start()])
            ids.append(self._added[match[0]])
            start = match.end()
        return ids + self._encode_ordinary(text[start:])

    def _encode_ordinary(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in _cut_long_runs(text):
            ids += self._encoding.encode(piece, disallowed_special=())
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids in the vocabulary."""
        return self._encoding.decode(ids, errors="replace")

    def token_bytes(self, i: int) -> bytes:
        """Return the bytes of an id in the vocabulary."""
        return self._encoding.decode_single_token_bytes(i)


def _cut_long_runs(text: str) -> Iterator[str]:
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


def check_names(tokens: object, source: str | os.PathLike) -> None:
    """Check that `tokens` is {token: id}.

    Raises:
      ValueError: it is not.
    """
    if not isinstance(tokens, dict) or set(map(type, tokens.values())) != {int}:
        raise ValueError(f"{source} must map each token to its id")


def check_ids(tokens: dict[str, int], source: str | os.PathLike) -> None:
    """Check that the tokens have the ids 0 to n - 1, each once.

    Raises:
      ValueError: they do not.
    """
    check_names(tokens, source)
    if sorted(tokens.values()) != list(range(len(tokens))):
        raise ValueError(f"{source} must give its {len(tokens)} tokens the ids 0 to {len(tokens) - 1}, each once")


def pairs_of(merges: Iterable[Iterable[str]], merges_from: str | os.PathLike) -> list[tuple[str, ...]]:
    """Return merges as tuples. `match_merges` checks that they are pairs of tokens.

    Raises:
      ValueError: they are not sequences.
    """
    try:
        return [tuple(pair) for pair in merges]
    except TypeError as error:
        raise ValueError(f"{merges_from} must be a list of pairs of tokens: {error}") from error


def match_merges(
    tokens: dict[str, int],
    merges: list[tuple[str, ...]],
    tokens_from: str | os.PathLike,
    merges_from: str | os.PathLike,
    first_line: int,
) -> dict[bytes, int]:
    """Return {byte sequence: id} of the bytes and the merged tokens.

    Raises:
      ValueError: a byte is missing, a merge names unknown tokens, or the ids do not follow the order of the merges.
    """
    if missing := [character for character in BYTE_OF if character not in tokens]:
        raise ValueError(f"{tokens_from} has no token for the byte {BYTE_OF[missing[0]]:#04x} ({missing[0]!r})")
    if set(map(len, merges)) - {2} or not tokens.keys() >= {*itertools.chain(*merges)}:
        _raise_for_merge(tokens, merges, tokens_from, merges_from, first_line)
    merged = ["".join(pair) for pair in merges]
    ids = [tokens.get(token, -1) for token in merged]
    if not _ascending(ids):
        _raise_for_merge(tokens, merges, tokens_from, merges_from, first_line)
    names = [*BYTE_OF, *merged]
    if unknown := set(text := "".join(names)) - BYTE_OF.keys():
        raise ValueError(f"{merges_from} merges {min(unknown)!r}, which spells no byte")
    spelled = text.translate(_LATIN_1).encode("latin-1")  # of all names at once, which is faster
    ends = [*itertools.accumulate(map(len, names))]
    parts = (spelled[start:end] for start, end in itertools.pairwise([0, *ends]))
    return dict(zip(parts, (*map(tokens.__getitem__, BYTE_OF), *ids), strict=True))


def _ascending(ids: list[int]) -> bool:
    return all(map(operator.lt, [-1, *ids], ids))


def _raise_for_merge(
    tokens: dict[str, int],
    merges: list[tuple[str, ...]],
    tokens_from: str | os.PathLike,
    merges_from: str | os.PathLike,
    first_line: int,
) -> None:
    """Raise for the first line that is not a merge, or whose token does not follow that of the line before."""
    tokens_name = Path(tokens_from).name
    last = -1
    for number, pair in enumerate(merges, start=first_line):
        if len(pair) != 2 or pair[0] not in tokens or pair[1] not in tokens:
            start = " ".join(str(part) for part in pair)
            start = start if len(start) < 60 else f"{start[:60]}..."
            raise ValueError(f"{merges_from}, line {number}: {start!r} is not a pair of tokens of {tokens_name}")
        i = tokens.get("".join(pair), -1)
        if i <= last:
            raise ValueError(
                f"{merges_from}, line {number}: {''.join(pair)!r} has id {None if i < 0 else i} in {tokens_name}, "
                f"which is not above {last}, the id of the merge before: the two files do not belong together"
            )
        last = i


def check_complete(
    tokens: Mapping[str, int],
    merges: Iterable[Sequence[str]],
    declared: Collection[str],
    tokens_from: str | os.PathLike,
    merges_from: str | os.PathLike,
) -> None:
    """Check that no merge is missing, for example because a file was cut: a merge makes each token that text can have.

    Tokens that no merge makes are fine if they are declared, or have lower ids than the bytes (special tokens come
    first in many vocabularies), or if GPT-2's pattern splits them, as "[PAD]": no merge can make such a token. Words
    that were appended after `<|endoftext|>` by hand are fine too, unless two tokens before it could merge into each.

    Raises:
      ValueError: a token has no merge.
    """
    made = {left + right for left, right in merges}
    unmade = [token for token in tokens.keys() - made - set(declared) - {END_OF_TEXT} if len(token) > 1]
    if not unmade:
        return
    of_bytes = [i for token, i in tokens.items() if token in BYTE_OF and token not in declared]
    lost = [token for token in unmade if tokens[token] > min(of_bytes, default=-1) and is_one_piece(token)]
    if not lost:
        return
    token = min(lost, key=tokens.__getitem__)
    last = max([*of_bytes, *(tokens.get(name, -1) for name in made)])
    is_appended = last < tokens.get(END_OF_TEXT, -1) < tokens[token]
    if is_appended and not all(_may_be_merged(name, tokens) for name in lost):
        return
    raise ValueError(
        f"{tokens_from} holds {token!r}, id {tokens[token]}, which no line of {merges_from} makes: the merges are not "
        "complete, or the token must be declared as an added token"
    )


def _may_be_merged(token: str, tokens: Mapping[str, int]) -> bool:
    """Return whether two tokens with lower ids make this one."""
    parts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
    return any(max(tokens.get(part, len(tokens)) for part in pair) < tokens[token] for pair in parts)


def is_one_piece(token: str) -> bool:
    """Return whether GPT-2's pattern leaves a token whole: only letters, digits or other characters after a space."""
    text = (spelled_bytes(token) or token.encode()).decode(errors="ignore")
    if text.isspace() or text in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"):
        return True
    return len({_kind(character) for character in text.removeprefix(" ")}) <= 1


def _kind(character: str) -> str:
    kind = unicodedata.category(character)[0]
    return "space" if character.isspace() else kind if kind in "LN" else "other"


def is_canonical(tokens: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> bool:
    """Return whether tiktoken encodes every text as the merges say. `tokens` and `merges` have passed `match_merges`.

    tiktoken merges any two neighbours that form a token, the lowest id first. Byte-pair encoding merges only the listed
    pairs, in their order. Both give the same ids if and only if the merges turn the spelling of each merged token into
    that token. If they do, take the first step where tiktoken merges a pair (x, y) that is not listed. All steps before
    were the same, also inside the text of xy, so on this text alone the merges reach (x, y) too, and end there.
    """
    import_tokenizers()
    import tokenizers
    from tokenizers import models

    merged = [left + right for left, right in merges]
    model = tokenizers.Tokenizer(models.BPE(vocab=dict(tokens), merges=list(merges)))
    found = model.encode(merged, is_pretokenized=True, add_special_tokens=False).ids
    return found == [tokens[token] for token in merged]


def import_tokenizers() -> None:
    """Import Hugging Face's library, and make NumPy ready for it. Call this before its first use.

    The library's first call lets NumPy parse its version. If a Ctrl-C interrupts that, the library writes a panic to
    standard error. After this function, NumPy parses it within microseconds.
    """
    import tokenizers  # noqa: F401

    np.lib.NumpyVersion(np.__version__)


def overlap(tokens: Collection[str]) -> bool:
    """Return whether two of the tokens can share characters of a text: one holds the other, or begins as it ends."""

    def meet(a: str, b: str) -> bool:
        return b in a or any(a.endswith(b[:n]) for n in range(1, len(b)))

    return any(meet(a, b) for a in tokens for b in tokens if a != b)
