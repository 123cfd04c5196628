"""The records of .jsonl, .json, .csv, .tsv and .parquet files; errors say where and what is wrong."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from gpt2_jax.data.reading import END, UTF_8, Form, blocks, check_encoding, form_of, lines, opened
from gpt2_jax.files import expanded

LONGEST_FIELD = 2**31 - 1  # characters of a field of .csv; Python's own limit is 131,072
DELIMITERS = ",;\t"
ROWS = 256  # of .parquet, that are turned into Python objects at a time
DECODER = json.JSONDecoder()
WHITESPACE = re.compile(r"[ \t\r\n]*")


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


def texts_of(record: Any, fields: Fields) -> list[str]:
    """Return the texts of a record. An error says what is wrong; its place is to be put before."""
    if isinstance(record, str) and not fields.pairs:
        record = {fields.text: record}
    if not isinstance(record, dict):
        raise ValueError(f" is not a JSON object with a text: {json.dumps(record)[:60]}")
    for field in fields.names:
        if field not in record:
            raise ValueError(f' has no field "{field}"; it has: {", ".join(record) or "none"}')
        if not isinstance(record[field], str):
            raise ValueError(f': the field "{field}" is not a string: {str(record[field])[:60]!r}')
    return [record[field] for field in fields.names]


@dataclasses.dataclass(frozen=True)
class Places:
    """Names the records of a file in messages, and says what happens to a bad one.

    Attributes:
      name: the file.
      unit: what is counted: "line" or "row".
      n_before: returns how many of them are before the part of the file that is read.
      skip: called with the number of a bad record and what is wrong with it. With None, a bad record is an error.
    """

    name: str
    unit: str = "line"
    n_before: Callable[[], int] = lambda: 0
    skip: Callable[[int, str], None] | None = None

    def of(self, number: int) -> str:
        """Return the place of a record in words."""
        return f"{self.name}, {self.unit} {self.n_before() + number}"

    def error(self, number: int, what: str) -> ValueError:
        """Return the error for a record."""
        return ValueError(f"{self.of(number)}{what}")

    def bad(self, number: int, what: str, cause: Exception | None = None) -> None:
        """Skip a bad record.

        Raises:
          ValueError: bad records are errors.
        """
        if self.skip is None:
            raise self.error(number, what) from cause
        self.skip(number, what)


def records(
    path: str | os.PathLike,
    encoding: str = UTF_8,
    skip_bad: bool = False,
    on_skip: Callable[[str], None] = lambda message: None,
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield every record of a file as a dict, with its place in words for messages: "FILE, line 7".

    Args:
      path: a .jsonl or .ndjson file (an object per line), a .json file (an array of objects, or objects one after
        another), a .csv or .tsv file (the first line names the columns), or a .parquet file. All but the last may be
        compressed with gzip: .jsonl.gz. Values of .csv and .tsv are strings. Memory is bounded by the longest record,
        and for .parquet by a row group.
      encoding: a text encoding of Python; .parquet does not use it.
      skip_bad: leave out what is not a record: a line that is not a JSON object, or a row with too few or too many
        columns.
      on_skip: called with a message for each one that is left out.

    Raises:
      ValueError: the type of the file is unknown, a record is malformed, bytes are not in this encoding, or pyarrow is
        not installed. A malformed .json file is an error also with `skip_bad`, as is a quote that never ends.
      FileNotFoundError: the file does not exist.
    """
    path, encoding = expanded(path), check_encoding(encoding)
    form = form_of(path)
    if not form.has_fields:
        raise ValueError(f"{path} has no records: use a .jsonl, .json, .csv, .tsv or .parquet file")
    places = Places(str(path), unit_of(form))
    if skip_bad:
        places = dataclasses.replace(places, skip=lambda number, what: on_skip(f"{places.of(number)}{what}"))
    with opened(path) as file:
        rows = Rows(lines(file, str(path), encoding), form) if form.name == "csv" else None
        for record, number in read_records(file, form, places, encoding, rows=rows):
            if isinstance(record, dict):
                yield record, places.of(number)
            else:
                places.bad(number, f" is not a JSON object: {json.dumps(record)[:60]}")


def unit_of(form: Form) -> str:
    """Return what is counted in messages about a file."""
    return "row" if form.name == "parquet" else "line"


def read_records(
    file: BinaryIO,
    form: Form,
    places: Places,
    encoding: str = UTF_8,
    fields: Fields | None = None,
    rows: Rows | None = None,
    start: int = 0,
    stop: int = END,
) -> Iterator[tuple[Any, int]]:
    """Yield the records of a range of a file, each with its number in the range.

    Args:
      file: the file.
      form: its form, which has fields.
      places: names records, and says what happens to bad ones.
      encoding: the encoding of the text.
      fields: the fields that are needed; None means all.
      rows: for .csv, the rows of the file, from its beginning. Their numbers are not counted from `start`.
      start: offset in bytes; only .jsonl and .csv files in UTF-8 can be read in parts.
      stop: offset in bytes.
    """
    if rows is not None:
        return rows.records(places, fields, start, stop)
    if form.name == "jsonl":
        return _json_lines(lines(file, places.name, encoding, start, stop), places)
    if form.name == "json":
        return _json_values((text for text, _, _ in blocks(file, places.name, encoding)), places)
    return _parquet_rows(file, places, fields)


# ---- JSON


def _json_lines(numbered: Iterable[tuple[str, int]], places: Places) -> Iterator[tuple[Any, int]]:
    for number, (line, _) in enumerate(numbered, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            places.bad(number, f" is not JSON: {error}", error)
        else:
            yield record, number


class _Unread:
    """The text of a file of JSON that is not read so far. Its beginning is in memory.

    Attributes:
      line: the number of the line where it begins.
    """

    def __init__(self, texts: Iterator[str]):
        self.line = 1
        self._texts, self._text, self._at = texts, "", 0

    def next(self) -> str:
        """Return the next character that is not white space; "" at the end of the file."""
        while True:
            self._skip(WHITESPACE.match(self._text, self._at).end())  # type: ignore[union-attr]  # it always matches
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self) -> None:
        """Move behind the next character."""
        self._skip(self._at + 1)

    def value(self) -> Any:
        """Return the value that begins here, and move behind it.

        Raises:
          ValueError, RecursionError: it is malformed.
        """
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except (ValueError, RecursionError):
                if not self._more():
                    raise
                continue
            n_characters = end - self._at
            if end < len(self._text) or not self._more():
                self._skip(self._at + n_characters)
                return value

    def _skip(self, to: int) -> None:
        self.line += self._text.count("\n", self._at, to)
        self._at = to

    def _more(self) -> bool:
        """Read on, at least as much as is in memory, so that a long value is not decoded often."""
        rest = self._text[self._at :]
        more, size = [], 0
        while size <= len(rest) and (text := next(self._texts, None)) is not None:
            more.append(text)
            size += len(text)
        self._text, self._at = "".join([rest, *more]), 0
        return size > 0


def _json_values(texts: Iterator[str], places: Places) -> Iterator[tuple[Any, int]]:
    """Yield the values of a JSON array, or values one after another."""
    unread = _Unread(texts)
    is_array = unread.next() == "["
    if is_array:
        unread.take()
    first = True
    while (character := unread.next()) and not (is_array and character == "]"):
        if is_array and not first:
            if character != ",":
                raise places.error(unread.line, f" is not JSON: {character} instead of a comma or ]")
            unread.take()
            unread.next()
        first, line = False, unread.line
        try:
            value = unread.value()
        except (ValueError, RecursionError) as error:
            raise places.error(line, f" is not JSON: {getattr(error, 'msg', error)}") from error
        yield value, line
    if is_array and not character:
        raise places.error(unread.line, " is not JSON: the array does not end")
    if is_array:
        unread.take()
        if character := unread.next():
            raise places.error(unread.line, f" is not JSON: {character} after the end of the array")


# ---- tables


class Rows:
    """The rows of a .csv or .tsv file. A .csv file may use ; or tabs, if its first line says so.

    Attributes:
      offset: where the next row begins, in bytes.
      delimiter: the character between fields; "" before the first line was read.
    """

    def __init__(self, numbered: Iterable[tuple[str, int]], form: Form):
        self.offset, self.delimiter = 0, ""
        self._lines, self._form = iter(numbered), form
        self._reader: Any = None  # of the csv module
        self._columns: dict[str, int] = {}
        self._n_columns = self._n_needed = 0

    def records(self, places: Places, fields: Fields | None, start: int, stop: int) -> Iterator[tuple[Any, int]]:
        """Yield the rows that begin in the range, as dicts, each with the number of the line where it ends."""
        limit = csv.field_size_limit(LONGEST_FIELD)
        try:
            if not self._columns:
                self._begin(places.name, fields)
            reader = self._reader
            while self.offset < stop:
                begin, row, trouble = self.offset, [], None
                try:
                    if (row := next(reader, None)) is None:
                        break
                except csv.Error as error:
                    trouble = error
                if begin < start:
                    continue
                if trouble is not None:
                    self._malformed(places, trouble)
                elif row and (wrong := self._misfit(row)):
                    places.bad(reader.line_num, wrong)
                elif row:  # an empty line is not a row
                    yield {name: row[column] for name, column in self._columns.items()}, reader.line_num
        finally:
            csv.field_size_limit(limit)

    def _begin(self, name: str, fields: Fields | None) -> None:
        """Read the first line, and find the columns.

        Raises:
          ValueError: there is no such column, or a name is there twice.
        """
        first = next(self._lines, None)
        names = fields.names if fields else ()
        self.delimiter = "\t" if self._form.suffix.startswith(".tsv") else _delimiter(first[0] if first else "", names)
        every = itertools.chain([first] if first else [], self._lines)
        self._reader = csv.reader(self._counted(every), delimiter=self.delimiter, strict=True)
        try:
            header = next(self._reader, None) or []
        except csv.Error as error:
            raise ValueError(f"{name}, line {self._reader.line_num} is not CSV: {error}") from error
        self._n_columns = len(header)
        self._columns = _columns_of(header, fields, name, self.delimiter)
        self._n_needed = 1 + max(self._columns.values())

    def _counted(self, numbered: Iterable[tuple[str, int]]) -> Iterator[str]:
        for line, self.offset in numbered:
            yield line

    def _malformed(self, places: Places, error: csv.Error) -> None:
        number, what = self._reader.line_num, f" is not CSV: {error}"
        if "unexpected end" in str(error):  # a quote took all rows until the end: they are not one bad row
            raise places.error(number, what) from error
        places.bad(number, what, error)

    def _misfit(self, row: list[str]) -> str:
        """Return what is wrong with the number of columns; "" if it is right. Empty columns at the end are allowed."""
        if len(row) == self._n_columns:
            return ""
        if len(row) < self._n_needed:
            return f": the row has {len(row)} columns, too few"
        if any(row[self._n_columns :]):
            return (
                f": the row has {len(row)} columns, but the first line names {self._n_columns}: put quotes around a "
                f"field that contains {_spelled(self.delimiter)}"
            )
        return ""


def _columns_of(header: list[str], fields: Fields | None, name: str, delimiter: str) -> dict[str, int]:
    """Return {field: column}. A single column may have any name."""
    if fields is None:
        if doubled := [column for i, column in enumerate(header) if column in header[:i]]:
            raise ValueError(f'{name}: the first line names the column "{doubled[0]}" twice')
        if not header:
            raise ValueError(f"{name} is empty: its first line must name the columns")
        return {column: i for i, column in enumerate(header)}
    with contextlib.suppress(ValueError):
        return {field: header.index(field) for field in fields.names}
    if len(header) == 1 and fields == Fields():
        return {fields.text: 0}
    missing = next(field for field in fields.names if field not in header)
    divided = f" (divided by {_spelled(delimiter)})" if header and delimiter != "," else ""
    raise ValueError(f'{name} has no column "{missing}"; its first line names: {", ".join(header) or "none"}{divided}')


def _delimiter(line: str, names: Sequence[str]) -> str:
    """Return the delimiter with which the first line has the wanted names, or else the most names."""
    headers = {delimiter: _header(line, delimiter) for delimiter in DELIMITERS}
    for delimiter, header in headers.items():
        if names and set(names) <= set(header):
            return delimiter
    return max(headers, key=lambda delimiter: len(headers[delimiter]))


def _header(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return []


def _spelled(delimiter: str) -> str:
    return "a tab" if delimiter == "\t" else delimiter


def _parquet_rows(file: BinaryIO, places: Places, fields: Fields | None) -> Iterator[tuple[Any, int]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f'{places.name} needs pyarrow: pip install "gpt2-jax[parquet]"') from error
    try:
        table = ParquetFile(file)
        columns = table.schema_arrow.names
        missing = [name for name in (fields.names if fields else ()) if name not in columns]
        if missing:
            raise ValueError(f'{places.name} has no column "{missing[0]}"; it has: {", ".join(columns) or "none"}')
        batches = table.iter_batches(ROWS, columns=list(fields.names) if fields else None)
        for number, row in enumerate(itertools.chain.from_iterable(batch.to_pylist() for batch in batches), start=1):
            yield row, number
    except ArrowException as error:
        raise ValueError(f"{places.name} is not a complete .parquet file: {error}") from error
