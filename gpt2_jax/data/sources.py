"""Reads documents from text files, one piece at a time, so that a file of any size takes little memory."""

from __future__ import annotations

import codecs
import contextlib
import csv
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gpt2_jax.data.token_files import MANIFEST, id_dtype
from gpt2_jax.files import expanded

BLOCK = 2**20  # bytes read at a time
SUFFIXES = (".txt", ".jsonl", ".csv", ".bin")
STDIN = "-"
BOM = codecs.BOM_UTF8
LONGEST_FIELD = 2**31 - 1  # characters of a field of .csv; Python's own limit is 131,072

# The whitespace of GPT-2's pattern; Python's own set is different.
WHITESPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
)


class Piece(NamedTuple):
    """A part of a document. It gives the same tokens alone as within the document.

    Attributes:
      text: a text, or the ids of a text that is already tokenized.
      counts: whether its tokens are targets of the loss.
      ends: whether the document ends with this piece.
    """

    text: str | np.ndarray
    counts: bool = True
    ends: bool = True


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of an object or row that hold a document: one or two. With two, only the second counts in the loss."""

    text: str = "text"
    prompt: str = ""
    completion: str = ""

    def __post_init__(self):
        if bool(self.prompt) != bool(self.completion):
            raise ValueError("the prompt field and the completion field go together: name both or neither")
        if not self.text:
            raise ValueError("the name of the text field is empty")

    @property
    def pairs(self) -> bool:
        """Whether documents are pairs of prompt and completion."""
        return bool(self.prompt)

    @property
    def names(self) -> tuple[str, ...]:
        """The fields to read."""
        return (self.prompt, self.completion) if self.pairs else (self.text,)


class Sources:
    """The documents of files and folders, in order.

    Attributes:
      files: the files to read; None is standard input.
      n_bytes: bytes of all files; standard input is not included, because its size is not known.
      n_read: bytes read so far.
      n_empty: documents without text, which are left out.
    """

    def __init__(self, sources: Sequence[str | os.PathLike], fields: Fields, n_vocab: int = 0, eot: int = 0):
        """Find the files.

        Args:
          sources: files and folders, as in `prepare`.
          fields: where the text is.
          n_vocab: number of ids in the vocabulary, for .bin files; with 0, .bin files are refused.
          eot: the id between documents in .bin files.

        Raises:
          FileNotFoundError: a file does not exist, or a folder has nothing to read.
          ValueError: a file has an unknown type, pairs are requested from a file without fields, or a folder contains
            prepared tokens.
        """
        if isinstance(sources, str | os.PathLike):
            raise ValueError("sources must be a list of files and folders, not one name")
        names = [os.fspath(source) for source in sources]
        if not names:
            raise ValueError("there is nothing to read: name files or folders, or - for standard input")
        if names.count(STDIN) > 1:
            raise ValueError("- reads all of standard input: name it only once")
        self.files = [file for name in names for file in _find(name)]
        for file in self.files:
            if fields.pairs and (file is None or file.suffix.lower() in (".txt", ".bin")):
                raise ValueError(f"{file or 'standard input'}: prompts and completions need a .jsonl or .csv file")
            if file and file.suffix.lower() == ".bin" and not n_vocab:
                raise ValueError(f"{file} contains token ids, but text is needed")
        self.fields, self.n_vocab, self.eot = fields, n_vocab, eot
        self.n_bytes = sum(file.stat().st_size for file in self.files if file)
        self.n_read = self.n_empty = 0

    def pieces(self) -> Iterator[Piece]:
        """Yield all documents, each as one or more pieces, and count the bytes that are read.

        Raises:
          ValueError: bytes that are not UTF-8, a line that is not JSON, a missing field, or an id outside the
            vocabulary; the message says where.
        """
        for path in self.files:
            if path is None:
                yield from self._text(_standard_input(), "standard input")
                continue
            read = {".txt": self._text, ".jsonl": self._jsonl, ".csv": self._csv, ".bin": self._bin}
            with path.open("rb") as file:
                yield from read[path.suffix.lower()](file, str(path))

    def _text(self, file: BinaryIO, name: str) -> Iterator[Piece]:
        """Yield a whole file as one document, cut where a token always ends: before a run of whitespace.

        In GPT-2's pattern, no token continues from another character into whitespace, and the tokens of a run of
        whitespace depend only on what follows it. A text without whitespace cannot be cut.
        """
        decoder, kept = codecs.getincrementaldecoder("utf-8")(), [""]
        offset, end = 0, False
        while not end:
            data = file.read(BLOCK)
            end = not data
            self.n_read += len(data)
            if not offset and data.startswith(BOM):
                data, offset = data[len(BOM) :], len(BOM)
            pending = len(decoder.getstate()[0])
            text = _decoded(lambda data=data, end=end: decoder.decode(data, final=end), name, offset - pending)
            offset += len(data)
            last = max(text.rfind(" "), text.rfind("\n"))
            if cut := len(text[: last + 1].rstrip(WHITESPACE)):
                yield Piece("".join([*kept, text[:cut]]), ends=False)
                kept = [text[cut:]]
            else:
                kept.append(text)
        yield from self._documents("".join(kept))

    def _documents(self, *texts: str) -> Iterator[Piece]:
        """Yield a document with this text, or this prompt and completion; an empty document is only counted."""
        if not any(texts):
            self.n_empty += 1
            return
        for i, text in enumerate(texts, start=1):
            yield Piece(text, counts=i == len(texts), ends=i == len(texts))

    def _lines(self, file: BinaryIO, name: str) -> Iterator[str]:
        offset = 0
        for line in file:
            self.n_read += len(line)
            yield _decoded(line.removeprefix(BOM if not offset else b"").decode, name, offset)
            offset += len(line)

    def _jsonl(self, file: BinaryIO, name: str) -> Iterator[Piece]:
        for number, line in enumerate(self._lines(file, name), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{name}, line {number} is not JSON: {error}") from error
            if isinstance(record, str) and not self.fields.pairs:
                record = {self.fields.text: record}
            if not isinstance(record, dict):
                raise ValueError(f"{name}, line {number} is not a JSON object with a text: {line.strip()[:60]}")
            yield from self._documents(*(_text_field(record, field, name, number) for field in self.fields.names))

    def _csv(self, file: BinaryIO, name: str) -> Iterator[Piece]:
        limit = csv.field_size_limit(LONGEST_FIELD)
        rows = csv.reader(self._lines(file, name), strict=True)
        try:
            columns = _columns(next(rows, None), self.fields, name)
            for row in rows:
                if row and len(row) <= max(columns):
                    raise ValueError(f"{name}, line {rows.line_num}: the row has {len(row)} columns, too few")
                if row:  # an empty line is not a row
                    yield from self._documents(*(row[column] for column in columns))
        except csv.Error as error:
            raise ValueError(f"{name}, line {rows.line_num} is not CSV: {error}") from error
        finally:
            csv.field_size_limit(limit)

    def _bin(self, file: BinaryIO, name: str) -> Iterator[Piece]:
        dtype = id_dtype(self.n_vocab)
        n_ids = 0
        empty = True  # the part of the current document that was read so far
        while data := file.read(BLOCK):
            self.n_read += len(data)
            if len(data) % dtype.itemsize:
                raise ValueError(f"{name} does not hold a whole number of {dtype.itemsize}-byte ids")
            ids = np.frombuffer(data, dtype)
            if (wrong := np.flatnonzero(ids >= self.n_vocab)).size:
                raise ValueError(
                    f"{name}: token {n_ids + wrong[0]:,} is the id {ids[wrong[0]]}, outside the vocabulary of "
                    f"{self.n_vocab:,} ids: it was written with another tokenizer, or another dtype"
                )
            n_ids += len(ids)
            *documents, rest = np.split(ids, np.flatnonzero(ids == self.eot) + 1)
            for document in documents:  # each ends with an end-of-text id, which is added again later
                if len(document) > 1 or not empty:
                    yield Piece(document[:-1])
                else:
                    self.n_empty += 1
                empty = True
            if len(rest):
                yield Piece(rest, ends=False)
                empty = False
        if not empty:
            yield Piece(np.zeros(0, dtype))
        elif not n_ids:
            self.n_empty += 1


def _find(name: str) -> list[Path | None]:
    """Return the files of one source: the file itself, or those of a folder, sorted by their paths in it."""
    if name == STDIN:
        return [None]
    path = expanded(name)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if not path.is_dir():
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(
                f"{path} is not a file of type {', '.join(SUFFIXES)}: rename it, or pass its text on standard input (-)"
            )
        return [path]
    files = [
        file
        for file in path.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise FileNotFoundError(f"{path} has no file of type {', '.join(SUFFIXES)}")
    names = {file.relative_to(path).as_posix(): file for file in files}
    for file in files:
        if (file.parent / MANIFEST).is_file() or (file.name == "val.bin" and file.with_name("train.bin") in files):
            raise ValueError(f"{file.parent} contains tokens that are already split: train on this folder directly")
    return [names[name] for name in sorted(names)]


def _standard_input() -> BinaryIO:
    if sys.stdin is None:
        raise ValueError("standard input is closed: there is nothing to read")
    return sys.stdin.buffer


def _decoded(decode: Any, name: str, offset: int) -> str:
    """Return the result of `decode()`. An error names the invalid byte and its offset in the file."""
    try:
        return decode()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{name} is not UTF-8 text: byte {byte:#04x} at offset {offset + error.start:,} ({error.reason})"
        ) from error


def _text_field(record: dict[str, Any], field: str, name: str, number: int) -> str:
    if field not in record:
        raise ValueError(f'{name}, line {number} has no field "{field}"; it has: {", ".join(record) or "none"}')
    if not isinstance(record[field], str):
        raise ValueError(f'{name}, line {number}: the field "{field}" is not a string: {str(record[field])[:60]!r}')
    return record[field]


def _columns(header: list[str] | None, fields: Fields, name: str) -> list[int]:
    """Return the numbers of the columns to read; a single column may have any name."""
    with contextlib.suppress(ValueError):
        return [(header or []).index(field) for field in fields.names]
    if header and len(header) == 1 and fields == Fields():
        return [0]
    missing = [field for field in fields.names if field not in (header or [])]
    raise ValueError(f'{name} has no column "{missing[0]}"; its first line names: {", ".join(header or []) or "none"}')
