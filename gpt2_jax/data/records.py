"""The records of .jsonl and .csv files: the fields that hold a document, and errors that say what is wrong."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
from collections.abc import Iterable, Iterator

LONGEST_FIELD = 2**31 - 1  # characters of a field of .csv; Python's own limit is 131,072


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


def texts_of(line: str, fields: Fields) -> list[str]:
    """Return the texts of a line of JSON. An error says what is wrong with the line; its name is to be put before."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f" is not JSON: {error}") from error
    if isinstance(record, str) and not fields.pairs:
        record = {fields.text: record}
    if not isinstance(record, dict):
        raise ValueError(f" is not a JSON object with a text: {line.strip()[:60]}")
    for field in fields.names:
        if field not in record:
            raise ValueError(f' has no field "{field}"; it has: {", ".join(record) or "none"}')
        if not isinstance(record[field], str):
            raise ValueError(f': the field "{field}" is not a string: {str(record[field])[:60]!r}')
    return [record[field] for field in fields.names]


class Rows:
    """The rows of a .csv file.

    Attributes:
      reader: yields the rows.
      offset: where the next row begins, in bytes.
      columns: the numbers of the columns to read; none before the first row was read.
    """

    def __init__(self, lines: Iterable[tuple[str, int]]):
        self.offset = 0
        self.columns: list[int] = []
        self.reader = csv.reader(self._counted(lines), strict=True)

    def _counted(self, lines: Iterable[tuple[str, int]]) -> Iterator[str]:
        for line, self.offset in lines:
            yield line


def columns_of(header: list[str] | None, fields: Fields, name: str) -> list[int]:
    """Return the numbers of the columns to read; a single column may have any name."""
    with contextlib.suppress(ValueError):
        return [(header or []).index(field) for field in fields.names]
    if header and len(header) == 1 and fields == Fields():
        return [0]
    missing = [field for field in fields.names if field not in (header or [])]
    raise ValueError(f'{name} has no column "{missing[0]}"; its first line names: {", ".join(header or []) or "none"}')
