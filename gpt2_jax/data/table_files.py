"""The rows of .csv, .tsv and .parquet files."""

from __future__ import annotations

import contextlib
import csv
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from gpt2_jax.data.fields import Fields, Places
from gpt2_jax.data.reading import Form

LONGEST_FIELD = 2**31 - 1  # characters of a field of .csv; Python's own limit is 131,072
DELIMITERS = ",;\t"
ROWS = 256  # of .parquet, that are turned into Python objects at a time


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


def parquet_rows(file: BinaryIO, places: Places, fields: Fields | None) -> Iterator[tuple[Any, int]]:
    """Yield the rows of a .parquet file as dicts with the needed fields, and their numbers.

    Raises:
      ValueError: a column is missing, the file is damaged, or pyarrow is not installed.
    """
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
