"""Several processes of JAX that work on one thing: who is first, and how they agree.

`jax.distributed.initialize` connects the processes. After it, every process sees all devices, and all of them must call
the same compiled programs in the same order. Files are written by process 0. What one process reads, and what decides
which programs run, must come from process 0 to all of them. These functions send it through JAX's coordination service,
without a compiled program. All processes must call them, in the same order.

With one process, they do nothing, and import nothing.

Generation and evaluation need no program that spans the processes: they divide their prompts and texts by a `Share`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

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


FAILED = "failed"
PATIENCE = 1.0  # seconds between two looks at whether another process has failed


class PeerError(OSError):
    """Another process has failed, so this one cannot go on."""


class Link(Protocol):
    """Texts under names, which several processes share."""

    def put(self, name: str, text: str) -> None:
        """Put a text under a new name."""
        ...

    def get(self, name: str, seconds: float) -> str | None:
        """Wait for a text, at most so long. Return None if it is not there then."""
        ...

    def delete(self, name: str) -> None:
        """Delete a text."""
        ...


@dataclasses.dataclass(frozen=True)
class Share:
    """The share of one process in work that several divide among them.

    All processes have the same list of work, and each does its own elements of it. No compiled program spans them.

    Attributes:
      index: the index of this process, from 0.
      count: the number of processes.
      link: carries results and errors from each process to the others; None if nothing connects them.
    """

    index: int = 0
    count: int = 1
    link: Link | None = None
    _numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count, compare=False, repr=False)

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """Return the elements for this process: every `count`-th. So neighbours, often of one size, are divided."""
        return items[self.index :: self.count]

    def gather(self, function: Callable[[], T]) -> list[T]:
        """Call a function in each process, and return the results of all in every process, by index.

        All processes must call this, in the same order.

        Args:
          function: takes nothing and returns JSON values.

        Raises:
          PeerError: another process has failed in a block of `telling`, or its function has failed.
          ValueError: there are several processes, and nothing connects them.
        """
        if self.count == 1:
            return [function()]
        if self.link is None:
            raise ValueError("processes that exchange results must be connected: call jax.distributed.initialize first")
        number = next(self._numbers)
        with self.telling():
            own = function()
        self.link.put(f"{number}/{self.index}", json.dumps(own))
        results = [own if i == self.index else json.loads(self._wait(f"{number}/{i}")) for i in range(self.count)]
        if number:  # all processes have put this one's results, so they have read the last one's
            self.link.delete(f"{number - 1}/{self.index}")
        return results

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the other processes if this block fails: their `gather` and `check` raise a PeerError."""
        try:
            yield
        except BaseException as error:
            if self.link is not None and not isinstance(error, PeerError):
                what = "was interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {error}"
                with contextlib.suppress(Exception):  # told before, or there is nobody left to tell
                    self.link.put(FAILED, f"the process with index {self.index} {what}")
            raise

    def check(self) -> None:
        """Raise a PeerError if another process has failed."""
        if self.link is not None and (text := self.link.get(FAILED, 0)) is not None:
            raise PeerError(text)

    def _wait(self, name: str) -> str:
        """Wait for a text, for any time, unless a process fails."""
        assert self.link is not None
        while (text := self.link.get(name, PATIENCE)) is None:
            self.check()
        return text


def share() -> Share:
    """Return the share of this process. It is all the work, unless `jax.distributed.initialize` connects several."""
    return _share_of_jax() if jax.distributed.is_initialized() else Share()


@functools.cache
def _share_of_jax() -> Share:
    return Share(jax.process_index(), count(), _Service() if count() > 1 else None)


class _Service:
    """A Link through JAX's coordination service."""

    def put(self, name: str, text: str) -> None:
        _client().key_value_set(f"gpt2_jax/share/{name}", text)

    def get(self, name: str, seconds: float) -> str | None:
        name = f"gpt2_jax/share/{name}"
        try:
            if not seconds:
                return _client().key_value_try_get(name)
            return _client().blocking_key_value_get(name, round(1000 * seconds))
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error) or "DEADLINE_EXCEEDED" in str(error):
                return None
            raise

    def delete(self, name: str) -> None:
        _client().key_value_delete(f"gpt2_jax/share/{name}")
