"""JSON lines files that grow during a run, and are cut back when it is resumed."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt2_jax.files import replacing_file

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


class Records:
    """A file of JSON objects, one per line, each with the number of its "step".

    A line is written in one call, without a buffer: a killed process loses at most a part of its last line. When the
    file is opened to resume after `step`, the lines of later steps are removed, so that none appears twice.

    Raises:
      ValueError: a complete line is not a JSON object with a step.
    """

    def __init__(self, path: str | os.PathLike, step: int):
        self.path = Path(path)
        if self.path.exists():
            _cut(self.path, step)
        self._file = self.path.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a line. NaN and infinities become null, because JSON does not have them."""
        plain = {name: _plain(value) for name, value in record.items()}
        append(self._file, (json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n").encode(), self.path)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def append(file: io.FileIO, data: bytes, path: Path) -> None:
    """Write all of the data to a file without a buffer.

    Raises:
      OSError: the disk is full, or the file cannot be written; the message names it.
    """
    left = memoryview(data)
    try:
        while left:  # a call may write only a part, as on a full disk; the next call then raises the error
            left = left[file.write(left) :]
    except OSError as error:
        clear = OSError(f"{path} cannot be written: {error.strerror or error}")
        clear.errno = error.errno
        raise clear from error


def read_records(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON lines file. An incomplete last line, as a kill leaves it, is skipped.

    Raises:
      ValueError: a complete line is not a JSON object with a step; the message names the file and the line.
    """
    return (record for record, _ in _lines(Path(path)))


def _cut(path: Path, step: int) -> None:
    """Remove the lines of later steps and an incomplete last line; the file is replaced in one step."""
    with replacing_file(path) as temporary, temporary.open("wb") as new:
        for record, line in _lines(path):
            if step and record["step"] <= step:  # a run that starts at 0 keeps nothing of an earlier run
                new.write(line)


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:  # invalid JSON, or bytes that are not UTF-8
                record = None
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError(f'{path}, line {number} is not a JSON object with a "step": repair or remove the file')
            yield record, line


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold: NumPy and JAX scalars as Python numbers, and None if it is not finite."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
