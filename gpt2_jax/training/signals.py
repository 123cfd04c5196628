"""Ctrl-C and SIGTERM as a request that is checked between steps, so that a run ends with everything saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class Stop:
    """Whether the run should end, and because of which signal.

    Attributes:
      signal: its name, for example "SIGINT"; None if no signal came.
    """

    def __init__(self):
        self.signal: str | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def agree(self) -> None:
        """Take over a signal that came to another process of the run. One process has no others: nothing is done."""

    def _note(self, number: int, _frame: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self.signal = signal.Signals(number).name


@contextlib.contextmanager
def stopping(stop: Stop | None = None) -> Iterator[Stop]:
    """Give `stop` (None is a new `Stop`), which the first Ctrl-C or SIGTERM sets.

    A second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread no signal sets it, because Python delivers
    none there.
    """
    stop, before = Stop() if stop is None else stop, {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop._note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            if handler is not None:  # a handler not set from Python cannot be restored
                signal.signal(number, handler)
