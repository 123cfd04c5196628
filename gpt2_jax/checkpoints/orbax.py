"""Orbax: gpt2_jax.json, with the config and a sha256 of each tensor, beside the params as Orbax writes them.

Orbax finds damage only where its compression happens to; the hashes find the rest. Its v1 interface is used here alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from gpt2_jax.checkpoints.integrity import DamagedError, Leaves, check_hash, read_manifest, sha256, write_manifest
from gpt2_jax.config import GPT2Config
from gpt2_jax.model import abstract_params
from gpt2_jax.params import flatten, unflatten

MANIFEST, TREE = "gpt2_jax.json", "params"


def read_config(directory: Path) -> GPT2Config:
    """Read gpt2_jax.json.

    Raises:
      DamagedError: it is not what was written.

    """
    return _read_manifest(directory)[0]


def read(directory: Path) -> tuple[GPT2Config, Leaves]:
    """Read what `write` wrote, onto the host: on what devices it lay when it was saved does not matter.

    Raises:
      FileNotFoundError: there is no tree beside gpt2_jax.json.
      DamagedError: a file is damaged (found at the start, or while the leaves are read).

    """
    from orbax.checkpoint import v1 as ocp

    config, hashes = _read_manifest(directory)
    path = _tree_path(directory)
    if not path.is_dir():
        raise FileNotFoundError(f"{directory} holds no folder {TREE} beside {MANIFEST}")
    host = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract_params(config))
    try:
        tree = ocp.load(path, host)
    except MemoryError:
        raise
    except Exception as error:  # Orbax lets through whatever the library that stumbled over the bytes raises
        raise DamagedError(f"{path} is damaged, Orbax says: {' '.join(str(error).split())[:300]}") from error
    return config, _leaves(flatten(tree), flatten(abstract_params(config)), hashes, path)


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
    """Write gpt2_jax.json and the tree into an empty directory."""
    from orbax.checkpoint import v1 as ocp

    ocp.save(_tree_path(directory), unflatten(flat))
    manifest = write_manifest(config, {name: sha256(array) for name, array in flat.items()})
    (directory / MANIFEST).write_text(json.dumps(json.loads(manifest), indent=1) + "\n", encoding="utf-8")


def _tree_path(directory: Path) -> Path:
    path = (directory / TREE).resolve()
    if "[" in str(path):
        raise ValueError(f"{directory}: Orbax loses files in folders with [ in the path; choose another name")
    return path


def _read_manifest(directory: Path) -> tuple[GPT2Config, dict[str, str]]:
    path = directory / MANIFEST
    config, manifest = read_manifest(path.read_text(encoding="utf-8", errors="replace"), path)
    return config, manifest["sha256"]
