"""The files beside an output that is being written: part files, which hold finished lines, and locks.

The first line of a part file identifies the input, the settings and the weights. One process writes `NAME.part`.
Several processes write one each: `NAME.part-1-of-3` is that of the process with index 1.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt2_jax import files
from gpt2_jax.generation.prompt_lines import as_line

MODEL = "model_sha256"
HEADER = {"settings", "input_sha256", MODEL}


def part(target: Path, index: int = 0, count: int = 1) -> Path:
    """Return the name of a process's part file."""
    return target.with_name(f"{target.name}.part" + (f"-{index}-of-{count}" if count > 1 else ""))


def parts_of_several(target: Path) -> list[Path]:
    """Return the part files that several processes have left or are writing."""
    return sorted(target.parent.glob(f"{glob.escape(target.name)}.part-*[0-9]-of-*[0-9]"))


def unfinished(path: Path) -> Path:
    """Return the name under which a complete file is made. The holder of the lock may overwrite it."""
    return path.with_name(f".{path.name}.new")


@contextlib.contextmanager
def alone(target: Path, index: int = 0, count: int = 1) -> Iterator[None]:
    """Keep other processes from writing the same target, or the same share of it.

    The process with index 0 holds the same lock for any number of processes.
    """
    share = f".{index}-of-{count}" if index else ""
    path = target.with_name(f".{target.name}{share}.lock")
    which = f" as the one with index {index}" if index else ""
    busy = ValueError(f"another process is writing {target}{which}: wait for it, or name another --output")
    with files.lock(path, busy):
        try:
            yield
        finally:
            if target.exists():  # a process that still locks the removed file finds the target and does nothing
                with contextlib.suppress(OSError):
                    path.unlink()


def header_of(settings: Mapping[str, Any], data: bytes) -> dict[str, Any]:
    """Return the header for settings and the bytes of an input, still without the model."""
    header = {"settings": dict(settings), "input_sha256": hashlib.sha256(data).hexdigest()}
    return json.loads(as_line(header))  # as JSON returns it: tuples become lists


def begin(path: Path, temporary: Path, header: dict[str, Any]) -> None:
    """Create a part file without lines."""
    with files.replacing_file(path, temporary) as new:
        new.write_bytes(as_line(header))


def read_header(path: Path) -> dict[str, Any] | None:
    """Return a part file's first line, or None if this module did not write it."""
    with path.open("rb") as file:
        try:
            header = json.loads(file.readline())
        except ValueError:
            return None
    return header if isinstance(header, dict) and header.keys() | {MODEL} == HEADER else None


def check_header(path: Path, old: dict[str, Any] | None, new: dict[str, Any]) -> None:
    """Check that a part file was started from the same input and settings.

    Raises:
      ValueError: it was not, or it is not a part file of this command; nothing was changed.
    """
    if old is None:
        raise ValueError(f"{path} exists and is not an unfinished output: move it away or name another --output")
    if MODEL not in old:
        raise ValueError(
            f"{path} was started by an earlier version, which did not record the weights: finish it with that version, "
            "or delete it to start again"
        )
    changes = []
    if old["input_sha256"] != new["input_sha256"]:
        changes.append(f"the input's SHA-256 was {old['input_sha256']} and is {new['input_sha256']}")
    was, now = old["settings"], new["settings"]
    for name in dict.fromkeys([*was, *now]):
        if name not in was or name not in now or was[name] != now[name]:
            before, after = (json.dumps(it[name], ensure_ascii=False) if name in it else "not set" for it in (was, now))
            changes.append(f"{name} was {before} and is {after}")
    if changes:
        raise ValueError(
            f"{path} was started from a different input or different settings: {'; '.join(changes)}. "
            "Run with the same ones to resume, or delete it to start again"
        )


def check_model(path: Path, old: str | None, new: str | None) -> None:
    """Check that a part file was started with the same weights.

    Raises:
      ValueError: it was not; nothing was changed.
    """
    if old != new:
        raise ValueError(
            f"{path} was started with other weights: the model's SHA-256 was {old} and is {new}. Run "
            "with the same weights to resume, or delete it to start again"
        )


def not_written(path: Path, number: int) -> ValueError:
    """Return the error for a line that is not what was written there."""
    return ValueError(f"{path}, line {number} is not what was written there: delete it to start again")


def complete_already(target: Path) -> ValueError:
    """Return the error for a target that exists and is not the result of the part files."""
    return ValueError(f"{target} exists and is complete: delete it or name another --output")
