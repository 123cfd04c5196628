"""Reads tensors ahead in threads, with a bound on the bytes that are held."""

from __future__ import annotations

import collections
import concurrent.futures
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gpt2_jax.checkpoints.integrity import Leaves

N_THREADS = min(4, os.cpu_count() or 1)
HELD = 1.15  # times the bytes of the largest tensor


def read_ahead(tensors: Mapping[str, Any], read_one: Callable[[str], np.ndarray]) -> Leaves:
    """Yield every tensor, the largest first. The call starts threads that read.

    All arrays together have up to HELD times the bytes of the largest. This counts the one that was yielded, until the
    next one is requested: let go of it before.

    Args:
      tensors: what has the shape and the dtype of each tensor.
      read_one: reads a tensor by its name. Its errors are raised here.
    """
    sizes = {name: math.prod(tensor.shape) * tensor.dtype.itemsize for name, tensor in tensors.items()}
    waiting = collections.deque(sorted(sizes, key=lambda name: -sizes[name]))
    running: collections.deque[tuple[str, concurrent.futures.Future[np.ndarray]]] = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(N_THREADS)
    most = int(HELD * max(sizes.values(), default=0))

    def start(held: int) -> None:
        """Start to read what there is room for, beside `held` bytes of the caller."""
        held += sum(sizes[name] for name, _ in running)
        while waiting and len(running) <= N_THREADS:
            held += sizes[waiting[0]]
            if sizes[waiting[0]] < held > most:  # alone, every tensor is read
                return
            name = waiting.popleft()
            running.append((name, pool.submit(read_one, name)))

    def results() -> Leaves:
        try:
            while running or waiting:
                start(0)
                name, future = running.popleft()
                array = future.result()
                del future
                start(sizes[name])
                yield name, array
                del array
        finally:
            running.clear()
            pool.shutdown(cancel_futures=True)

    start(0)
    return results()
