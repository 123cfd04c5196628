"""Puts arrays of the host on their devices, one after the other, with little host memory beside the shards.

On a CPU, JAX uses aligned memory without a copy, so a shard is made where it stays. An accelerator gets what must be
cast or made contiguous in blocks.
"""

from __future__ import annotations

import functools
import gc
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Sharding, SingleDeviceSharding

from gpt2_jax.checkpoints.integrity import count_non_finite

ALIGNMENT = 64  # bytes: JAX needs this alignment to use memory without a copy
CHUNK = 2**18  # values that are cast and checked at a time
BLOCK = 2**23  # bytes that an accelerator gets at a time, if they are not a part of the array as it is


def aligned(n_bytes: int) -> np.ndarray:
    """Return new memory that JAX uses without a copy: uint8 [n_bytes], with undefined values."""
    room = np.empty(n_bytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + n_bytes]


def place(array: np.ndarray, dtype: np.dtype, sharding: Any) -> tuple[jax.Array, int]:
    """Cast an array and put it where `sharding` says. All copies are complete when this returns.

    Beside the shards, the host then holds no more than the array and, for an accelerator, two BLOCKs.

    Args:
      array: an array of floats with one axis or more; it need not be contiguous.
      dtype: the dtype of the result.
      sharding: a Sharding or a Device. None is the default device.

    Returns:
      The jax array, and how many of its values are NaN or infinite. Only the shards of this process are counted.

    Raises:
      ValueError: the sharding does not fit the array.
    """
    if isinstance(sharding, jax.Device):
        sharding = SingleDeviceSharding(sharding)
    if not isinstance(sharding, Sharding):
        placed, n_non_finite = _place_part(array, dtype, [sharding], whole=True)
        return placed[0], n_non_finite
    sharding.shard_shape(array.shape)  # an error if a side cannot be divided
    parts: dict[tuple, tuple[np.ndarray, list[Any]]] = {}
    for device, index in sharding.addressable_devices_indices_map(array.shape).items():
        sides = tuple((side.start, side.stop) for side in index or ())
        _, wheres = parts.setdefault(sides, (array[index or ...], []))
        wheres.append(SingleDeviceSharding(device, memory_kind=sharding.memory_kind))
    shards, n_non_finite = [], 0
    for part, wheres in parts.values():
        placed, n = _place_part(part, dtype, wheres, whole=part.size == array.size)
        shards += placed
        n_non_finite += n
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards), n_non_finite


def _place_part(part: np.ndarray, dtype: np.dtype, wheres: list[Any], whole: bool) -> tuple[list[jax.Array], int]:
    """Put a part of an array on some devices; `whole` says that it is all of the array."""
    on_cpu, as_it_is = _platform(wheres[0]) == "cpu", part.dtype == dtype and part.flags.c_contiguous
    if on_cpu:  # a shard that is a view would keep the whole array
        as_it_is = as_it_is and whole and part.ctypes.data % ALIGNMENT == 0
    n_bytes = part.size * dtype.itemsize
    if not as_it_is and not on_cpu and n_bytes > BLOCK:
        placed, counts = zip(*(_in_blocks(part, dtype, where) for where in wheres), strict=True)
        return [*placed], counts[0]
    n_non_finite = None
    if not as_it_is:
        made = aligned(n_bytes).view(dtype).reshape(part.shape)
        n_non_finite = _copy(part, made)
        part = made
    placed = [jax.device_put(part, where) for where in wheres]
    jax.block_until_ready(placed)
    if not on_cpu:
        gc.collect(0)  # JAX lets go of arrays that were sent when garbage is collected, or with its next call
    return placed, count_non_finite(part) if n_non_finite is None else n_non_finite


def _in_blocks(part: np.ndarray, dtype: np.dtype, where: Any) -> tuple[jax.Array, int]:
    """Put a part of an array on an accelerator in blocks of rows."""
    n_rows, n_non_finite = _rows(part, BLOCK // dtype.itemsize), 0
    placed = jax.jit(functools.partial(jnp.zeros, part.shape, dtype), out_shardings=where)()
    for start in range(0, len(part), n_rows):
        rows = part[start : start + n_rows]
        block = aligned(rows.size * dtype.itemsize).view(dtype).reshape(rows.shape)
        n_non_finite += _copy(rows, block)
        placed = _write(placed, *jax.device_put((block, np.int32(start)), where))
        placed.block_until_ready()
        gc.collect(0)
    return placed, n_non_finite


@functools.partial(jax.jit, donate_argnums=0)
def _write(placed: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(placed, block, start, 0)


def _copy(part: np.ndarray, made: np.ndarray) -> int:
    """Cast an array into another one. Return how many of the new values are NaN or infinite."""
    n_rows, n_non_finite = _rows(part, CHUNK), 0
    for start in range(0, len(part), n_rows):
        chunk = made[start : start + n_rows]
        with np.errstate(over="ignore", invalid="ignore"):  # the caller warns of what it counts
            chunk[...] = part[start : start + n_rows]
        n_non_finite += count_non_finite(chunk)
    return n_non_finite


def _rows(array: np.ndarray, n_values: int) -> int:
    """Return how many rows of an array have up to `n_values` values; one or more."""
    return max(1, n_values // max(1, math.prod(array.shape[1:])))


def _platform(where: Any) -> str:
    """Return the kind of a device: "cpu", "gpu" or "tpu". Without a sharding, it is the default device."""
    if isinstance(where, Sharding):
        return next(iter(where.device_set)).platform
    # A device, the name of a platform, or None.
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return default if isinstance(default, str) else (default or jax.local_devices()[0]).platform
