"""Signals as a request that is checked between steps, so that a run ends with everything saved.

SIGINT is Ctrl-C. SIGTERM and SIGUSR1 come from a batch system before its time limit (`sbatch --signal=USR1@60`), and
SIGHUP comes when a terminal or a connection closes. A signal that is ignored at the start stays ignored, as `nohup` and
a shell's background job want it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # Windows has only the first two


class Stop:
    """Whether the run should end, and because of which signal.

    Attributes:
      signal: the name of the first one, for example "SIGINT"; None if no signal came.
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
        self.signal = self.signal or signal.Signals(number).name


@contextlib.contextmanager
def stopping(stop: Stop | None = None) -> Iterator[Stop]:
    """Give `stop` (None is a new `Stop`), which the first signal of NAMES sets.

    A second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread no signal sets it, because Python delivers
    none there.
    """
    stop, before = Stop() if stop is None else stop, {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, stop._note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            if handler is not None:  # a handler not set from Python cannot be restored
                signal.signal(number, handler)
