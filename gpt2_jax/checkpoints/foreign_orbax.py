"""Params that other programs wrote with Orbax, beside a config.json or hparams.json.

Orbax has several interfaces, and each lays out its folders in its own way. All of them mark the folder of a tree with
the file _METADATA. The tree may be a training state, such as Flax's TrainState, that holds the params and more. There
are no hashes: only the damage that Orbax notices is found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.checkpoints import huggingface, names, parts, tensorflow
from gpt2_jax.checkpoints.integrity import DamagedError, Leaves, drain, one_line
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

    Raises:
      FileNotFoundError: there is no config, or no tree.
      ValueError: the config describes another architecture, or the arrays do not match it.
      DamagedError: Orbax cannot read the tree.
    """
    is_hugging_face = (directory / "config.json").is_file()
    config = huggingface.read_config(directory) if is_hugging_face else tensorflow.read_hparams(directory)
    path = find(directory)
    if path is None:
        raise FileNotFoundError(f"{directory} holds no folder that Orbax wrote")
    arrays = _restore(path.resolve())
    config_file = "config.json" if is_hugging_face else "hparams.json"
    matched = names.match(arrays, config, path, config_file, lambda some: some.items(), dtype)
    return matched.config, matched.leaves(drain(matched.tensors))


def _restore(path: Path) -> dict[str, np.ndarray]:
    """Read the params in a tree, without the rest of a training state, as {name with dots: array}."""
    import jax
    import orbax.checkpoint as ocp

    def is_leaf(node: Any) -> bool:
        return hasattr(node, "shape")

    try:
        with parts.clear_errors(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(path).item_metadata.tree
            leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
            root = names.root_of(_name(keys) for keys, _ in leaves)
            item = jax.tree_util.tree_map_with_path(
                lambda keys, leaf: leaf if _is_param(_name(keys), root) else ocp.PLACEHOLDER, tree, is_leaf=is_leaf
            )
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree, is_leaf=is_leaf)
            found = checkpointer.restore(path, args=ocp.args.PyTreeRestore(item=item, restore_args=how))
    except MemoryError:
        raise
    except Exception as error:  # Orbax passes on the errors of the libraries below it
        said = one_line(error).removeprefix("Orbax says: ")
        raise DamagedError(f"{path} is damaged, Orbax says: {said}") from error
    arrays = {_name(keys): array for keys, array in jax.tree_util.tree_leaves_with_path(found)}
    return {name.removeprefix(root): array for name, array in arrays.items() if isinstance(array, np.ndarray)}


def _is_param(name: str, root: str) -> bool:
    return name.startswith(root) and not names.MOMENTS.search(name)


def _name(keys: Any) -> str:
    """Return the path of a leaf with dots."""
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)
