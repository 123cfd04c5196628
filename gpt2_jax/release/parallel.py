"""Several transfers at once. The first error stops them all."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Sequence

from gpt2_jax.release.transfer import Stopped

GRACE = 1.0  # seconds to wait for threads that are still writing after the stop


def in_threads(tasks: Sequence[Callable[[], None]], jobs: int, stop: threading.Event) -> None:
    """Run the tasks, `jobs` at once. The first error, or Ctrl-C, stops them all and is raised."""
    waiting, errors = collections.deque(tasks), []

    def work() -> None:
        with contextlib.suppress(IndexError, Stopped):
            while not stop.is_set():
                task = waiting.popleft()
                try:
                    task()
                except Stopped:
                    raise
                except BaseException as error:
                    errors.append(error)
                    stop.set()

    # Daemon threads: a thread that waits for a server must not keep the process alive. After `stop`, it writes nothing.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(jobs, len(tasks)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not stop.is_set():
                thread.join(0.1)
    finally:
        stop.set()
        deadline = time.monotonic() + GRACE
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
    if errors:
        raise errors[0]
