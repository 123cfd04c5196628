"""Ctrl-C and SIGTERM as a wish that is looked at between steps, so that a run ends with everything saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class Stop:
    """Whether the run is to end, and by which signal.

    Attributes:
      signal: its name, "SIGINT" say; None while nothing came.
    """

    def __init__(self):
        self.signal: str | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def _note(self, number: int, _frame: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self.signal = signal.Signals(number).name


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """Give a `Stop` that the first Ctrl-C or SIGTERM sets; a second Ctrl-C is a KeyboardInterrupt at once.

    Outside the main thread, where Python delivers no signals, it is never set.
    """
    stop, before = Stop(), {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop._note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            if handler is not None:  # one that was not set from Python cannot be put back
                signal.signal(number, handler)
