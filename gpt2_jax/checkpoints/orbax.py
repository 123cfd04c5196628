"""The Orbax format: gpt2_jax.json beside the params as Orbax writes them.

gpt2_jax.json holds the config and a sha256 of each tensor and file, because Orbax finds only the damage that its
decompression notices. The params are written as Orbax's first interface lays them out, which both of its interfaces
open; earlier versions of this package wrote the layout of v1, which is read too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax import processes
from gpt2_jax.checkpoints import bases, foreign_orbax, orbax_arrays, parts, runs
from gpt2_jax.checkpoints.ahead import read_ahead
from gpt2_jax.checkpoints.change import Change
from gpt2_jax.checkpoints.integrity import (
    DamagedError,
    Leaves,
    check_hash,
    read_manifest,
    sha256,
    write_manifest,
)
from gpt2_jax.config import GPT2Config
from gpt2_jax.files import hash_files
from gpt2_jax.lora import pairs_of
from gpt2_jax.model import abstract_params
from gpt2_jax.params import differences, flatten, unflatten

MANIFEST, TREE = "gpt2_jax.json", "params"


def read_config(directory: Path) -> GPT2Config:
    """Read gpt2_jax.json.

    Raises:
      DamagedError: the file is not what was written.
    """
    return _read_manifest(directory)[0]


def read(directory: Path, open_model: bases.Open) -> tuple[GPT2Config, Leaves]:
    """Read what `write` wrote onto the host, with LoRA merged. The devices from which it was saved do not matter.

    Args:
      directory: the folder.
      open_model: opens the model that LoRA was trained on, if it is not in a run's folder.

    Returns:
      config, leaves. Each leaf is read when it is requested, or a little earlier.

    Raises:
      FileNotFoundError: the folder of params beside gpt2_jax.json is missing.
      DamagedError: a file is damaged (found at the start, or while the leaves are read).
    """
    config, manifest = _read_manifest(directory)
    shapes = flatten(abstract_params(config))
    if not has_base(directory):
        return config, read_ahead(shapes, _reader(directory, manifest, shapes))
    change = read_change(directory)
    if wrong := differences(change.shapes, shapes, dtypes=False):
        raise DamagedError(f"{directory} is damaged: it does not match its config: {wrong[0]}")
    return config, change.merged(open_model)


def has_base(directory: Path) -> bool:
    """Return whether a folder holds only what LoRA has trained."""
    return "base" in _read_manifest(directory)[1]


def read_change(directory: Path) -> Change:
    """Read what `write` wrote with a base. Errors: see `read`."""
    _, manifest = _read_manifest(directory)
    stored = {
        name: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
        for name, (dtype, shape) in manifest["leaves"].items()
    }
    read_one = _reader(directory, manifest, stored)
    pairs = {name: read_one(name) for name in manifest["pairs"]}
    run_dir = directory.resolve().parent
    return Change(
        pairs=pairs_of(pairs),
        alpha=manifest["lora"]["alpha"],
        dropout=manifest["lora"].get("dropout", 0.0),
        own={name: leaf for name, leaf in stored.items() if name not in pairs},
        read_own=read_one,
        base=manifest["base"],
        run_dir=run_dir if runs.is_run(run_dir) else None,
    )


def _reader(
    directory: Path, manifest: Mapping[str, Any], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> Callable[[str], np.ndarray]:
    """Return a function that reads a tensor by its name. The files are compared with their sha256 first."""
    path = (directory / TREE).resolve()
    if not path.is_dir():
        raise FileNotFoundError(f"{directory} holds no folder {TREE} beside {MANIFEST}")
    found = hash_files(path)
    if wrong := [name for name, digest in manifest["files"].items() if found.get(name) != digest]:
        raise DamagedError(f"{path} is damaged: {wrong[0]} is not what was written, or is missing")
    tree = foreign_orbax.find(path)
    if tree is None:
        raise DamagedError(f"{path} is damaged: it holds no folder that Orbax wrote")

    def read_one(name: str) -> np.ndarray:
        try:
            array = orbax_arrays.read(tree, name.replace("/", "."), shapes[name].dtype, shapes[name].shape)
        except OSError as error:
            raise DamagedError(f"{path} is damaged: {error}") from error
        check_hash(name, array, manifest["sha256"], path)
        return array

    return read_one


def write(directory: Path, config: GPT2Config, flat: Mapping[str, np.ndarray], **more: Any) -> None:
    """Write gpt2_jax.json and the params into an empty directory. This process writes alone, whatever others do.

    `more` is written into gpt2_jax.json too.
    """
    import orbax.checkpoint as ocp

    path = (directory / TREE).resolve()
    checkpointer_type, own = _alone(ocp) if processes.count() > 1 else (ocp.Checkpointer, {})
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt="[" not in str(path),  # its database treats [ as a pattern
        use_compression=False,  # it saves a tenth, but a compressed tensor needs twice its memory when it is read
        **own,
    )
    with parts.clear_errors(saving=True), checkpointer_type(handler, **own) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(unflatten(flat)))
    hashes = {name: sha256(array) for name, array in flat.items()}
    manifest = write_manifest(config, hashes, files=hash_files(path), **more)
    (directory / MANIFEST).write_text(json.dumps(json.loads(manifest), indent=1) + "\n", encoding="utf-8")


def _alone(ocp: Any) -> tuple[Any, dict[str, Any]]:
    """Return the Checkpointer, and its options, with which Orbax does not wait for other processes."""
    own = jax.process_index()
    options = ocp.options.MultiprocessingOptions(own, active_processes={own}, barrier_sync_key_prefix=f"gpt2_jax_{own}")

    class Alone(ocp.Checkpointer):
        def synchronize_next_awaitable_signal_operation_id(self) -> None:
            """Do not count this operation: the numbers name the barriers of operations of all processes."""

    return Alone, {"multiprocessing_options": options}


def _read_manifest(directory: Path) -> tuple[GPT2Config, dict[str, Any]]:
    path = directory / MANIFEST
    return read_manifest(path.read_text(encoding="utf-8", errors="replace"), path)
