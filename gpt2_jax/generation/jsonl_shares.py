"""Completes the prompts of a file in several processes. After a kill of some or all of them, the next call resumes.

The prompts are divided into the batches of one process, and batch k belongs to process k modulo their number. Each
process adds finished batches to its own part file. When all lines are there, process 0 writes them in order to the
target, and removes the part files. The other processes wait for that. So the result of a process says whether the whole
is done, and a process that dies takes only its unfinished batch with it.

Nothing but the files is shared, so processes need no connection. If nothing connects them, a process that has died can
be started again alone. The part files of another number of processes are used too.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax import files, progress
from gpt2_jax.generation import part_files
from gpt2_jax.generation.part_files import MODEL
from gpt2_jax.generation.prompt_lines import INDEX, Prompt
from gpt2_jax.processes import Share

WAIT = 0.5  # seconds between two looks at the files of the others


def complete_share(
    target: Path,
    prompts: Sequence[Prompt],
    n_together: int,
    header: dict[str, Any],
    completed: Callable[[Sequence[Prompt], int], bytes],
    model: Callable[[], str | None],
    share: Share,
    shown: bool | None,
) -> int:
    """Complete this process's share, and wait for the target.

    Args:
      target: the output.
      prompts: all prompts.
      n_together: prompts of a batch.
      header: identifies the input and the settings.
      completed: takes a batch and the index of its first prompt, and returns its output lines.
      model: returns the fingerprint of the model.
      share: this process's share.
      shown: whether process 0 shows a progress bar of the whole; None shows it if standard error is a terminal.

    Returns:
      The number of lines that this call wrote, together with the other processes in process 0.

    Raises:
      ValueError: as `gpt2_jax.generation.jsonl.complete_file`.
      PeerError: another process failed.
    """
    own = part_files.part(target, share.index, share.count)
    with share.telling(), part_files.alone(target, share.index, share.count):
        lines = _Lines(target, len(prompts), header)
        if _is_complete(lines, share):
            if share.index == 0:
                lines.remove()
            return 0
        lines.check_model(model())
        if target.exists():  # the others finished it meanwhile
            return 0
        if own in lines.ends:
            os.truncate(own, lines.ends[own])  # without an incomplete last line
        else:
            part_files.begin(own, part_files.unfinished(own), lines.header)
        firsts = share.of(range(0, len(prompts), n_together))
        firsts = [first for first in firsts if not lines.have(first, n_together)]
        n_before, title = lines.n_done, f"writing {target.name}"
        shown = shown if share.index == 0 else False
        with progress.bars("count", "left", shown=shown, stay=True, period=3600) as bars:
            bars.update(title, n_before, len(prompts))
            n_written = 0
            with own.open("ab") as file:
                for first in firsts:
                    share.check()
                    batch = prompts[first : first + n_together]
                    file.write(completed(batch, first))
                    file.flush()
                    n_written += len(batch)
                    if share.index == 0:
                        bars.update(title, lines.read(), len(prompts))
            _wait(lines, own, n_together, share, lambda: bars.update(title, lines.n_done, len(prompts)))
        if share.index:
            return n_written
        lines.write_target()
        lines.remove()
        return len(prompts) - n_before


def _is_complete(lines: _Lines, share: Share) -> bool:
    """Read all part files, and return whether the target is complete. All processes return the same if connected.

    Raises:
      ValueError: a part file or the target does not belong to this work.
    """

    def found() -> bool:
        lines.read()
        if not lines.target.exists():
            return False
        if not lines.are_in_target():
            raise part_files.complete_already(lines.target)
        return True

    return any(share.gather(found) if share.link is not None else [found()])


def _wait(lines: _Lines, own: Path, n_together: int, share: Share, update: Callable[[], None]) -> None:
    """Wait for the lines of all processes, or in a process other than the first, for the target."""
    said = share.link is not None
    while lines.n_done < len(lines.offsets) if share.index == 0 else own.exists() and not lines.target.exists():
        if share.index == 0 and not said:
            missing = np.flatnonzero(lines.offsets < 0) // n_together % share.count
            others = ", ".join(map(str, np.unique(missing)))
            print(f"waiting for processes with index {others}: start again those that have ended", file=sys.stderr)
            said = True
        share.check()
        time.sleep(WAIT)
        if share.index == 0:
            lines.read()
            update()


class _Lines:
    """The finished lines in all part files of a target.

    Attributes:
      target: the output.
      header: the first line of each part file; without the model until `check_model`.
      ends: {part file: how many of its bytes were read}. The rest is an incomplete line, or new.
      offsets: for each prompt, where its line begins in its part file; -1 if it is not finished.
      n_done: number of prompts with a line.
    """

    def __init__(self, target: Path, n_prompts: int, header: dict[str, Any]):
        self.target, self.header, self.n_done = target, header, 0
        self.ends: dict[Path, int] = {}
        self.offsets, self._files = np.full(n_prompts, -1), np.zeros(n_prompts, np.int32)
        self._models: dict[Path, str | None] = {}

    def read(self) -> int:
        """Read what is new, and return how many prompts are done.

        Raises:
          ValueError: a part file was started from another input, settings or weights, or has a wrong line.
        """
        alone = part_files.part(self.target)
        for path in [alone] * alone.exists() + part_files.parts_of_several(self.target):
            if path not in self.ends:
                self._begin(path)
            self._read(path, list(self.ends).index(path))
        return self.n_done

    def _begin(self, path: Path) -> None:
        header = part_files.read_header(path)
        part_files.check_header(path, header, self.header)
        assert header is not None  # checked
        if MODEL in self.header:
            part_files.check_model(path, header[MODEL], self.header[MODEL])
        self._models[path] = header[MODEL]
        with path.open("rb") as file:
            self.ends[path] = len(file.readline())

    def _read(self, path: Path, number: int) -> None:
        with path.open("rb") as file:
            file.seek(self.ends[path])
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    index = json.loads(line)[INDEX]
                except (ValueError, TypeError, KeyError):
                    index = None
                if not isinstance(index, int) or not 0 <= index < len(self.offsets):
                    raise part_files.not_written(path, self._line_number(path))
                self.n_done += int(self.offsets[index] < 0)
                self.offsets[index], self._files[index] = self.ends[path], number
                self.ends[path] += len(line)

    def _line_number(self, path: Path) -> int:
        """Return the number of the line after those that were read, from 1."""
        with path.open("rb") as file:
            return file.read(self.ends[path]).count(b"\n") + 1

    def check_model(self, model: str | None) -> None:
        """Set the model of this work, and check that all part files were started with it.

        Raises:
          ValueError: one was not.
        """
        self.header = self.header | {MODEL: model}
        for path, old in self._models.items():
            part_files.check_model(path, old, model)

    def have(self, first: int, n: int) -> bool:
        """Return whether the `n` prompts from `first` on, as far as they exist, are done."""
        return bool((self.offsets[first : first + n] >= 0).all())

    def are_in_target(self) -> bool:
        """Return whether the target has a line for each prompt, and the lines of the part files are among them."""
        n = len(self.offsets)
        if not self.ends or len(set(self._models.values())) > 1:
            return False
        with self.target.open("rb") as file, contextlib.ExitStack() as stack:
            opened = [stack.enter_context(path.open("rb")) for path in self.ends]
            for i in range(n):
                line = file.readline()
                if not line or (self.offsets[i] >= 0 and line != self._line(opened, i)):
                    return False
            return not file.read(1)

    def write_target(self) -> None:
        """Write all lines in order to the target."""
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(path.open("rb")) for path in self.ends]
            unfinished = part_files.unfinished(self.target)
            with files.replacing_file(self.target, unfinished) as new, new.open("wb") as file:
                for i in range(len(self.offsets)):
                    file.write(self._line(opened, i))

    def _line(self, opened: Sequence[Any], i: int) -> bytes:
        opened[self._files[i]].seek(self.offsets[i])
        return opened[self._files[i]].readline()

    def remove(self) -> None:
        """Remove the part files, and the locks of the other processes."""
        # That of one process first: without the others it would be taken for the work of one process alone.
        part_files.part(self.target).unlink(missing_ok=True)
        for path in [
            *part_files.parts_of_several(self.target),
            *self.target.parent.glob(f".{glob.escape(self.target.name)}.*[0-9]-of-*[0-9].lock"),
        ]:
            path.unlink(missing_ok=True)
