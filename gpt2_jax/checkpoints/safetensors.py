"""Safetensors files. Hugging Face's library checks the layout; this module reads and writes the tensors.

The library's own reader maps the file and then copies it. This module reads each tensor once into memory that JAX uses
without a copy. So the verified bytes are the bytes in use, even if the file changes afterwards. For files that no other
program writes to, JAX can use the mapped file itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import ml_dtypes
import numpy as np

from gpt2_jax.checkpoints.ahead import read_ahead
from gpt2_jax.checkpoints.integrity import DamagedError, Leaves, check_hash, one_line, sha256
from gpt2_jax.checkpoints.placing import ALIGNMENT, aligned
from gpt2_jax.files import replacing_file

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Before Python 3.13 each mapping keeps a file descriptor open, and a process may often have only 1,024 of them. So only
# tensors of at least this many bytes are mapped: 50 of the 148 of 124M.
LEAST_MAPPED = 2**16
UNTRACKED = {"trackfd": False} if sys.version_info >= (3, 13) and sys.platform != "win32" else {}


@dataclasses.dataclass(frozen=True)
class Stored:
    """The location of a tensor in a file. The dtype is NumPy's if it is in DTYPES; otherwise it has only a `name`."""

    path: Path
    state: tuple[int, ...]
    offset: int
    shape: tuple[int, ...]
    dtype: Any

    @property
    def n_bytes(self) -> int:
        """The size of the tensor, if its dtype is in DTYPES."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return the location of each tensor in a file, and the file's metadata.

    Raises:
      FileNotFoundError: there is no such file.
      DamagedError: the file is not a safetensors file, is cut off, or has a damaged header.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="np"):  # checks names, shapes, dtypes, offsets and the file's length
            pass
        with path.open("rb") as file:
            state = _state(file)
            n_header = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(n_header))
    except (SafetensorError, ValueError) as error:
        if _head(path).startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` there") from error
        raise DamagedError(f"{path} is damaged, or not a safetensors file: {one_line(error)}") from error
    metadata = header.pop("__metadata__", {})
    stored = {
        name: Stored(
            path,
            state,
            8 + n_header + entry["data_offsets"][0],
            tuple(entry["shape"]),
            DTYPES.get(entry["dtype"], SimpleNamespace(name=entry["dtype"])),
        )
        for name, entry in header.items()
    }
    return stored, metadata


def read(tensors: Mapping[str, Stored], hashes: Mapping[str, str] | None, mapped: bool = False) -> Leaves:
    """Yield every tensor, the largest first, verified if hashes are given. The call starts threads that read ahead.

    The bytes that are held are bounded, as in `ahead.read_ahead`.

    Args:
      tensors: the tensors to read, from one file or several.
      hashes: the sha256 of each tensor; None verifies nothing.
      mapped: map the file into memory. It must not be written to while the arrays exist. A write to an array stays in
        memory.

    Raises:
      DamagedError: a tensor is not what was written, or the file is too short.
    """
    return read_ahead(tensors, lambda name: _read_one(name, tensors[name], hashes, mapped))


def _read_one(name: str, tensor: Stored, hashes: Mapping[str, str] | None, mapped: bool) -> np.ndarray:
    with tensor.path.open("rb", buffering=0) as file:
        if _state(file) != tensor.state:
            raise DamagedError(f"{tensor.path} was replaced or written to while it was read: load it again")
        if mapped and tensor.n_bytes >= LEAST_MAPPED:
            array = _map_bytes(file, tensor)
        else:
            array = _read_bytes(file, name, tensor).view(tensor.dtype).reshape(tensor.shape)
    check_hash(name, array, hashes, tensor.path)
    return array


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(40)


def _state(file: IO) -> tuple[int, ...]:
    """Return values that change when a file is replaced or written to."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _map_bytes(file: io.FileIO, tensor: Stored) -> np.ndarray:
    """Map a tensor into memory; what is written to the array stays in memory."""
    before = tensor.offset % mmap.ALLOCATIONGRANULARITY
    start, length = tensor.offset - before, before + tensor.n_bytes
    mapping = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start, **UNTRACKED)
    return np.ndarray(tensor.shape, tensor.dtype, buffer=mapping, offset=before)


def _read_bytes(file: io.FileIO, name: str, tensor: Stored) -> np.ndarray:
    n_bytes, flat = tensor.n_bytes, aligned(tensor.n_bytes)
    file.seek(tensor.offset)
    n_read = 0
    while n_read < n_bytes:
        n = file.readinto(flat.data[n_read:])
        if not n:
            raise DamagedError(f"{tensor.path} is damaged: it ends inside {name}")
        n_read += n
    return flat


@contextlib.contextmanager
def writing(
    path: Path, tensors: Mapping[str, Any], metadata: Callable[[Mapping[str, str]], Mapping[str, str]]
) -> Iterator[Callable[[str, np.ndarray], None]]:
    """Write a file under a temporary name, and rename it at the end of the block. So tensors need not be there at once.

    The data begins at a multiple of ALIGNMENT, for mapping.

    Args:
      path: the file.
      tensors: {name: an object with shape and dtype}, in the order of the file.
      metadata: makes the file's metadata from the sha256 of each tensor. Its length must not depend on the digits.

    Yields:
      add(name, array), to call once for each tensor, in any order.
    """
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
    hashes = dict.fromkeys(tensors, "0" * 64)

    def header() -> bytes:
        text = json.dumps({"__metadata__": dict(metadata(hashes)), **entries}).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    with replacing_file(path) as temporary, temporary.open("wb") as file:
        first = len(header())

        def add(name: str, array: np.ndarray) -> None:
            array = np.ascontiguousarray(array)
            hashes[name] = sha256(array)
            file.seek(first + entries[name]["data_offsets"][0])
            file.write(array.reshape(-1).view(np.uint8).data)

        yield add
        file.seek(0)
        file.write(header())
