"""JSON lines with prompts: how a line is read and checked, and how it is written with its results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

INDEX, LINE, ERROR = "index", "line", "error"

Check = Callable[[dict[str, Any]], None]
"""Takes the fields of a line, and raises ValueError if the prompt cannot be completed."""
Complete = Callable[[list[dict[str, Any]], list[int]], list[dict[str, Any]]]
"""Takes the fields of some lines, and the indices of these prompts. Returns the results of each as a dict."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A line that is not blank.

    Attributes:
      fields: the fields of its object, with a text "prompt"; of a bad line only "line", its number from 1.
      error: what is wrong with a bad line; "" for a prompt.
    """

    fields: dict[str, Any]
    error: str = ""


@dataclasses.dataclass
class Reader:
    """Reads lines in order.

    Attributes:
      source: name of the input, for messages.
      taken: names of fields that the output needs, in addition to "index". No prompt may have them.
      check: checks the fields of each prompt; None checks nothing more.
      skip: takes the message of each bad line, which then becomes a record of its error; None raises the error.
      number: number of the last line that was read, from 1.
      also: returns whether an object without a "prompt" is a prompt too; None means that none is.
    """

    source: object
    taken: Sequence[str] = ()
    check: Check | None = None
    skip: Callable[[str], None] | None = None
    number: int = 0
    also: Callable[[dict[str, Any]], bool] | None = None

    def read(self, lines: Iterable[bytes]) -> Iterator[Prompt]:
        """Yield the prompts of the next lines. Blank lines are skipped.

        Raises:
          ValueError: a line is bad, and `skip` is None; the message says which line, and why.
        """
        for line in lines:
            self.number += 1
            line = line.removeprefix(b"\xef\xbb\xbf") if self.number == 1 else line
            if not line.strip():
                continue
            try:
                yield Prompt(self._fields(line))
            except ValueError as error:
                if self.skip is None:
                    raise
                self.skip(str(error))
                yield Prompt({LINE: self.number}, str(error))

    def _fields(self, line: bytes) -> dict[str, Any]:
        name = f"{self.source}, line {self.number}"
        try:
            fields = json.loads(line.decode())
            as_line({"": fields})  # Python reads NaN and numbers too large, which are not JSON
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is not JSON: {error}") from error
        fields = {"prompt": fields} if isinstance(fields, str) else fields
        known = isinstance(fields, dict) and isinstance(fields.get("prompt"), str)
        if not known and not (isinstance(fields, dict) and self.also is not None and self.also(fields)):
            raise ValueError(f'{name} is not a prompt: it must be an object with a string "prompt", or a string')
        reserved = (INDEX, *self.taken) if self.skip is None else (INDEX, ERROR, *self.taken)
        if taken := [field for field in reserved if field in fields]:
            raise ValueError(f'{name} has a field "{taken[0]}", which the output needs: rename it')
        if self.check is not None:
            try:
                self.check(fields)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return fields


def read_prompts(data: bytes, reader: Reader) -> list[Prompt]:
    """Return the prompts of a whole file, given its bytes.

    Raises:
      ValueError: as `Reader.read`.
    """
    return list(reader.read(data.split(b"\n")))


def completed(batch: Sequence[Prompt], first: int, complete: Complete, results_in: Sequence[str]) -> bytes:
    """Complete some prompts, and return their output lines. A bad line has its number and its error.

    Args:
      batch: the prompts.
      first: the index of the first one.
      complete: completes those that are not bad lines.
      results_in: the names of all fields that it may return.

    Raises:
      ValueError: the results are not one dict of these fields for each prompt.
    """
    good = [i for i, prompt in enumerate(batch) if not prompt.error]
    results = complete([batch[i].fields for i in good], [first + i for i in good]) if good else []
    if len(results) != len(good):
        raise ValueError(f"complete returned {len(results)} results for {len(good)} prompts")
    for result in results:
        if unknown := result.keys() - set(results_in):
            raise ValueError(f"complete returned a field {min(unknown)!r}, which is not in {', '.join(results_in)}")
    more = dict(zip(good, results, strict=True))
    return b"".join(
        as_line(prompt.fields | more.get(i, {ERROR: prompt.error}) | {INDEX: first + i})
        for i, prompt in enumerate(batch)
    )


def as_line(record: dict[str, Any]) -> bytes:
    """Return a line of JSON in UTF-8. A lone surrogate, which UTF-8 cannot hold, becomes its JSON escape."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace") + b"\n"
