"""Reads documents from text files, one piece at a time, so that a file of any size takes little memory."""

from __future__ import annotations

import codecs
import contextlib
import csv
import itertools
import operator
import os
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gpt2_jax.data.records import LONGEST_FIELD, Fields, Rows, columns_of, texts_of
from gpt2_jax.data.token_files import MANIFEST, id_dtype
from gpt2_jax.files import expanded

BLOCK = 2**20  # bytes read at a time
SUFFIXES = (".txt", ".jsonl", ".csv", ".bin")
STDIN = "-"
BOM = codecs.BOM_UTF8
CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that do not begin a character
END = 2**63 - 1  # an offset after the end of every file

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


class Range(NamedTuple):
    """A part of a file. The parts of a file give the same pieces, together, as the whole file.

    Attributes:
      file: the number of the file.
      start: offset in bytes, a multiple of BLOCK.
      stop: offset in bytes, a multiple of BLOCK; or END.
      unit: the number of the unit of work to which the range belongs.
    """

    file: int
    start: int = 0
    stop: int = END
    unit: int = 0


class Sources:
    """The documents of files and folders, in order.

    Attributes:
      files: the files to read; None is standard input.
      stats: size, time of modification etc. of each file.
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
        self.stats = [file.stat() if file else None for file in self.files]
        self.n_bytes = sum(stat.st_size for stat in self.stats if stat)
        self.n_read = self.n_empty = 0

    def pieces(self) -> Iterator[Piece]:
        """Yield all documents, each as one or more pieces, and count the bytes that are read.

        Raises:
          ValueError: bytes that are not UTF-8, a line that is not JSON, a missing field, or an id outside the
            vocabulary; the message says where.
        """
        with contextlib.closing(self.read(map(Range, range(len(self.files))))) as ranges:
            for _, pieces in ranges:
                yield from pieces

    def read(self, ranges: Iterable[Range]) -> Generator[tuple[Range, Iterator[Piece]], None, None]:
        """Yield each range with its pieces, which must be used before the next range. Errors are those of `pieces`.

        Only a range of a .csv file needs to read what is before it, because a line break may be inside a field. If
        ranges of one file follow one another, this is done once.
        """
        kinds = {".txt": self._text, ".jsonl": self._jsonl, ".csv": self._csv, ".bin": self._bin}
        for number, some in itertools.groupby(ranges, operator.attrgetter("file")):
            path = self.files[number]
            name, kind = ("standard input", ".txt") if path is None else (str(path), path.suffix.lower())
            with contextlib.ExitStack() as stack:
                file = _standard_input() if path is None else stack.enter_context(path.open("rb"))
                opened = Rows(self._lines(file, name)) if kind == ".csv" else file
                for it in some:
                    yield it, kinds[kind](opened, name, it.start, it.stop)

    def _text(self, file: BinaryIO, name: str, start: int, stop: int) -> Iterator[Piece]:
        """Yield a file as one document, cut where a token always ends: before a run of whitespace.

        In GPT-2's pattern, no token continues from another character into whitespace, and the tokens of a run of
        whitespace depend only on what follows it. A text without whitespace cannot be cut.

        A range has the pieces that end in its blocks. The first of them may begin before it.
        """
        decoder, kept = codecs.getincrementaldecoder("utf-8")(), [""]
        offset, end = 0, False
        if start:
            offset, pending = _last_cut(file, start)
            decoder.decode(pending)
            file.seek(offset)
        while not end and offset < stop:
            data = file.read(BLOCK)
            end = not data
            self.n_read += len(data)
            if not offset and data.startswith(BOM):
                data, offset = data[len(BOM) :], len(BOM)
            at = offset - len(decoder.getstate()[0])  # with an incomplete character
            text = _decoded(lambda data=data, end=end: decoder.decode(data, final=end), name, at)
            offset += len(data)
            if cut := _cut(text):
                if offset > start:
                    yield Piece("".join([*kept, text[:cut]]), ends=False)
                kept = [text[cut:]]
            else:
                kept.append(text)
        if end:
            yield from self._documents("".join(kept))

    def _documents(self, *texts: str) -> Iterator[Piece]:
        """Yield a document with this text, or this prompt and completion; an empty document is only counted."""
        if not any(texts):
            self.n_empty += 1
            return
        for i, text in enumerate(texts, start=1):
            yield Piece(text, counts=i == len(texts), ends=i == len(texts))

    def _lines(self, file: BinaryIO, name: str, start: int = 0, stop: int = END) -> Iterator[tuple[str, int]]:
        """Yield each line that begins in the range, with the offset of its end."""
        offset = start
        if start:
            file.seek(start - 1)
            offset += len(file.readline()) - 1
        if offset >= stop:
            return
        for line in file:
            self.n_read += len(line)
            text = _decoded(line.removeprefix(BOM if not offset else b"").decode, name, offset)
            offset += len(line)
            yield text, offset
            if offset >= stop:
                return

    def _jsonl(self, file: BinaryIO, name: str, start: int, stop: int) -> Iterator[Piece]:
        for number, (line, _) in enumerate(self._lines(file, name, start, stop), start=1):
            if not line.strip():
                continue
            try:
                texts = texts_of(line, self.fields)
            except ValueError as error:
                number += _n_lines(file, start)
                raise ValueError(f"{name}, line {number}{error}") from error.__cause__
            yield from self._documents(*texts)

    def _csv(self, rows: Rows, name: str, start: int, stop: int) -> Iterator[Piece]:
        limit = csv.field_size_limit(LONGEST_FIELD)
        try:
            if not rows.columns:
                rows.columns = columns_of(next(rows.reader, None), self.fields, name)
            n_columns = max(rows.columns) + 1
            while rows.offset < stop:
                begin = rows.offset
                row = next(rows.reader, None)
                if row is None:
                    break
                if row and begin >= start:  # an empty line is not a row
                    if len(row) < n_columns:
                        line = rows.reader.line_num
                        raise ValueError(f"{name}, line {line}: the row has {len(row)} columns, too few")
                    yield from self._documents(*(row[column] for column in rows.columns))
        except csv.Error as error:
            raise ValueError(f"{name}, line {rows.reader.line_num} is not CSV: {error}") from error
        finally:
            csv.field_size_limit(limit)

    def _bin(self, file: BinaryIO, name: str, start: int, stop: int) -> Iterator[Piece]:
        dtype = id_dtype(self.n_vocab)
        n_ids = start // dtype.itemsize
        empty = True  # the part of the current document that was read so far
        if start:
            file.seek(start - dtype.itemsize)
            empty = np.frombuffer(file.read(dtype.itemsize), dtype)[0] == self.eot
        while n_ids * dtype.itemsize < stop and (data := file.read(BLOCK)):
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
        if stop < END:
            return
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


def _cut(text: str) -> int:
    """Return where to cut a text: before its last run of whitespace with a space or newline. 0 is no cut."""
    last = max(text.rfind(" "), text.rfind("\n"))
    return len(text[: last + 1].rstrip(WHITESPACE))


def _last_cut(file: BinaryIO, start: int) -> tuple[int, bytes]:
    """Return the offset of the last block before `start` with a cut, and the incomplete character before this block.

    Invalid bytes are an error of the range to which they belong.
    """
    pending = b""
    while start:
        start -= BLOCK
        n_before = min(start, 3)  # an incomplete character has at most three bytes
        file.seek(start - n_before)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(file.read(n_before).lstrip(CONTINUATION))
        pending = decoder.getstate()[0]
        if _cut(decoder.decode(file.read(BLOCK))):
            break
    return start, pending


def _n_lines(file: BinaryIO, start: int) -> int:
    """Return the number of lines that begin before an offset."""
    if not start:
        return 0
    file.seek(0)
    sizes = (min(BLOCK, start - 1 - at) for at in range(0, start - 1, BLOCK))
    return 1 + sum(file.read(size).count(b"\n") for size in sizes)
