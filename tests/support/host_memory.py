"""How many bytes of the host `load` needs beside the shards: counted, not sampled."""

import contextlib
import tracemalloc
import weakref
from unittest import mock

import jax
import numpy as np


@contextlib.contextmanager
def beside_the_shards():
    """Yield a list. At the end its element is the peak of traced memory that is not the memory of shards.

    Traced are NumPy's arrays and all that Python allocates. An array that JAX uses without a copy counts as a shard
    from the call of `jax.device_put` on.
    """
    put, shards, peak = jax.device_put, {}, [0]

    def note():
        used = sum(n_bytes for ref, n_bytes in shards.values() if ref() is not None)
        peak[0] = max(peak[0], tracemalloc.get_traced_memory()[1] - before - used)
        tracemalloc.reset_peak()

    def device_put(array, *where):
        placed = put(array, *where)
        owner = array if getattr(array, "base", None) is None else array.base  # JAX keeps a view of it
        on_one = isinstance(owner, np.ndarray) and len(placed.devices()) == 1
        if on_one and placed.block_until_ready().unsafe_buffer_pointer() == array.ctypes.data:
            shards[id(owner)] = weakref.ref(owner), array.nbytes
        note()
        return placed

    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        with mock.patch.object(jax, "device_put", device_put):
            yield peak
        note()
    finally:
        tracemalloc.stop()
