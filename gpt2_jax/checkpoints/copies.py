"""Kept copies: the tensors of a TensorFlow checkpoint in a second file, which is read without TensorFlow.

Each directory has one copy, in `cache_dir()/copies`. The copy is used while the original is unchanged: the names, sizes
and modification times of its data files, its index (with the checksum of each variable) and its hparams.json. Each
tensor of the copy is checked against its sha256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gpt2_jax.checkpoints import safetensors, tensorflow
from gpt2_jax.checkpoints.integrity import (
    DamagedError,
    DtypeNeededError,
    Leaves,
    read_manifest,
    warn,
    write_manifest,
)
from gpt2_jax.config import GPT2Config
from gpt2_jax.files import cache_dir
from gpt2_jax.model import abstract_params
from gpt2_jax.params import differences, flatten


def read(directory: Path, dtype: np.dtype | None = None) -> tuple[GPT2Config, Leaves]:
    """Read a TensorFlow checkpoint from its copy. If there is none, read it with TensorFlow and keep a copy.

    Args:
      directory: the folder, or the prefix of one of its checkpoints. A folder has one copy, of what was read last.
      dtype: as in `tensorflow.read`. Variables of float64, or of different dtypes, are not copied.

    Raises:
      FileNotFoundError, ValueError: as in `tensorflow.read`. A copy that is damaged or cannot be written only
        causes a warning.
    """
    source = _fingerprint(directory)
    try:
        opened = _open(directory, source)
    except (DamagedError, OSError) as error:
        opened = None
        warn(f"{error}; the copy is made again from {directory}")
    if opened is None:
        return _make(directory, source, dtype)
    config, leaves = opened
    return config, _or_make_again(directory, source, leaves)


def read_config(directory: Path) -> GPT2Config | None:
    """Return the config from the copy of a directory, or None if there is no usable copy."""
    try:
        opened = _open(directory, _fingerprint(directory))
    except (DamagedError, OSError):
        return None
    return opened and opened[0]


def copy_path(directory: Path) -> Path:
    """Return the path of a directory's copy."""
    directory = directory if directory.is_dir() else directory.parent
    name = hashlib.sha256(str(directory.resolve()).encode(errors="surrogateescape")).hexdigest()[:32]
    return cache_dir() / "copies" / f"{name}.safetensors"


def _open(directory: Path, source: dict[str, object]) -> tuple[GPT2Config, Leaves] | None:
    path = copy_path(directory)
    if not path.is_file():
        return None
    tensors, metadata = safetensors.read_header(path)
    config, manifest = read_manifest(metadata.get("gpt2_jax", ""), path)
    if manifest.get("source") != source:
        return None
    leaves = safetensors.read(tensors, manifest["sha256"], mapped=True)  # threads read while the model is traced below
    if wrong := differences(tensors, flatten(abstract_params(config))):
        raise DamagedError(f"{path} is damaged:\n  " + "\n  ".join(wrong))
    return config, leaves


def _or_make_again(directory: Path, source: dict[str, object], leaves: Leaves) -> Leaves:
    """Yield the tensors of the copy. If one is damaged, yield it and the remaining ones from the original."""
    done: set[str] = set()
    try:
        yield from _except(leaves, done)
        return
    except (DamagedError, OSError) as error:
        warn(f"{error}; the copy is made again from {directory}")
    yield from _except(_make(directory, source, None)[1], done)


def _except(leaves: Leaves, done: set[str]) -> Leaves:
    """Yield the tensors that are not done, and add them to those that are."""
    for name, array in leaves:
        if name not in done:
            done.add(name)
            yield name, array
        del array  # before the next one is read


def _make(directory: Path, source: dict[str, object], dtype: np.dtype | None) -> tuple[GPT2Config, Leaves]:
    """Read the original and keep a copy. `source` was made before: if the files changed since, the copy is not used."""
    try:
        config, leaves = tensorflow.read(directory)
    except DtypeNeededError:
        if dtype is None:
            raise
        return tensorflow.read(directory, dtype)
    return config, _copied(directory, source, config, leaves)


def _copied(directory: Path, source: dict[str, object], config: GPT2Config, leaves: Leaves) -> Leaves:
    """Yield the tensors of the original, and write each into the copy. Without room for it, yield them all the same."""
    done: set[str] = set()

    def metadata(hashes: Mapping[str, str]) -> dict[str, str]:
        return {"gpt2_jax": write_manifest(config, hashes, source=source)}

    try:
        path = copy_path(directory)
        path.parent.mkdir(parents=True, exist_ok=True)
        with safetensors.writing(path, flatten(abstract_params(config)), metadata) as add:
            for name, array in leaves:
                add(name, array)
                done.add(name)
                yield name, array
                del array  # before the next one is read
        return
    except OSError as error:
        warn(
            f"no copy of {directory} could be kept ({error}): the next load will be as slow as this "
            "one. Choose a folder with GPT2_JAX_CACHE, or turn copies off with GPT2_JAX_KEEP_COPY=0",
        )
    yield from _except(tensorflow.read(directory)[1], done)


def _fingerprint(directory: Path) -> dict[str, object]:
    """Return what identifies the version of a checkpoint, in types that JSON does not change."""
    data = tensorflow.data_files(directory)
    prefix = tensorflow.find_checkpoint(directory)
    index = b"" if tensorflow.is_v1(prefix) else prefix.with_name(f"{prefix.name}.index").read_bytes()
    return {
        "data": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in data],
        "index": hashlib.sha256(index).hexdigest(),
        "hparams": tensorflow.read_hparams(directory).to_hparams(),
    }
