"""flax_model.msgpack of Hugging Face's FlaxGPT2LMHeadModel, beside its config.json. msgpack runs no code.

The file has no checksums: a changed weight cannot be found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.checkpoints import huggingface, names
from gpt2_jax.checkpoints.integrity import DamagedError, Leaves, drain, one_line
from gpt2_jax.config import GPT2Config

WEIGHTS, INDEX = "flax_model.msgpack", "flax_model.msgpack.index.json"


def read(directory: Path, dtype: np.dtype | None = None) -> tuple[GPT2Config, Leaves]:
    """Read a directory with flax_model.msgpack, in one file or in several with an index. All weights are read at once.

    Args:
      directory: the folder.
      dtype: as in `huggingface.read`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: config.json describes another architecture, or the arrays do not match config.json.
      DamagedError: a file is damaged.
    """
    config = huggingface.read_config(directory)
    arrays: dict[str, np.ndarray] = {}
    for path in _files(directory):
        arrays |= dict(_flat(_restore(path)))
    source, root = directory / WEIGHTS, names.root_of(arrays)
    arrays = {name.removeprefix(root): array for name, array in arrays.items() if name.startswith(root)}
    matched = names.match(arrays, config, source, "config.json", lambda some: some.items(), dtype)
    return matched.config, matched.leaves(drain(matched.tensors))


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if (directory / WEIGHTS).is_file() or not index.is_file():
        return [directory / WEIGHTS]
    return [directory / file for file in sorted(set(huggingface.read_index(index).values()))]


def _restore(path: Path) -> Any:
    from flax import serialization

    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return serialization.msgpack_restore(path.read_bytes())
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the library passes on errors of any type
        raise DamagedError(f"{path} is damaged, or was not written by Flax: {one_line(error)}") from error


def _flat(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the arrays of nested dicts, by name with dots."""
    if isinstance(tree, Mapping):
        for name, branch in tree.items():
            yield from _flat(branch, (*path, str(name)))
    elif isinstance(tree, np.ndarray):
        yield ".".join(path), tree
