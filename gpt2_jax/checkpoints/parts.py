"""The checkpoints of a training run: parts written by Orbax, and checkpoint.json with the sha256 of every file.

    20/checkpoint.json       {"gpt2_jax_checkpoint": 1, "step": 20, "leaves": {part: {name: [dtype, shape]}},
                              "files": {name: sha256}, "digest": sha256 of all that}; with LoRA also "base"
    20/params/, 20/trainer/  the parts; each can be read without the others

Orbax's v1 interface is used, with these workarounds (Orbax 0.12.8):
 - By default, Orbax packs arrays into a database. If the path contains a `[`, the database is saved without an error
   but cannot be read. Plain files, one for each shard of an array, do not have this fault, and are written two to four
   times faster. Orbax then warns that there is no database to merge. This warning is dropped.
 - Orbax does not detect damage, and missing files make it leave threads with errors. So the files are compared with
   their sha256, and the names and shapes with the expected ones, before Orbax opens anything.
 - Without shapes and shardings, Orbax warns and returns NamedTuples as dicts. So parts are flat dicts of arrays by
   name, and the caller's tree gives the types.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax import processes
from gpt2_jax.checkpoints.integrity import DamagedError, one_line, sealed, unsealed
from gpt2_jax.files import hash_files
from gpt2_jax.params import flatten, unflatten

MANIFEST, VERSION = "checkpoint.json", 1
QUIET = 1  # seconds without a report after which the threads of a failed call are taken to have ended

Parts = Mapping[str, Mapping[str, Any]]
"""{"params": {"h0/attn/c_attn/w": array}, ...}: the arrays (or jax.ShapeDtypeStruct) of each part by flat name."""


def start_writing(path: Path, step: int, parts: Parts, **more: Any) -> Callable[[], None]:
    """Copy the arrays and start to write them.

    Args:
      path: the absolute path of the new folder. Nothing may have this name yet. Until everything is written, Orbax uses
        a second name in the same folder (`leftovers` returns both).
      step: the step of the checkpoint.
      parts: jax arrays. They may be donated or deleted as soon as this function returns.
      more: written into checkpoint.json too, without values that are None.

    Returns:
      finish(), which waits until everything is written and then writes checkpoint.json. Call it once, in any thread.

    Raises:
      OSError: the checkpoint cannot be written. This function or `finish` raises it.
    """
    from orbax.checkpoint import v1 as ocp

    leaves = {part: {name: _describe(leaf) for name, leaf in flat.items()} for part, flat in parts.items()}
    trees = {part: unflatten(flat) for part, flat in parts.items() if flat}

    def probe() -> None:  # fail here, because Orbax would leave coroutines behind
        for folder in leftovers(path):
            folder.mkdir()
            folder.rmdir()

    processes.on_first(probe)
    with contextlib.ExitStack() as stack, plain_files(), clear_errors(saving=True):
        stack.enter_context(_without_noise())
        response = ocp.save_checkpointables_async(str(path), trees)
        quiet = stack.pop_all()  # until all is written: Orbax's threads log at any time

    def finish() -> None:
        with quiet, clear_errors(saving=True):
            response.result()
        if jax.process_index() == 0:
            manifest = {"gpt2_jax_checkpoint": VERSION, "step": step, "leaves": leaves, "files": hash_files(path)}
            manifest |= {name: value for name, value in more.items() if value is not None}
            (path / MANIFEST).write_text(sealed(manifest), encoding="utf-8")

    return finish


def leftovers(path: Path) -> tuple[Path, Path]:
    """Return the two folders that an incomplete checkpoint can leave."""
    return path, path.with_name(path.name + ".orbax-checkpoint-tmp")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a checkpoint's checkpoint.json.

    Raises:
      DamagedError: the file is missing, or not what was written.
    """
    try:
        manifest = unsealed((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("gpt2_jax_checkpoint") != VERSION:
            raise ValueError("its version is not supported")
        return manifest
    except FileNotFoundError as error:
        raise DamagedError(f"{path} is damaged: its {MANIFEST} is missing") from error
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: its {MANIFEST} is not what was written ({one_line(error)})") from error


def check_files(path: Path, manifest: Mapping[str, Any], parts: Sequence[str]) -> None:
    """Compare the files of some parts, and those outside all parts, with their sha256. 1.5 GB take about 1 s.

    Raises:
      DamagedError: a file is missing or differs. The message names it.
    """
    wanted = {name for name in manifest["files"] if "/" not in name or name.split("/")[0] in parts}
    found = hash_files(path, wanted)
    if wrong := sorted(name for name in wanted if found.get(name) != manifest["files"][name]):
        more = f" and {len(wrong) - 1} more files are" if len(wrong) > 1 else " is"
        raise DamagedError(f"{path} is damaged: {wrong[0]}{more} not what was written, or missing")


def read(path: Path, abstract: Parts) -> dict[str, dict[str, Any]]:
    """Read parts whose files have been checked.

    Args:
      path: the absolute path of the checkpoint.
      abstract: what to read, with exactly the names, shapes and dtypes that checkpoint.json lists for a part. Leaves
        are jax.ShapeDtypeStruct, whose sharding says where the array goes (None: the default device). It may differ
        from the sharding at the time of saving. Pass empty NumPy arrays instead to read onto the host.

    Raises:
      OSError: a part cannot be read.
    """
    from orbax.checkpoint import v1 as ocp

    trees = {part: unflatten(jax.tree.map(_placed, dict(flat))) for part, flat in abstract.items() if flat}
    try:
        read = ocp.load_checkpointables(str(path), trees)
    except MemoryError:
        raise
    except Exception as error:  # Orbax wraps errors of any type
        raise OSError(f"{path} cannot be read, Orbax says: {one_line(error.__cause__ or error)}") from error
    return {part: flatten(read[part]) if part in read else {} for part in abstract}


def abstract_part(manifest: Mapping[str, Any], part: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of a part from checkpoint.json. A part that is not there gives an empty dict."""
    listed = manifest["leaves"].get(part, {})
    return {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for name, (dtype, shape) in listed.items()}


def _placed(leaf: jax.ShapeDtypeStruct | np.ndarray) -> jax.ShapeDtypeStruct | np.ndarray:
    if isinstance(leaf, np.ndarray) or leaf.sharding is not None:
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def _describe(leaf: jax.Array) -> tuple[str, tuple[int, ...]]:
    return leaf.dtype.name, leaf.shape


@contextlib.contextmanager
def plain_files() -> Iterator[None]:
    """Make Orbax write plain files inside the block. The setting holds for everything that Orbax does in the block."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_compression = False  # it makes weights a tenth smaller, but is slower than the disk
    context.asynchronous.create_directories_asynchronously = False  # otherwise errors appear only after minutes
    with context:
        yield


@contextlib.contextmanager
def clear_errors(saving: bool = False) -> Iterator[None]:
    """Turn errors into an OSError of one sentence, and drop the traces that Orbax leaves for the same errors.

    Args:
      saving: the block writes. After an error, wait until the threads that still write have ended, 1 s or more.
    """

    # Permanently, because a task is collected some time after its error.
    logging.getLogger("asyncio").addFilter(_is_not_of_orbax)
    try:
        with _without_noise(), _late_errors.dropped(wait=saving):
            yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a full disk gives different types of errors
        if code := re.search("os_error_code='([0-9]+)'", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
        raise OSError(f"Orbax says: {one_line(error)}") from error


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """Drop the warnings of Orbax that say nothing about a model."""

    def is_news(record: logging.LogRecord) -> bool:
        known = (
            "Skipping merge of OCDBT checkpoints",
            "_SignalingThread.run() raised an exception",
            "Metadata file does not exist",  # of a folder that holds one of several items
            "Failed to read Metadata file",  # the error that follows says it
            "Failed to json parse Metadata file",  # of a tree, which is read without it
            "Provided metadata contains unknown key",
            "Failed to get item metadata",
        )
        return not any(text in str(record.msg) for text in known)

    logger = logging.getLogger("absl")
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """Say whether a log record of asyncio is not about a task or future of Orbax that another error stopped."""
    text = str(record.msg)
    if not re.match(r"\w+ exception was never retrieved", text):
        return True
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    frames = [] if error is None else traceback.walk_tb(error.__traceback__)
    return not re.search("orbax|tensorstore", " ".join([text, *(frame.f_code.co_filename for frame, _ in frames)]))


class _LateErrors:
    """Drops what the threads of a failed call report: to an event loop that is closed, a traceback each in Python.

    Blocks of several threads may overlap. The hook is removed when the last block ends. A failed block that does not
    wait leaves the hook: until nothing was reported for a while, it drops such reports; a later block removes it.
    """

    def __init__(self) -> None:
        self.lock, self.n_blocks, self.until = threading.Lock(), 0, 0.0
        self.hook: Any = None
        self.replaced: Any = None

    @contextlib.contextmanager
    def dropped(self, wait: bool) -> Iterator[None]:
        """Drop the reports in the block and, after an error, those that follow. `wait` returns only after them."""
        self._count(1)
        try:
            yield
        except Exception:
            now = time.monotonic()
            self.until, end = now + QUIET, now + 10 * QUIET
            while wait and time.monotonic() < min(self.until, end):
                time.sleep(QUIET / 20)
            raise
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self.lock:
            self.n_blocks += change
            installed = sys.unraisablehook is self.hook
            if self.n_blocks and not installed:
                self.replaced = sys.unraisablehook
                self.hook = sys.unraisablehook = functools.partial(self._drop, self.replaced)
            elif installed and not self.n_blocks and time.monotonic() >= self.until:
                sys.unraisablehook = self.replaced

    def _drop(self, replaced: Callable[[Any], None], unraisable: Any) -> None:
        late = time.monotonic() < self.until
        if not (late or self.n_blocks) or str(unraisable.exc_value) != "Event loop is closed":
            replaced(unraisable)
        elif late:
            self.until = time.monotonic() + QUIET


_late_errors = _LateErrors()
