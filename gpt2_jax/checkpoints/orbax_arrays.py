"""Arrays that Orbax wrote, read one at a time with TensorStore, the library below Orbax.

Orbax itself reads a whole tree. It stores each array in Zarr's format, in a folder of its own or in a database (OCDBT)
that all arrays share. Nothing is verified here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.checkpoints.integrity import one_line
from gpt2_jax.checkpoints.placing import aligned

BLOCK = 2**23  # bytes that are read at a time, if the array is stored in chunks that are not larger
DATABASE = "manifest.ocdbt"
DRIVERS = {".zarray": "zarr", "zarr.json": "zarr3"}  # by the file that describes an array


def read(folder: Path, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Read an array.

    Beside the array, this needs memory for the chunk that is being decompressed. An uncompressed chunk is mapped.

    Args:
      folder: the absolute path of the tree's folder.
      name: the array's name there, with dots.
      dtype: the expected dtype.
      shape: the expected shape.

    Raises:
      OSError: the array cannot be read, or has another dtype or shape.
    """
    import tensorstore as ts

    try:
        stored = _open(ts, folder, name)
        if stored.dtype.numpy_dtype != dtype or stored.shape != shape:
            raise OSError(f"{name} is {stored.dtype.name}{stored.shape}")
        array = aligned(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
        for box in _boxes(shape, stored.chunk_layout.read_chunk.shape, dtype.itemsize):
            ts.array(array[box], copy=False).write(stored[box].translate_to[0]).result()
    except (ValueError, KeyError, NotImplementedError) as error:  # TensorStore's own errors are ValueErrors
        raise OSError(f"{folder}: {name} cannot be read, TensorStore says: {one_line(error)}") from error
    return array


def _open(ts: Any, folder: Path, name: str) -> Any:
    file = {"driver": "file", "file_io_mode": {"mode": "memmap"}}
    if (folder / DATABASE).is_file():
        kvstore: Mapping[str, Any] = {
            "driver": "ocdbt",
            "base": {**file, "path": f"{folder.as_posix()}/"},
            "path": f"{name}/",
        }
    else:
        kvstore = {**file, "path": f"{(folder / name).as_posix()}/"}
    files = ts.KvStore.open(kvstore).result()
    found = [driver for mark, driver in DRIVERS.items() if files.read(mark).result().state == "value"]
    if not found:
        raise OSError(f"{name} is missing")
    spec = {"driver": found[0], "kvstore": kvstore, "fill_missing_data_reads": False}
    return ts.open(spec, read=True).result()


def _boxes(shape: tuple[int, ...], chunk: tuple[int, ...], itemsize: int) -> Any:
    """Yield the slices of blocks of whole chunks."""
    n_bytes = math.prod(chunk) * itemsize
    steps = (max(1, BLOCK // n_bytes) * chunk[0], *chunk[1:])
    starts = (range(0, side, step) for side, step in zip(shape, steps, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(slice(at, min(at + step, n)) for at, step, n in zip(corner, steps, shape, strict=True))
