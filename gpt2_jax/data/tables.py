"""The records of .jsonl, .json, .csv, .tsv and .parquet files; errors say where and what is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from gpt2_jax.data.fields import Fields, Places
from gpt2_jax.data.json_files import json_lines, json_values
from gpt2_jax.data.reading import END, UTF_8, Form, blocks, check_encoding, form_of, lines, opened
from gpt2_jax.data.table_files import Rows, parquet_rows
from gpt2_jax.files import expanded


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
        return json_lines(lines(file, places.name, encoding, start, stop), places)
    if form.name == "json":
        return json_values((text for text, _, _ in blocks(file, places.name, encoding)), places)
    return parquet_rows(file, places, fields)
