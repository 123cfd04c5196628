"""The Orbax format: gpt2_jax.json beside the params as Orbax writes them.

gpt2_jax.json holds the config and a sha256 of each tensor and file, because Orbax finds only the damage that its
decompression notices. The params are written as Orbax's first interface lays them out, which both of its interfaces
open; earlier versions of this package wrote the layout of v1, which is read too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2_jax.checkpoints import parts
from gpt2_jax.checkpoints.integrity import (
    DamagedError,
    Leaves,
    check_hash,
    one_line,
    read_manifest,
    sha256,
    write_manifest,
)
from gpt2_jax.config import GPT2Config
from gpt2_jax.files import hash_files
from gpt2_jax.model import abstract_params
from gpt2_jax.params import flatten, unflatten

MANIFEST, TREE = "gpt2_jax.json", "params"


def read_config(directory: Path) -> GPT2Config:
    """Read gpt2_jax.json.

    Raises:
      DamagedError: the file is not what was written.
    """
    return _read_manifest(directory)[0]


def read(directory: Path) -> tuple[GPT2Config, Leaves]:
    """Read what `write` wrote onto the host. The devices from which it was saved do not matter.

    Raises:
      FileNotFoundError: the folder of params beside gpt2_jax.json is missing.
      DamagedError: a file is damaged (found at the start, or while the leaves are read).
    """
    from orbax.checkpoint import v1 as ocp

    config, manifest = _read_manifest(directory)
    path = (directory / TREE).resolve()
    if not path.is_dir():
        raise FileNotFoundError(f"{directory} holds no folder {TREE} beside {MANIFEST}")
    found = hash_files(path)  # before Orbax opens them: damaged files make it leave threads with errors
    if wrong := [name for name, digest in manifest["files"].items() if found.get(name) != digest]:
        raise DamagedError(f"{path} is damaged: {wrong[0]} is not what was written, or is missing")
    host = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract_params(config))
    try:
        tree = ocp.load(str(path), host)
    except MemoryError:
        raise
    except Exception as error:  # Orbax passes on the errors of the libraries below it
        raise DamagedError(f"{path} is damaged, Orbax says: {one_line(error)}") from error
    return config, _leaves(flatten(tree), flatten(abstract_params(config)), manifest["sha256"], path)


def _leaves(
    flat: dict[str, np.ndarray], expected: Mapping[str, jax.ShapeDtypeStruct], hashes: Mapping[str, str], path: Path
) -> Leaves:
    for name in sorted(flat, key=lambda name: -flat[name].nbytes):
        array = flat.pop(name)
        if array.shape != expected[name].shape or array.dtype != expected[name].dtype:
            raise DamagedError(f"{path} is damaged: {name} is {array.dtype}{array.shape}")
        check_hash(name, array, hashes, path)
        yield name, array


def write(directory: Path, config: GPT2Config, flat: Mapping[str, np.ndarray]) -> None:
    """Write gpt2_jax.json and the params into an empty directory."""
    import orbax.checkpoint as ocp

    path = (directory / TREE).resolve()
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt="[" not in str(path))  # its database treats [ as a pattern
    with parts.clear_errors(saving=True), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(unflatten(flat)))
    hashes = {name: sha256(array) for name, array in flat.items()}
    manifest = write_manifest(config, hashes, files=hash_files(path))
    (directory / MANIFEST).write_text(json.dumps(json.loads(manifest), indent=1) + "\n", encoding="utf-8")


def _read_manifest(directory: Path) -> tuple[GPT2Config, dict[str, Any]]:
    path = directory / MANIFEST
    return read_manifest(path.read_text(encoding="utf-8", errors="replace"), path)
