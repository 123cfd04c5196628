"""The checkpoints of a run: saved during training, and restored bit for bit on any devices."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp

from gpt2_jax import processes
from gpt2_jax.checkpoints import bases, parts, runs
from gpt2_jax.checkpoints.integrity import DamagedError
from gpt2_jax.checkpoints.loading import open_leaves
from gpt2_jax.files import expanded, put_in_place
from gpt2_jax.params import differences
from gpt2_jax.training.step import copied

State = TypeVar("State")
HIDDEN = re.compile(r"\.[0-9]+\.(saving|deleted)(\.orbax-checkpoint-tmp)?")
SHOWN = 3  # differences listed in a message
_saves = itertools.count()  # the saves of this process; the n-th has the same number in all processes of a run


class Checkpoints:
    """The checkpoints `RUN/checkpoints/<step>` of a training run.

    To list or restore checkpoints, create an instance. To save, open it; only one process at a time can do that::

        with Checkpoints(run_dir) as checkpoints:
            state = checkpoints.restore(abstract_state)
            checkpoints.save(step, state)

    A checkpoint is written under a hidden name, and renamed when it is complete. Older checkpoints are removed after
    that. A process that is killed at any moment leaves the newest complete checkpoint. Its unfinished files are removed
    when the run is next opened. If several processes train one run (a cluster), all of them call every method.

    Attributes:
      base: the frozen params of LoRA, which checkpoints name and do not hold; None if they hold all params. `restore`
        sets it to that of the checkpoint.
      source: where the model is that has them, if run.json does not say it yet; "" otherwise.
    """

    def __init__(self, run_dir: str | os.PathLike, keep: int = 1):
        """Store the settings; nothing is read or written yet.

        Args:
          run_dir: the run's folder.
          keep: how many of the newest checkpoints to keep when a new one is saved.

        Raises:
          ValueError: keep is not positive.
        """
        if keep < 1:
            raise ValueError(f"keep must be 1 checkpoint or more, not {keep!r}")
        self.run_dir = expanded(run_dir).resolve()
        self.directory = self.run_dir / runs.CHECKPOINTS
        self.keep = keep
        self.base: bases.Base | None = None
        self.source = ""
        self._resources: contextlib.ExitStack | None = None
        self._saving: tuple[int, str, concurrent.futures.Future] | None = None
        self._is_lost = False  # whether another process has failed in a save, and a thread still waits for it here

    def __enter__(self) -> Self:
        """Open the run for saving.

        Raises:
          OSError: the folder cannot be created, or another process has the run open.
        """
        with contextlib.ExitStack() as resources:

            def open_folder() -> None:
                resources.enter_context(runs.locked(self.run_dir))
                runs.clear_leftovers(self.run_dir)
                self._clear()

            processes.on_first(open_folder)
            self._thread = concurrent.futures.ThreadPoolExecutor(1)
            resources.callback(lambda: self._thread.shutdown(wait=not self._is_lost))
            self._resources = resources.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Close. If the block raised an error, an error of the last save becomes a note on it."""
        try:
            self._close(together=error is None)  # after an error, the other processes may not call `close`
        except Exception as failed:
            if error is None:
                raise
            error.add_note(f"Also: {failed}")

    def close(self) -> None:
        """Wait for the last save, then let other processes open the run.

        Raises:
          OSError: the last save failed.
        """
        self._close(together=True)

    def _close(self, together: bool) -> None:
        try:
            self._wait(together)
        finally:
            if self._resources is not None:
                self._resources.close()
                self._resources = None

    def save(self, step: int, state: Any, wait: bool = False) -> None:
        """Save a state. If the previous save is still being written, wait for it first.

        Args:
          step: the number of optimizer steps done. A checkpoint of the same step is replaced. Checkpoints of later
            steps are kept; they exist if the run went back to an older checkpoint.
          state: a flax.struct.dataclass of jax arrays. You may donate it as soon as this returns, because the data is
            then on the host. (CPU arrays are not copied: donating them has no effect until they are written.)
          wait: return only when the checkpoint is complete.

        Raises:
          ValueError: the checkpoints are not open.
          OSError: this save or the previous one failed, or a folder of that name is not a checkpoint. Most data is
            written in the background: the next `save`, `wait` or `close` raises an error that happens there.
        """
        if self._resources is None:
            raise ValueError("the checkpoints are not open: save inside `with Checkpoints(run_dir) as checkpoints:`")
        self.wait()
        path = self.directory / str(step)

        def check_folder() -> None:
            if path.exists() and not (path / parts.MANIFEST).is_file():
                raise FileExistsError(f"{path} is not a checkpoint of this package: move it elsewhere")
            with self._clear_errors(step):
                self._clear()

        processes.on_first(check_folder)
        with self._clear_errors(step):
            kept = _without(_in_parts(state, jnp.asarray), self.base)
            finish = parts.start_writing(self._hidden(step, "saving"), step, kept, base=self.base)
        name = f"save/{next(_saves)}"
        self._saving = step, name, self._thread.submit(self._complete_or_tell, name, step, finish)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is complete.

        Raises:
          OSError: that save failed.
        """
        self._wait(together=True)

    def _wait(self, together: bool) -> None:
        """Wait until the last save is complete; `together` also waits until process 0 has completed it."""
        if self._saving is None:
            return
        step, name, saving = self._saving

        def result() -> None:
            with self._clear_errors(step):
                saving.result()

        def result_of_all() -> None:
            with self._clear_errors(step):
                _wait_unless_told(saving, name)
            result()

        if together and processes.count() > 1:
            self._saving, self._is_lost = None, True  # of an error elsewhere: Orbax would wait for many minutes
            processes.on_first(result_of_all)
            self._is_lost = False
        else:
            concurrent.futures.wait([saving])  # after an interrupt here, the save can still be waited for
            self._saving = None
        result()

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, in order; damaged checkpoints are included."""
        return processes.on_first(lambda: runs.steps(self.run_dir))

    def latest(self) -> int | None:
        """Return the newest step that has a checkpoint; None if there is none."""
        return max(self.steps(), default=None)

    def restore(self, abstract_state: State, step: int | None = None, check: bool = True) -> State:
        """Read a checkpoint. It may have been saved on other devices.

        Args:
          abstract_state: the state as jax.ShapeDtypeStruct; the shardings say where the arrays go.
          step: the step of the checkpoint; None is the newest.
          check: compare its files with their sha256. Leave this out only after `newest_whole`, which has done it.

        Returns:
          The state, with the same container types as `abstract_state`.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          ValueError: the checkpoint is from another model or optimizer; the message says what differs.
          DamagedError: a file is missing or was changed; the message lists the older checkpoints.
          OSError: a file cannot be read.
        """
        there = self.steps()
        step = max(there, default=None) if step is None else step
        if step not in there:
            of = "" if step is None else f" of step {step}"
            listed = f"steps {', '.join(map(str, there))}" if there else "none"
            raise FileNotFoundError(f"{self.directory} has no checkpoint{of}; available: {listed}")
        wanted = _in_parts(abstract_state)
        path = self.directory / str(step)

        def base_of() -> bases.Base | None:
            if check:
                self._check(step, wanted)
            return parts.read_manifest(path).get("base")

        self.base = processes.on_first(base_of)
        found = parts.read(path, _without(wanted, self.base))
        if self.base is not None:
            for name, leaf in bases.read(self.base, self.run_dir, open_leaves, self.source):
                to = wanted[runs.PARAMS][name]
                sharding = to.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
                found[runs.PARAMS][name] = copied(leaf, to.dtype, sharding)
                del leaf  # before the next one is read
        return _from_parts(abstract_state, found)

    def newest_whole(self, abstract_state: Any) -> tuple[int | None, str]:
        """Find the newest checkpoint whose files are what was written. Damaged ones that are newer are renamed.

        A damaged checkpoint `7` becomes `7.damaged`, so that neither a later start nor `load` takes it.

        Args:
          abstract_state: as in `restore`.

        Returns:
          The step, None if there is no checkpoint; and a sentence about the damaged ones, "" if there are none.

        Raises:
          ValueError: the checkpoint is from another model or optimizer; the message says what differs.
          DamagedError: all checkpoints are damaged. Nothing is renamed.
        """
        wanted = _in_parts(abstract_state)

        def find() -> tuple[int | None, str]:
            damaged: dict[int, DamagedError] = {}
            for step in reversed(runs.steps(self.run_dir)):
                try:
                    self._check(step, wanted)
                except DamagedError as error:
                    damaged[step] = error
                    continue
                return step, self._set_aside(damaged, step)
            if damaged:
                raise damaged[max(damaged)]
            return None, ""

        step, sentence = processes.on_first(find)
        return step, sentence

    def _check(self, step: int, wanted: Mapping[str, Mapping[str, Any]]) -> None:
        """Check that a checkpoint is whole, and fits."""
        path = self.directory / str(step)
        try:
            manifest = parts.read_manifest(path)
            _check_fits(path, manifest, wanted)
            parts.check_files(path, manifest, list(wanted))
        except DamagedError as error:
            older = [other for other in runs.steps(self.run_dir) if other < step]
            listed = f"older checkpoints: steps {', '.join(map(str, older))}" if older else "no older checkpoint"
            raise DamagedError(f"{error}; {listed}") from error

    def _set_aside(self, damaged: Mapping[int, DamagedError], whole: int) -> str:
        """Rename damaged checkpoints, and return a sentence about them."""
        if not damaged:
            return ""
        for step in damaged:
            path = self.directory / str(step)
            names = (path.with_name(f"{step}.damaged{f'-{n}' * (n > 1)}") for n in itertools.count(1))
            path.rename(next(name for name in names if not name.exists()))
        first = str(damaged[max(damaged)]).rpartition("; ")[0]
        return f"{first}; it is kept as {max(damaged)}.damaged, and the run resumes after step {whole:,}"

    def _complete_or_tell(self, name: str, step: int, finish: Any) -> None:
        """Complete a save. If it fails in this process, tell process 0 under a name."""
        try:
            self._complete(step, finish)
        except Exception as error:
            if (link := processes.share().link) is not None:
                with contextlib.suppress(Exception):  # there is nobody left to tell
                    link.put(name, f"{getattr(error, 'strerror', None) or error} (in process {jax.process_index()})")
            raise

    def _complete(self, step: int, finish: Any) -> None:
        """Wait until everything is written, give it its final name, and remove the checkpoints that it replaces."""
        written, path = self._hidden(step, "saving"), self.directory / str(step)
        finish()
        if jax.process_index() != 0:
            return
        replaced = path.exists()
        put_in_place(written, path)
        if replaced:
            shutil.rmtree(written)
        ours = [
            old
            for old in runs.steps(self.run_dir)
            if old <= step and (self.directory / str(old) / parts.MANIFEST).is_file()
        ]
        for old in ours[: -self.keep]:
            deleted = self._hidden(old, "deleted")
            (self.directory / str(old)).rename(deleted)  # other processes see the whole checkpoint or none
            shutil.rmtree(deleted)

    def _clear(self) -> None:
        """Remove the unfinished files of killed processes and failed saves."""
        if jax.process_index() == 0:
            for path in self.directory.iterdir():
                if HIDDEN.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)

    def _hidden(self, step: int, why: str) -> Path:
        return self.directory / f".{step}.{why}"

    @contextlib.contextmanager
    def _clear_errors(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            clear = OSError(f"the checkpoint of step {step} could not be saved in {self.directory}: {reason}")
            clear.errno = error.errno
            raise clear from error


def _wait_unless_told(saving: concurrent.futures.Future, name: str) -> None:
    """Wait for the end of a save in this process.

    Raises:
      OSError: the save has failed in another process, which has told it under a name.
    """
    link = processes.share().link
    while link is not None and not concurrent.futures.wait([saving], processes.PATIENCE).done:
        if (reason := link.get(name, 0)) is not None and not saving.done():
            raise OSError(reason)


def _in_parts(state: Any, convert: Any = lambda leaf: leaf) -> dict[str, dict[str, Any]]:
    """Return the leaves of a state as {part that stores them: {name in that part: leaf}}."""
    found: dict[str, dict[str, Any]] = {runs.PARAMS: {}, runs.LORA: {}, runs.TRAINER: {}}
    for part, name, leaf in _named(state):
        found[part][name] = convert(leaf)
    return found


def _without(found: Mapping[str, Mapping[str, Any]], base: bases.Base | None) -> dict[str, dict[str, Any]]:
    """Return the parts without the params of a base."""
    names = () if base is None else base["leaves"]
    params = {name: leaf for name, leaf in found[runs.PARAMS].items() if name not in names}
    return {**{part: dict(flat) for part, flat in found.items()}, runs.PARAMS: params}


def _from_parts(abstract_state: State, found: Mapping[str, Mapping[str, Any]]) -> State:
    leaves = [found[part][name] for part, name, _ in _named(abstract_state)]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)


def _named(state: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield each leaf of a state with its part and its name in that part."""
    if not dataclasses.is_dataclass(state):
        raise ValueError(f"a state must be a dataclass with params, not {type(state).__name__}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        part, _, name = jax.tree_util.keystr(path, simple=True, separator="/").partition("/")
        if part in (runs.PARAMS, runs.LORA):
            yield part, name, leaf
        else:
            yield runs.TRAINER, f"{part}/{name}" if name else part, leaf


def _check_fits(path: Path, manifest: Mapping[str, Any], wanted: Mapping[str, Mapping[str, Any]]) -> None:
    for part, what in {runs.PARAMS: "model", runs.LORA: "LoRA", runs.TRAINER: "optimizer"}.items():
        stored = parts.abstract_part(manifest, part)
        stored |= bases.abstract(manifest.get("base")) if part == runs.PARAMS else {}
        if not differences(stored, wanted[part]):
            continue
        if part == runs.LORA and not (stored and wanted[part]):
            raise ValueError(f"lora.rank does not fit {path}, which was trained {'with' if stored else 'without'} LoRA")
        lines = differences(stored, wanted[part])
        more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        raise ValueError(f"the {what} of {path} does not match this run: {'; '.join(lines[:SHOWN])}{more}")
