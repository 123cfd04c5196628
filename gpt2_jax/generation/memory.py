"""How many rows are decoded together: as many as their KV cache has room for. What is said if memory runs out."""

from __future__ import annotations

import math

import jax

from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.buckets import bucket_length, power_of_two
from gpt2_jax.params import Params
from gpt2_jax.sharding import platform

RECENT = 16  # slots of the cache's recent part, and so the most decode steps per call
CPU_BYTES = 4 * 2**30  # for the rows that are decoded together on a CPU, whose free memory JAX does not know
SHARE = 0.5  # of the memory of another device that the params leave free; programs need the rest
ARRAYS_OF_LOGITS = 6  # float32 [V] of each row: logits, scaled, filtered, noise, and the ids that the row contains


def cache_slots(config: GPT2Config, longest: int) -> int:
    """Return the slots of a row's cache for texts of up to `longest` tokens, without the recent part."""
    return min(bucket_length(longest), config.n_ctx) + RECENT


def row_bytes(config: GPT2Config, longest: int) -> int:
    """Return the bytes that one row of up to `longest` tokens needs: its KV cache and its logits."""
    return config.cache_bytes(1, cache_slots(config, longest) + RECENT) + 4 * ARRAYS_OF_LOGITS * config.n_vocab


def rows_together(config: GPT2Config, params: Params, n_rows: int, longest: int) -> int:
    """Return how many rows to decode together, so that all `n_rows` take calls of about one size.

    Args:
      config: the model's config.
      params: the model's params, as `placed` returns them.
      n_rows: number of rows, 1 or more.
      longest: the most tokens that a row will have, new ones included.
    """
    most = max(1, _room(params) // row_bytes(config, longest))
    if n_rows <= most:
        return n_rows
    power = power_of_two(most)
    most = power * 3 // 2 if power >= 8 and power * 3 // 2 <= most else power  # rows are rounded up to these numbers
    n_calls = -(-n_rows // most)
    return -(-n_rows // n_calls)


def _room(params: Params) -> int:
    """Return the bytes for the rows that are decoded together.

    They depend on the device and the params only, and not on what else is in memory: equal calls divide a list alike,
    so they use the same compiled programs and round alike.
    """
    device = next(iter(jax.tree.leaves(params)[0].devices()))
    stats = None if platform(params) == "cpu" else device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return CPU_BYTES
    shards = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(params))
    return int(SHARE * (stats["bytes_limit"] - sum(math.prod(shape) * n_bytes for shape, n_bytes in shards)))


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error of JAX says that a device has too little memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


def out_of_memory(config: GPT2Config, what: str, n_bytes: int) -> MemoryError:
    """Return the error to raise: what was asked for, the bytes that it and the params take, and what to do."""
    return MemoryError(
        f"not enough memory to {what}: this takes about {n_bytes / 1e9:.1f} GB in addition to "
        f"{config.param_bytes / 1e9:.1f} GB for the params; pass fewer or shorter prompts in a call, ask for fewer "
        "new tokens, or use bfloat16"
    )
