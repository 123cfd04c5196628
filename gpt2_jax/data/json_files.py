"""The values of JSON files: one per line, in an array, or one after another."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from gpt2_jax.data.fields import Places

DECODER = json.JSONDecoder()
WHITESPACE = re.compile(r"[ \t\r\n]*")


def json_lines(numbered: Iterable[tuple[str, int]], places: Places) -> Iterator[tuple[Any, int]]:
    """Yield the value of each line that is not empty, and the number of the line.

    Raises:
      ValueError: a line is not JSON, and bad records are errors.
    """
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


def json_values(texts: Iterator[str], places: Places) -> Iterator[tuple[Any, int]]:
    """Yield the values of a JSON array, or values one after another, and the lines where they begin.

    Raises:
      ValueError: the text is not JSON. What follows cannot be read then, so this is never skipped.
    """
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
