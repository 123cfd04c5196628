"""Several processes of JAX that work on one thing: who is first, and how they agree.

`jax.distributed.initialize` connects the processes. After it, every process sees all devices, and all of them must call
the same compiled programs in the same order. Files are written by process 0. What one process reads, and what decides
which programs run, must come from process 0 to all of them. These functions send it through JAX's coordination service,
without a compiled program. All processes must call them, in the same order.

With one process, they do nothing, and import nothing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax

T = TypeVar("T")
WAIT_MS = 10_000  # of one request; a process that is waited for may work for hours
KINDS = {kind.__name__: kind for kind in (ValueError, FileNotFoundError, FileExistsError, OSError, MemoryError)}
_numbers = itertools.count()  # the messages of this process; the n-th has the same number in all processes


def count() -> int:
    """Return the number of processes."""
    return jax.process_count()


def is_first() -> bool:
    """Return whether this is process 0, which writes the files."""
    return jax.process_index() == 0


def on_first(function: Callable[[], T]) -> T:
    """Call a function in process 0, and return its result in every process.

    Args:
      function: takes nothing and returns JSON values: dicts with names, lists, numbers, texts, None.

    Raises:
      ValueError, OSError, MemoryError: what the function raised in process 0, with its message, in every process.
    """
    if count() == 1:
        return function()
    error: Exception | None = None
    if is_first():
        try:
            message: dict[str, Any] = {"value": function()}
        except (*KINDS.values(),) as raised:
            error, kind = raised, next(kind for kind in type(raised).__mro__ if kind in KINDS.values())
            message = {"error": kind.__name__, "text": str(raised)}
        _send(json.dumps(message))
    else:
        message = json.loads(_received())
    if error is not None:
        raise error
    if "error" in message:
        raise KINDS[message["error"]](message["text"])
    return message["value"]


def barrier() -> None:
    """Wait until all processes have called this."""
    if count() > 1:
        on_first(lambda: None)
        _client().wait_at_barrier(f"gpt2_jax/{next(_numbers)}", 2**31 - 1)


def _send(text: str) -> None:
    _client().key_value_set(f"gpt2_jax/{next(_numbers)}", text)


def _received() -> str:
    """Wait for the next message of process 0, for any time."""
    key = f"gpt2_jax/{next(_numbers)}"
    while True:
        try:
            return _client().blocking_key_value_get(key, WAIT_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _client() -> Any:
    """Return JAX's client of the coordination service. JAX has no public name for it."""
    from jax._src import distributed

    return distributed.global_state.client
