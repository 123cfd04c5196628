"""Completes the prompts of a file into another file, a batch at a time. After a kill, the next call resumes.

Unfinished work is in a part file, the target's name with ".part". Its first line identifies the input and the settings.
One line per prompt follows, in order. At the end, these lines are copied to a hidden file, which takes the target's
name in one step. Then the part file is removed. So at every moment there is nothing yet, or a part file that shows how
far the work is, or the complete target.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2_jax import files, progress
from gpt2_jax.checks import whole_number
from gpt2_jax.generation.prompt_lines import INDEX, Check, Complete, Reader, as_line, completed, read_prompts

MODEL = "model_sha256"
HEADER = {"settings", "input_sha256", MODEL}


def complete_file(
    source: str | os.PathLike,
    target: str | os.PathLike,
    complete: Complete,
    settings: Mapping[str, Any],
    batch_size: int | Callable[[], int],
    fields: Sequence[str] = ("samples",),
    *,
    model: Callable[[], str | None] = lambda: None,
    check: Check | None = None,
    skip: Callable[[str], None] | None = None,
    data: bytes | None = None,
    shown: bool | None = None,
) -> int:
    """Complete every prompt of a JSON lines file, and write one line per prompt, in order, to another file.

    A prompt is a line with an object that has a "prompt", or with only a string. Blank lines are skipped. A line of the
    target has the object's fields, those that `complete` returns, and "index", the prompt's number from 0.

    If the process is killed, call it again with the same input and settings: it resumes after the last complete line.
    The target is then, byte for byte, what an uninterrupted call would have written, if the result of `complete` for a
    prompt depends only on that prompt and its index.

    Args:
      source: the input, UTF-8.
      target: the output, UTF-8; it must not exist yet.
      complete: takes the fields of a batch and their indices, and returns a dict for each. JSON must be able to hold
        the dicts.
      settings: {name: value} of everything else that the results depend on, except for the model. JSON must be able to
        hold it.
      batch_size: prompts per call of `complete`, 1 or more; the last call may have fewer. Or a function that returns
        it, called after all prompts were checked.
      fields: the names of all fields that `complete` may return.
      model: returns the fingerprint of the model. It is called after everything else was checked, so it may load the
        weights.
      check: raises ValueError for the fields of a prompt that cannot be completed; called for each prompt at first.
      skip: takes the message of each bad line. A bad line is then written as {"line", "error", "index"}, and its
        prompt's number stays unused. None raises the error.
      data: the input's bytes, if `source` is only their name.
      shown: True shows a progress bar on standard error; None shows it if that is a terminal.

    Returns:
      The number of lines that this call wrote.

    Raises:
      FileNotFoundError: the input or the folder of the output does not exist.
      ValueError: raised before anything is generated or written: a line of the input is not a prompt, or the output
        exists, is the input, is being written by another process, or was started from a different input, settings or
        weights.
    """
    source, target = Path(source), Path(target).resolve()
    if data is None:
        _check_source(source, target)
    _check_target(target)
    data = source.read_bytes() if data is None else data
    prompts = read_prompts(data, Reader(source, fields, check, skip))
    n_together = whole_number("batch_size", batch_size() if callable(batch_size) else batch_size, 1)
    with _alone(target):
        if not _begin(target, _header(settings, data), len(prompts), model):
            return 0
        part = _part(target)
        n_done, title = _resume(part, len(prompts)), f"writing {target.name}"
        # A batch may take minutes, so the speed is averaged over the last hour.
        with progress.bars("count", "left", shown=shown, stay=True, period=3600) as bars, part.open("ab") as file:
            bars.update(title, n_done, len(prompts))
            for first in range(n_done, len(prompts), n_together):
                batch = prompts[first : first + n_together]
                file.write(completed(batch, first, complete, fields))
                file.flush()
                bars.update(title, first + len(batch), len(prompts))
        _finish(target)
    return len(prompts) - n_done


def _check_source(source: Path, target: Path) -> None:
    if not source.exists():
        raise FileNotFoundError(f"no such file: {source}")
    if source.is_dir():
        raise ValueError(f"{source} is a folder, not a file of prompts")
    if source.resolve() in (target, _part(target), _new(target)) or (target.exists() and target.samefile(source)):
        raise ValueError(f"{target} is the input: name another --output")


def _check_target(target: Path) -> None:
    if target.is_dir():
        raise ValueError(f"{target} is a folder: name a file in it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {target.parent}")


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _new(target: Path) -> Path:
    """Return the name under which a complete file is made. The holder of the lock may overwrite it."""
    return target.with_name(f".{target.name}.new")


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Keep other processes from writing the same target."""
    path = target.with_name(f".{target.name}.lock")
    busy = ValueError(f"another process is writing {target}: wait for it, or name another --output")
    with files.lock(path, busy):
        try:
            yield
        finally:
            if target.exists():  # a process that still locks the removed file finds the target and does nothing
                with contextlib.suppress(OSError):
                    path.unlink()


def _header(settings: Mapping[str, Any], data: bytes) -> dict[str, Any]:
    header = {"settings": dict(settings), "input_sha256": hashlib.sha256(data).hexdigest()}
    return json.loads(as_line(header))  # as JSON returns it: tuples become lists


def _begin(target: Path, header: dict[str, Any], n_prompts: int, model: Callable[[], str | None]) -> bool:
    """Create the part file if there is none. Return False if the target is complete; the part file is then removed."""
    part = _part(target)
    old = _read_header(part) if part.exists() else None
    if target.exists():
        if old is not None and old == {MODEL: old.get(MODEL)} | header and _has_all(target, part, n_prompts):
            part.unlink()
            return False
        raise ValueError(f"{target} exists and is complete: delete it or name another --output")
    if part.exists():
        _check_header(part, old, header)
    header |= {MODEL: model()}
    if old is None:
        with files.replacing_file(part, _new(target)) as new:
            new.write_bytes(as_line(header))
    elif old[MODEL] != header[MODEL]:
        raise ValueError(
            f"{part} was started with other weights: the model's SHA-256 was {old[MODEL]} and is {header[MODEL]}. Run "
            "with the same weights to resume, or delete it to start again"
        )
    return True


def _has_all(target: Path, part: Path, n_prompts: int) -> bool:
    """Return whether the target is a copy of the part file's lines, and the part file has all lines."""
    with part.open("rb") as lines, target.open("rb") as copied:
        lines.readline()
        n_same = 0
        for line, copy in itertools.zip_longest(lines, copied):
            if line != copy:
                return False
            n_same += 1
    return n_same == n_prompts


def _resume(part: Path, n_prompts: int) -> int:
    """Cut an incomplete last line off the part file, and return how many prompts it has.

    Raises:
      ValueError: a line is not what was written there; nothing was changed.
    """
    with part.open("rb") as file:
        end = len(file.readline())
        n_done = 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                index = json.loads(line)[INDEX]
            except (ValueError, TypeError, KeyError):
                index = None
            if index != n_done or n_done == n_prompts:
                raise ValueError(f"{part}, line {n_done + 2} is not what was written there: delete it to start again")
            n_done, end = n_done + 1, end + len(line)
    os.truncate(part, end)
    return n_done


def _read_header(part: Path) -> dict[str, Any] | None:
    """Return the part file's first line, or None if this module did not write it."""
    with part.open("rb") as file:
        try:
            header = json.loads(file.readline())
        except ValueError:
            return None
    return header if isinstance(header, dict) and header.keys() | {MODEL} == HEADER else None


def _check_header(part: Path, old: dict[str, Any] | None, new: dict[str, Any]) -> None:
    """Check that a part file was started from the same input and settings.

    Raises:
      ValueError: it was not, or it is not a part file of this command; nothing was changed.
    """
    if old is None:
        raise ValueError(f"{part} exists and is not an unfinished output: move it away or name another --output")
    if MODEL not in old:
        raise ValueError(
            f"{part} was started by an earlier version, which did not record the weights: finish it with that version, "
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
            f"{part} was started from a different input or different settings: {'; '.join(changes)}. "
            "Run with the same ones to resume, or delete it to start again"
        )


def _finish(target: Path) -> None:
    """Make the target from a complete part file."""
    with files.replacing_file(target, _new(target)) as new, _part(target).open("rb") as lines, new.open("wb") as file:
        lines.readline()
        shutil.copyfileobj(lines, file, 2**20)
    _part(target).unlink()
