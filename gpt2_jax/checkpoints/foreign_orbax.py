"""Params that other programs wrote with Orbax, beside a config.json or hparams.json.

Orbax has several interfaces, and each lays out its folders in its own way. All of them mark the folder of a tree with
the file _METADATA. The tree may be a training state, such as Flax's TrainState, that holds the params and more. There
are no hashes: only the damage that Orbax notices is found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2_jax.checkpoints import huggingface, names, orbax_arrays, parts, tensorflow
from gpt2_jax.checkpoints.ahead import read_ahead
from gpt2_jax.checkpoints.integrity import DamagedError, Leaves, one_line
from gpt2_jax.config import GPT2Config

TREE_MARK = "_METADATA"
DEPTH = 3  # folders below the given one: CheckpointManager writes STEP/ITEM


def find(directory: Path) -> Path | None:
    """Return the folder of the tree with the params: of the newest step, if there are several. None without a tree."""
    trees = _trees(directory, DEPTH)
    return max(trees, key=lambda path: _preference(path.relative_to(directory)), default=None)


def _trees(directory: Path, depth: int) -> Iterator[Path]:
    if (directory / TREE_MARK).is_file():
        yield directory
    elif depth:
        for path in sorted(directory.iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                yield from _trees(path, depth - 1)


def _preference(path: Path) -> tuple[int, int]:
    """Return (step, whether the name is that of the params): the largest is read."""
    steps = [int(number[1]) for part in path.parts if (number := re.fullmatch(r"(?:\w*_)?(\d+)", part))]
    return max(steps, default=0), sum(part in ("params", "default", "state", "model") for part in path.parts)


def read(directory: Path, dtype: np.dtype | None = None) -> tuple[GPT2Config, Leaves]:
    """Read the params onto the host. The names may be those of any program in `names`.

    Args:
      directory: the folder with the config.
      dtype: as in `huggingface.read`.

    Returns:
      config, leaves. Each leaf is read when it is requested, or a little earlier.

    Raises:
      FileNotFoundError: there is no config, or no tree.
      ValueError: the config describes another architecture, or the arrays do not match it.
      DamagedError: the tree cannot be read. The call or the reading of a leaf raises it.
    """
    is_hugging_face = (directory / "config.json").is_file()
    config = huggingface.read_config(directory) if is_hugging_face else tensorflow.read_hparams(directory)
    path = find(directory)
    if path is None:
        raise FileNotFoundError(f"{directory} holds no folder that Orbax wrote")
    path = path.resolve()
    found, root = _find_arrays(path)

    def read_some(some: Mapping[str, jax.ShapeDtypeStruct]) -> Leaves:
        full_name = {id(leaf): root + name for name, leaf in found.items()}

        def read_one(name: str) -> np.ndarray:
            leaf = some[name]
            try:
                return orbax_arrays.read(path, full_name[id(leaf)], leaf.dtype, leaf.shape)
            except OSError as error:
                raise DamagedError(f"{path} is damaged: {error}") from error

        return read_ahead(some, read_one)

    config_file = "config.json" if is_hugging_face else "hparams.json"
    matched = names.match(found, config, path, config_file, read_some, dtype)
    return matched.config, matched.leaves(read_some(matched.tensors))


def _find_arrays(path: Path) -> tuple[dict[str, jax.ShapeDtypeStruct], str]:
    """Return the params in a tree, without the rest of a training state, as {name with dots: shape and dtype}.

    The names are without the root, which is returned too.
    """
    import orbax.checkpoint as ocp

    try:
        with parts.clear_errors(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(path).item_metadata.tree
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
        arrays = {_name(keys): leaf for keys, leaf in leaves if hasattr(leaf, "shape")}
        root = names.root_of(arrays)
        return {
            name.removeprefix(root): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for name, leaf in arrays.items()
            if _is_param(name, root)
        }, root
    except MemoryError:
        raise
    except Exception as error:  # Orbax passes on the errors of the libraries below it
        said = one_line(error).removeprefix("Orbax says: ")
        raise DamagedError(f"{path} is damaged, Orbax says: {said}") from error


def _is_param(name: str, root: str) -> bool:
    return name.startswith(root) and not names.MOMENTS.search(name)


def _name(keys: Any) -> str:
    """Return the path of a leaf with dots."""
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)
