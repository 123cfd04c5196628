"""Completes the prompts of a file into another file, a batch at a time. After a kill, the next call resumes.

Unfinished work is in a part file, the target's name with ".part". Its first line identifies the input and the settings.
One line per prompt follows, in order. At the end, these lines are copied to a hidden file, which takes the target's
name in one step. Then the part file is removed. So at every moment there is nothing yet, or a part file that shows how
far the work is, or the complete target.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2_jax import files, progress
from gpt2_jax.checks import whole_number
from gpt2_jax.generation import part_files
from gpt2_jax.generation.part_files import MODEL
from gpt2_jax.generation.prompt_lines import INDEX, Check, Complete, Reader, completed, read_prompts
from gpt2_jax.processes import Share


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
    also: Callable[[dict[str, Any]], bool] | None = None,
    data: bytes | None = None,
    shown: bool | None = None,
    share: Share | None = None,
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
      also: returns whether an object without a "prompt" is a prompt too; None means that none is.
      data: the input's bytes, if `source` is only their name.
      shown: True shows a progress bar on standard error; None shows it if that is a terminal.
      share: this process's share, if several processes call this with the same arguments, and see the same files.
        The target is then the one that one process writes. `gpt2_jax.generation.jsonl_shares` has the details.

    Returns:
      The number of lines that this call wrote, together with the other processes if `share.index` is 0.

    Raises:
      FileNotFoundError: the input or the folder of the output does not exist.
      ValueError: raised before anything is generated or written: a line of the input is not a prompt, or the output
        exists, is the input, is being written by another process, or was started from a different input, settings or
        weights.
      PeerError: another process failed.
    """
    source, target = Path(source), Path(target).resolve()
    if data is None:
        _check_source(source, target)
    _check_target(target)
    data = source.read_bytes() if data is None else data
    prompts = read_prompts(data, Reader(source, fields, check, skip, also=also))
    n_together = whole_number("batch_size", batch_size() if callable(batch_size) else batch_size, 1)
    header, share = part_files.header_of(settings, data), share or Share()
    if share.count > 1 or part_files.parts_of_several(target):
        from gpt2_jax.generation.jsonl_shares import complete_share

        job = functools.partial(completed, complete=complete, results_in=fields)
        return complete_share(target, prompts, n_together, header, job, model, share, shown)
    with part_files.alone(target):
        if not _begin(target, header, len(prompts), model):
            return 0
        part = part_files.part(target)
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
    written = (target, part_files.part(target), part_files.unfinished(target))
    if source.resolve() in written or (target.exists() and target.samefile(source)):
        raise ValueError(f"{target} is the input: name another --output")


def _check_target(target: Path) -> None:
    if target.is_dir():
        raise ValueError(f"{target} is a folder: name a file in it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {target.parent}")


def _begin(target: Path, header: dict[str, Any], n_prompts: int, model: Callable[[], str | None]) -> bool:
    """Create the part file if there is none. Return False if the target is complete; the part file is then removed."""
    part = part_files.part(target)
    old = part_files.read_header(part) if part.exists() else None
    if target.exists():
        if old is not None and old == {MODEL: old.get(MODEL)} | header and _has_all(target, part, n_prompts):
            part.unlink()
            return False
        raise part_files.complete_already(target)
    if part.exists():
        part_files.check_header(part, old, header)
    header |= {MODEL: model()}
    if old is None:
        part_files.begin(part, part_files.unfinished(target), header)
    else:
        part_files.check_model(part, old[MODEL], header[MODEL])
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
                raise part_files.not_written(part, n_done + 2)
            n_done, end = n_done + 1, end + len(line)
    os.truncate(part, end)
    return n_done


def _finish(target: Path) -> None:
    """Make the target from a complete part file."""
    part, unfinished = part_files.part(target), part_files.unfinished(target)
    with files.replacing_file(target, unfinished) as new, part.open("rb") as lines, new.open("wb") as file:
        lines.readline()
        shutil.copyfileobj(lines, file, 2**20)
    part.unlink()
