"""Opens files of text, decompresses and decodes them; errors name the file and the invalid byte."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

BLOCK = 2**20  # bytes of text read at a time
BUFFER = 2**13  # bytes read from the disk at a time where lines are read; small, because ranges begin anywhere
END = 2**63 - 1  # an offset after the end of every file
UTF_8 = "utf-8"
BOM = "\ufeff"
UTF_16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE


class Form(NamedTuple):
    """What a file name says about the contents.

    Attributes:
      name: "text", "jsonl", "json", "csv", "parquet" or "bin"; "" is unknown.
      zipped: whether the file is compressed with gzip.
      suffix: the end of the name in lower case: ".jsonl.gz".
    """

    name: str
    zipped: bool
    suffix: str

    @property
    def has_fields(self) -> bool:
        """Whether the file has records with named fields."""
        return self.name in ("jsonl", "json", "csv", "parquet")


FORMS = {
    ".txt": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv",
    ".tsv": "csv", ".parquet": "parquet", ".bin": "bin",
}  # fmt: skip
ZIPPED = ("text", "jsonl", "json", "csv")


def form_of(path: Path) -> Form:
    """Return what a file name says about the contents."""
    inner, zipped = path, path.suffix.lower() == ".gz"
    if zipped:
        inner = path.with_suffix("")
    suffix = inner.suffix.lower() + (".gz" if zipped else "")
    name = FORMS.get(inner.suffix.lower(), "")
    return Form("" if zipped and name not in ZIPPED else name, zipped, suffix)


def check_encoding(encoding: str) -> str:
    """Return Python's name of a text encoding.

    Raises:
      ValueError: there is no such encoding.
    """
    try:
        "a".encode(encoding)  # refuses those that are not of text, such as base64
        codecs.getincrementaldecoder(encoding)
        name = codecs.lookup(encoding).name
    except (LookupError, ValueError, TypeError) as error:
        raise ValueError(
            f"encoding must be a text encoding of Python, such as utf-8 or cp1252, not {encoding!r}"
        ) from error
    return UTF_8 if name == "utf-8-sig" else name  # a byte order mark is left out anyway


# ---- bytes


class _Counted(io.RawIOBase):
    """A binary file that says how many bytes are read from it."""

    def __init__(self, raw: Any, count: Callable[[int], None], closes: bool):
        self._raw, self._count, self._closes = raw, count, closes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._raw.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def readinto(self, buffer: Any) -> int | None:
        n_bytes = self._raw.readinto(buffer)
        self._count(n_bytes or 0)
        return n_bytes

    def close(self) -> None:
        if self._closes:
            self._raw.close()
        super().close()


class _Unzipped(gzip.GzipFile):
    """A file of gzip that says in one sentence that it is damaged."""

    def readinto(self, buffer: Any) -> int:
        try:
            return super().readinto(buffer)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{self.name} is not a complete gzip file: {error}") from error


@contextlib.contextmanager
def opened(path: Path | None, count: Callable[[int], None] = lambda n_bytes: None) -> Iterator[BinaryIO]:
    """Open a file, decompressed if its name ends in .gz, or standard input.

    Args:
      path: the file; None is standard input.
      count: called with numbers of bytes that are read from the disk.

    Raises:
      ValueError: standard input is closed; or later, when it is read, compressed data is damaged.
    """
    if path is None and sys.stdin is None:
        raise ValueError("standard input is closed: there is nothing to read")
    raw: Any = sys.stdin.buffer if path is None else path.open("rb", buffering=0)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(io.BufferedReader(_Counted(raw, count, path is not None), BUFFER))
        if path is None or not form_of(path).zipped:
            yield file
            return
        unzipped: Any = stack.enter_context(_Unzipped(str(path), "rb", fileobj=file))
        yield stack.enter_context(io.BufferedReader(unzipped, BUFFER))


# ---- text


def blocks(
    file: BinaryIO, name: str, encoding: str = UTF_8, offset: int = 0, pending: bytes = b"", stop: int = END
) -> Iterator[tuple[str, int, bool]]:
    """Yield the text of blocks, the offset of their ends, and whether the file ends. The last one may be empty.

    Args:
      file: the file, positioned at `offset`.
      name: its name in messages.
      encoding: the encoding of the text. A byte order mark at the beginning is left out.
      offset: where the first block begins.
      pending: the bytes before it that belong to its first character.
      stop: blocks that begin here or later are not read.

    Raises:
      ValueError: invalid bytes.
    """
    decoder, end, first = codecs.getincrementaldecoder(encoding)(), False, not offset
    decoder.decode(pending)
    while not end and offset < stop:
        data = file.read(BLOCK)
        end = not data
        at = offset - len(decoder.getstate()[0])  # with an incomplete character
        text = _decoded(lambda data=data, end=end: decoder.decode(data, final=end), name, at, encoding)
        offset += len(data)
        if first and text:
            text, first = text.removeprefix(BOM), False
        yield text, offset, end


def lines(
    file: BinaryIO, name: str, encoding: str = UTF_8, start: int = 0, stop: int = END
) -> Iterator[tuple[str, int]]:
    """Yield each line that begins in the range, with an offset: of its end in UTF-8, else of a later place.

    Lines end with a line feed, as in JSON lines. Other characters that Python's text files accept stay in the line.

    Raises:
      ValueError: invalid bytes.
    """
    if encoding != UTF_8:
        yield from _lines(blocks(file, name, encoding))
        return
    offset = start
    if start:
        file.seek(start - 1)
        offset += len(file.readline()) - 1
    if offset >= stop:
        return
    for line in file:
        text = _decoded(line.decode, name, offset, encoding)
        yield (text if offset else text.removeprefix(BOM)), offset + len(line)
        offset += len(line)
        if offset >= stop:
            return


def _lines(texts: Iterator[tuple[str, int, bool]]) -> Iterator[tuple[str, int]]:
    rest, offset = [], 0
    for text, offset, _ in texts:
        first, *others = text.split("\n")
        rest.append(first)
        for part in others:
            yield "".join(rest) + "\n", offset
            rest = [part]
    if last := "".join(rest):
        yield last, offset


def _decoded(decode: Callable[[], str], name: str, offset: int, encoding: str) -> str:
    """Return the result of `decode()`. An error names the invalid byte and its offset in the file."""
    try:
        return decode()
    except UnicodeDecodeError as error:
        byte, at = error.object[error.start], offset + error.start
        likely = "utf-16" if encoding == UTF_8 and not at and error.object[:2] in UTF_16 else "cp1252"
        raise ValueError(
            f"{name} is not {encoding.upper()} text: byte {byte:#04x} at offset {at:,} ({error.reason}); if the file "
            f"has another encoding, name it, for example encoding {likely}"
        ) from error
