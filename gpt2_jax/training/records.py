"""JSON lines that grow while a run goes on, and are cut back where it is resumed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt2_jax.files import replacing_file

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


class Records:
    """A file of JSON objects, one a line, each with the number of its "step".

    A line is written in one call, and none is held back: a process that is killed loses at most a part of its last.
    Opened again to go on after `step`, the file loses what stands there of later steps, so that nothing stands twice.

    Raises:
      ValueError: a line that is whole is no JSON object with a step.
    """

    def __init__(self, path: str | os.PathLike, step: int):
        self.path = Path(path)
        if self.path.exists():
            _cut(self.path, step)
        self._file = self.path.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a line; NaN and infinities, which JSON has not, become null."""
        plain = {name: _plain(value) for name, value in record.items()}
        line = memoryview((json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n").encode())
        while line:  # a call may write less, as on a disk that fills up; the next one then says why
            line = line[self._file.write(line) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_records(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines; a part of a line at the end, as a kill leaves it, is left out.

    Raises:
      ValueError: a whole line is no JSON object with a step; the message names the file and the line.
    """
    return (record for record, _ in _lines(Path(path)))


def _cut(path: Path, step: int) -> None:
    """Remove the lines of later steps, and a part of a line at the end; the file is replaced in one step."""
    with replacing_file(path) as temporary, temporary.open("wb") as new:
        for record, line in _lines(path):
            if step and record["step"] <= step:  # a run that begins anew, at 0, keeps nothing of one before it
                new.write(line)


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:  # of JSON, and of bytes that are no text
                record = None
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError(f'{path}, line {number} is no JSON object with a "step": repair it or remove the file')
            yield record, line


def _plain(value: Any) -> Any:
    """Return a number that JSON can hold: scalars of NumPy and JAX as Python's, and None for what is not finite."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
