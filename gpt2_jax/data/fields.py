"""Which fields of a record hold a document, and how messages name the place of a record."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any


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


def check_has(record: Mapping[str, Any], field: str, place: str = "") -> None:
    """Check that a record has a field.

    Raises:
      ValueError: it does not; `place` begins the message.
    """
    if field not in record:
        raise ValueError(f'{place} has no field "{field}"; it has: {", ".join(map(str, record)) or "none"}')


def texts_of(record: Any, fields: Fields) -> list[str]:
    """Return the texts of a record. An error says what is wrong; its place is to be put before."""
    if isinstance(record, str) and not fields.pairs:
        record = {fields.text: record}
    if not isinstance(record, dict):
        raise ValueError(f" is not a JSON object with a text: {json.dumps(record)[:60]}")
    for field in fields.names:
        check_has(record, field)
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
