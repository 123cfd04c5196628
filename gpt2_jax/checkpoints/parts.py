"""A checkpoint in parts: trees of arrays as Orbax writes them, beside checkpoint.json with the sha256 of every file.

    20/checkpoint.json       {"gpt2_jax_checkpoint": 1, "step": 20, "leaves": {part: {name: [dtype, shape]}},
                              "files": {name: sha256}, "digest": sha256 of all that}
    20/params/, 20/trainer/  the parts; one can be read without the others

Orbax's v1 interface is used, and helped where it does not hold up (0.12.8):
 - It packs arrays into a database by default, and finds none of its parts where the path holds a `[`: what it then
   calls saved cannot be read. Plain files, one for each shard of an array, have no such fault, and are written two to
   four times faster. It warns of a database that was not asked for; that warning alone is dropped.
 - It finds no damage, and stumbling over missing files it leaves threads with errors behind: so files are compared
   with their sha256, and names and shapes with what is wanted, before it opens anything.
 - Restored without shapes and shardings it warns, and NamedTuples come back as dicts: names map to arrays here, and the
   caller's own tree gives the types.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.checkpoints.integrity import DamagedError, one_line, sealed, unsealed
from gpt2_jax.files import hash_files
from gpt2_jax.params import flatten, unflatten

MANIFEST, VERSION = "checkpoint.json", 1

Parts = Mapping[str, Mapping[str, Any]]
"""{"params": {"h0/attn/c_attn/w": array}, ...}: the arrays of each part, or jax.ShapeDtypeStruct, by flat name."""


def start_writing(path: Path, step: int, parts: Parts) -> Callable[[], None]:
    """Copy the arrays and begin to write them.

    Args:
      path: absolute; a folder of a name that nothing has yet. Until all is written Orbax uses another name beside it,
        `leftovers` of the two.
      step: that it is of.
      parts: of jax arrays, which may be donated or deleted as soon as this returns.

    Returns:
      finish(): waits until all is written, and then writes checkpoint.json. It must be called, in any thread.

    Raises:
      OSError: it cannot be written (found now, or in `finish`).
    """
    from orbax.checkpoint import v1 as ocp

    leaves = {part: {name: _describe(leaf) for name, leaf in flat.items()} for part, flat in parts.items()}
    trees = {part: unflatten(flat) for part, flat in parts.items() if flat}
    for probe in leftovers(path):  # failing here, as Orbax would leave coroutines behind
        probe.mkdir()
        probe.rmdir()
    with plain_files(), told():
        response = ocp.save_checkpointables_async(str(path), trees)

    def finish() -> None:
        with told():
            response.result()
        if jax.process_index() == 0:
            manifest = {"gpt2_jax_checkpoint": VERSION, "step": step, "leaves": leaves, "files": hash_files(path)}
            (path / MANIFEST).write_text(sealed(manifest), encoding="utf-8")

    return finish


def leftovers(path: Path) -> tuple[Path, Path]:
    """Return the two folders that there may be of a checkpoint that was not written to its end."""
    return path, path.with_name(path.name + ".orbax-checkpoint-tmp")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a checkpoint's checkpoint.json.

    Raises:
      DamagedError: it is absent, or not what was written.
    """
    try:
        manifest = unsealed((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("gpt2_jax_checkpoint") != VERSION:
            raise ValueError("it has another version")
        return manifest
    except FileNotFoundError as error:
        raise DamagedError(f"{path} is damaged: its {MANIFEST} is missing") from error
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: its {MANIFEST} is not what was written ({one_line(error)})") from error


def check_files(path: Path, manifest: Mapping[str, Any], parts: Sequence[str]) -> None:
    """Compare the files of some parts, and those of none, with their sha256: 1.5 GB take about a second.

    Raises:
      DamagedError: one is missing or another; the message names it.
    """
    wanted = {name for name in manifest["files"] if "/" not in name or name.split("/")[0] in parts}
    found = hash_files(path, wanted)
    if wrong := sorted(name for name in wanted if found.get(name) != manifest["files"][name]):
        more = f" and {len(wrong) - 1} more files are" if len(wrong) > 1 else " is"
        raise DamagedError(f"{path} is damaged: {wrong[0]}{more} not what was written, or missing")


def read(path: Path, abstract: Parts) -> dict[str, dict[str, Any]]:
    """Read parts whose files have been checked.

    Args:
      path: absolute.
      abstract: what to read, of exactly the names, shapes and dtypes that checkpoint.json lists for a part:
        jax.ShapeDtypeStruct, whose sharding (None: the default device) says where the array goes; it need not be the
        one that it was saved from. Or empty NumPy arrays, to read onto the host.

    Raises:
      OSError: it cannot be read.
    """
    from orbax.checkpoint import v1 as ocp

    trees = {part: unflatten(jax.tree.map(_placed, dict(flat))) for part, flat in abstract.items() if flat}
    try:
        read = ocp.load_checkpointables(str(path), trees)
    except MemoryError:
        raise
    except Exception as error:  # Orbax wraps whatever it met
        raise OSError(f"{path} cannot be read, Orbax says: {one_line(error.__cause__ or error)}") from error
    return {part: flatten(read[part]) if part in read else {} for part in abstract}


def abstract_part(manifest: Mapping[str, Any], part: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of a part as checkpoint.json lists them; of none if there is no such part."""
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
    """Let Orbax write plain files: in a block of their own, as Orbax is set for the whole block."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_compression = False  # of weights it saves a tenth, and takes longer than the disk
    context.asynchronous.create_directories_asynchronously = False  # else their errors come after minutes
    with context:
        yield


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Raise what goes wrong as OSError of one sentence, without the traces that Orbax logs of the same errors."""

    def is_news(record: logging.LogRecord) -> bool:
        known = ("Skipping merge of OCDBT checkpoints", "_SignalingThread.run() raised an exception")
        return not any(text in str(record.msg) for text in known)

    logger = logging.getLogger("absl")
    logger.addFilter(is_news)
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a full disk is whatever the library that met it makes of it
        if code := re.search("os_error_code='([0-9]+)'", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
        raise OSError(f"Orbax says: {one_line(error)}") from error
    finally:
        logger.removeFilter(is_news)
