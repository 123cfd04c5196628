"""Reads documents from files, one piece at a time, so that a file of any size takes little memory."""

from __future__ import annotations

import codecs
import collections
import contextlib
import dataclasses
import functools
import itertools
import operator
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gpt2_jax.data import reading
from gpt2_jax.data.bare import check_vocabulary, layout_of
from gpt2_jax.data.fields import Fields, Places, texts_of
from gpt2_jax.data.finding import STDIN, find
from gpt2_jax.data.reading import END, UTF_8, Form, blocks, check_encoding, form_of, lines, opened
from gpt2_jax.data.table_files import Rows
from gpt2_jax.data.tables import read_records, unit_of
from gpt2_jax.data.token_files import id_dtype
from gpt2_jax.tokenizer import END_OF_TEXT

CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that do not begin a character

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


@dataclasses.dataclass
class Tally:
    """What was left out, and how files were read.

    Attributes:
      n_empty: documents without text, which are left out.
      n_skipped: bad records, which are left out if this is allowed.
      first: the first of these: [number of the file, offset of the range, number in the range, what is wrong]; or [].
      delimiters: {delimiter other than a comma: .csv files that use it}.
    """

    n_empty: int = 0
    n_skipped: int = 0
    first: list[Any] = dataclasses.field(default_factory=list)
    delimiters: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, later: Tally) -> None:
        """Add what was counted in later files, or in later ranges."""
        self.n_empty += later.n_empty
        self.n_skipped += later.n_skipped
        self.first = self.first or later.first
        for delimiter, count in later.delimiters.items():
            self.delimiters[delimiter] = self.delimiters.get(delimiter, 0) + count


class Sources:
    """The documents of files and folders, in order.

    Attributes:
      files: the files to read; None is standard input.
      forms: what their names say about the contents.
      stats: size, time of modification etc. of each file.
      left_out: how many files in the folders are not read, by the end of their names.
      n_bytes: bytes of all files; standard input is not included, because its size is not known.
      n_read: bytes read so far, of compressed files before they are decompressed.
      tally: what was left out so far, and how files were read.
    """

    def __init__(
        self,
        sources: Sequence[str | os.PathLike],
        fields: Fields,
        n_vocab: int = 0,
        eot: int = 0,
        *,
        encoding: str = UTF_8,
        splits: bool = False,
        skips: bool = False,
    ):
        """Find the files.

        Args:
          sources: files and folders, as in `prepare`.
          fields: where the text is.
          n_vocab: number of ids in the vocabulary, for .bin files; with 0, .bin files are refused.
          eot: the id between documents in .bin files.
          encoding: the encoding of the text, as Python names it.
          splits: whether the characters `<|endoftext|>` in a text end a document. They are left out then.
          skips: whether bad records are left out and counted. Otherwise the first one is an error.

        Raises:
          FileNotFoundError: a file does not exist, or a folder has nothing to read.
          ValueError: a file has an unknown type, pairs are requested from a file without fields, a folder contains
            prepared tokens, or there is no such encoding.
        """
        if isinstance(sources, str | os.PathLike):
            raise ValueError("sources must be a list of files and folders, not one name")
        names = [os.fspath(source) for source in sources]
        if not names:
            raise ValueError("there is nothing to read: name files or folders, or - for standard input")
        if names.count(STDIN) > 1:
            raise ValueError("- reads all of standard input: name it only once")
        if splits and fields.pairs:
            raise ValueError(f"prompts and completions cannot be split at {END_OF_TEXT}")
        self.left_out: collections.Counter[str] = collections.Counter()
        self.files = [file for name in names for file in find(name, self.left_out)]
        self.forms = [form_of(file) if file else Form("text", False, "") for file in self.files]
        for file, form in zip(self.files, self.forms, strict=True):
            if fields.pairs and not form.has_fields:
                raise ValueError(
                    f"{file or 'standard input'}: prompts and completions need a .jsonl, .json, .csv, .tsv or "
                    ".parquet file"
                )
            if file and form.name == "bin":
                if not n_vocab:
                    raise ValueError(f"{file} contains token ids, but text is needed")
                check_vocabulary(file)
        self.fields, self.n_vocab, self.eot = fields, n_vocab, eot
        self.encoding, self.splits, self.skips = check_encoding(encoding), splits, skips
        self.stats = [file.stat() if file else None for file in self.files]
        self.n_bytes = sum(stat.st_size for stat in self.stats if stat)
        self.n_read, self.tally = 0, Tally()

    def is_whole(self, number: int) -> bool:
        """Return whether a file can only be read from its beginning to its end, and not in ranges."""
        form = self.forms[number]
        return form.zipped or form.name in ("json", "parquet") or (form.name != "bin" and self.encoding != UTF_8)

    def pieces(self) -> Iterator[Piece]:
        """Yield all documents, each as one or more pieces, and count the bytes that are read.

        Raises:
          ValueError: bytes that are not in this encoding, a line that is not JSON, a missing field, or an id outside
            the vocabulary; the message says where.
        """
        with contextlib.closing(self.read(map(Range, range(len(self.files))))) as ranges:
            for _, pieces in ranges:
                yield from pieces

    def read(self, ranges: Iterable[Range]) -> Generator[tuple[Range, Iterator[Piece]], None, None]:
        """Yield each range with its pieces, which must be used before the next range. Errors are those of `pieces`.

        Only a range of a .csv file needs to read what is before it, because a line break may be inside a field. If
        ranges of one file follow one another, this is done once.
        """
        for number, some in itertools.groupby(ranges, operator.attrgetter("file")):
            path, form = self.files[number], self.forms[number]
            name = self._name(number)
            with opened(path, self._count) as file:
                rows = Rows(lines(file, name, self.encoding), form) if form.name == "csv" else None
                for it in some:
                    if form.name == "text":
                        yield it, self._text(file, name, it.start, it.stop)
                    elif path and form.name == "bin":
                        yield it, self._bin(path, file, it.start, it.stop)
                    else:
                        yield it, self._records(file, rows, it)

    def skipped(self) -> str:
        """Return the place of the first bad record that was left out, and what is wrong with it; "" if none was."""
        if not self.tally.first:
            return ""
        number, start, place, what = self.tally.first
        with opened(self.files[number]) as file:
            return f"{self._places(number, start, file).of(place)}{what}"

    def _name(self, number: int) -> str:
        return str(self.files[number] or "standard input")

    def _count(self, n_bytes: int) -> None:
        self.n_read += n_bytes

    def _places(self, number: int, start: int, file: BinaryIO) -> Places:
        """Return the names of the records of a range."""
        is_csv = self.forms[number].name == "csv"  # its lines are always counted from the beginning
        n_before = (lambda: 0) if is_csv else functools.partial(_n_lines, file, start)

        def skip(place: int, what: str) -> None:
            self.tally.add(Tally(n_skipped=1, first=[number, start, place, what]))

        return Places(self._name(number), unit_of(self.forms[number]), n_before, skip if self.skips else None)

    def _text(self, file: BinaryIO, name: str, start: int, stop: int) -> Iterator[Piece]:
        """Yield a file as one document, cut where a token always ends: before a run of whitespace.

        In GPT-2's pattern, no token continues from another character into whitespace, and the tokens of a run of
        whitespace depend only on what follows it. A text without whitespace cannot be cut.

        A range has the pieces that end in its blocks. The first of them may begin before it.
        """
        kept, end, offset, pending = [""], False, 0, b""
        if start:
            offset, pending = _last_cut(file, start)
            file.seek(offset)
        for text, after, end in blocks(  # noqa: B007
            file, name, self.encoding, offset, pending, stop
        ):
            if cut := _cut(text):
                if after > start:
                    yield from self._pieces("".join([*kept, text[:cut]]), ends=False)
                kept = [text[cut:]]
            else:
                kept.append(text)
        if end:
            yield from self._documents("".join(kept))

    def _documents(self, *texts: str) -> Iterator[Piece]:
        """Yield a document with this text, or this prompt and completion; an empty document is only counted."""
        if not any(texts):
            self.tally.n_empty += 1
        elif len(texts) == 1:
            yield from self._pieces(texts[0], ends=True)
        else:
            for i, text in enumerate(texts, start=1):
                yield Piece(text, counts=i == len(texts), ends=i == len(texts))

    def _pieces(self, text: str, ends: bool) -> Iterator[Piece]:
        """Yield a piece, or the documents and the piece into which `<|endoftext|>` divides it.

        These characters contain no whitespace, so a cut is never inside them. A piece after a cut begins with
        whitespace, so its first part is never empty.
        """
        if not self.splits:
            yield Piece(text, ends=ends)
            return
        *documents, rest = text.split(END_OF_TEXT)
        yield from map(Piece, filter(None, documents))
        if rest:
            yield Piece(rest, ends=ends)

    def _records(self, file: BinaryIO, rows: Rows | None, it: Range) -> Iterator[Piece]:
        """Yield the documents of the records of a range."""
        places, form = self._places(it.file, it.start, file), self.forms[it.file]
        for record, number in read_records(file, form, places, self.encoding, self.fields, rows, it.start, it.stop):
            try:
                texts = texts_of(record, self.fields)
            except ValueError as error:
                places.bad(number, str(error), error)
            else:
                yield from self._documents(*texts)
        if rows and not it.start and form.suffix.startswith(".csv") and rows.delimiter not in ("", ","):
            self.tally.add(Tally(delimiters={rows.delimiter: 1}))

    def _bin(self, path: Path, file: BinaryIO, start: int, stop: int) -> Iterator[Piece]:
        dtype = id_dtype(self.n_vocab)
        first = layout_of(path, dtype, self.n_vocab).offset
        at = max(start, first)
        empty = True  # the part of the current document that was read so far
        if at > first:
            file.seek(at - dtype.itemsize)
            empty = np.frombuffer(file.read(dtype.itemsize), dtype)[0] == self.eot
        file.seek(at)
        while at < stop and (data := file.read(min(reading.BLOCK, stop - at))):
            ids = np.frombuffer(data, dtype)
            if (wrong := np.flatnonzero(ids >= self.n_vocab)).size:
                raise ValueError(
                    f"{path}: token {(at - first) // dtype.itemsize + wrong[0]:,} is the id {ids[wrong[0]]}, outside "
                    f"the vocabulary of {self.n_vocab:,} ids: it was written with another tokenizer, or another dtype"
                )
            at += len(data)
            *documents, rest = np.split(ids, np.flatnonzero(ids == self.eot) + 1)
            for document in documents:  # each ends with an end-of-text id, which is added again later
                if len(document) > 1 or not empty:
                    yield Piece(document[:-1])
                else:
                    self.tally.n_empty += 1
                empty = True
            if len(rest):
                yield Piece(rest, ends=False)
                empty = False
        if stop < END:
            return
        if not empty:
            yield Piece(np.zeros(0, dtype))
        elif at == first:
            self.tally.n_empty += 1


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
        start -= reading.BLOCK
        n_before = min(start, 3)  # an incomplete character has at most three bytes
        file.seek(start - n_before)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(file.read(n_before).lstrip(CONTINUATION))
        pending = decoder.getstate()[0]
        if _cut(decoder.decode(file.read(reading.BLOCK))):
            break
    return start, pending


def _n_lines(file: BinaryIO, start: int) -> int:
    """Return the number of lines that begin before an offset."""
    if not start:
        return 0
    file.seek(0)
    sizes = (min(reading.BLOCK, start - 1 - at) for at in range(0, start - 1, reading.BLOCK))
    return 1 + sum(file.read(size).count(b"\n") for size in sizes)
