"""Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 in a command. The first ends it cleanly, at any moment; a second Ctrl-C kills it.

The first signal raises `Interrupted`, so reads that wait and long loops end, and temporary files are removed. It is
also remembered, because the exception can be lost: Python discards it in a callback of the garbage collector, where
JAX has one (jax-ml/jax#18246), and some libraries turn it into another error. A discarded one is raised again a moment
later, `check` raises a lost one, and a command that fails after a signal reports no error. In the middle of an import
it is raised when the import ends: modules written in C crash if their initialization fails half-way.

A second Ctrl-C must work while XLA compiles or computes, when no Python code of the main thread runs. So a thread
watches for it: it reads a pipe that gets a byte for each signal, and one for each call of `forget`, in their order.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

HANDLED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
SAME = 0.1  # seconds; wrappers such as `npm run` send Ctrl-C a second time at once, which is not a second Ctrl-C
AGAIN = 0.05  # seconds until a discarded or postponed exception is raised
FORGOTTEN = 0  # the byte that `forget` sends to the watching thread; no signal has this number
LONGEST_IMPORT = 3.0  # seconds; after these, the process ends without removing temporary files
CLEANUP = 2.0  # seconds that the handler of a training run has after its second Ctrl-C


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end.

    Attributes:
      signal: its number.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number


class _State:
    """The signals so far."""

    received: int | None = None  # the first one
    time: float = 0  # when it came
    ctrl_c: float | None = None  # when the first Ctrl-C came
    writer: int | None = None  # the end of the watching thread's pipe that is written to


def install() -> None:
    """Handle these signals from now on. A signal that is ignored stays ignored, as in a shell's background job."""
    if threading.current_thread() is not threading.main_thread():
        return  # Python delivers signals to the main thread only
    if "IPython" in sys.modules or hasattr(sys, "ps1"):
        return  # `%run scripts/generate.py`: the process continues
    discarded = sys.unraisablehook

    def unraisable(args: Any) -> None:
        if not isinstance(args.exc_value, Interrupted):
            discarded(args)
        else:
            _raise_later()

    sys.unraisablehook = unraisable
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, lambda number, frame: _raise(frame))
    for number in HANDLED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)
    if hasattr(os, "register_at_fork"):  # not on Windows
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        _State.writer = writer
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are not ours
        threading.Thread(target=_watch, args=(reader,), daemon=True).start()


def remove() -> None:
    """Let signals end the process at once, without a message: the work is done.

    The timer of a postponed exception is ignored. Python removes its handler when it ends. The timer would then kill
    the process.
    """
    if threading.current_thread() is threading.main_thread():
        if hasattr(signal, "SIGALRM"):
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
        for number in HANDLED:
            if signal.getsignal(number) is _handle:
                signal.signal(number, signal.SIG_DFL)


def received() -> int | None:
    """Return the number of the signal that came first, or None."""
    return _State.received


def check() -> None:
    """Raise `Interrupted` if a signal came. Call it between two parts of a long task."""
    if _State.received is not None:
        raise Interrupted(_State.received)


def forget() -> None:
    """Forget a Ctrl-C that did what the user wanted, such as to stop one sample. The next one is the first again."""
    _State.received = _State.ctrl_c = None
    if _State.writer is not None:  # the watching thread may read the bytes of the forgotten ones only now
        with contextlib.suppress(OSError):
            os.write(_State.writer, bytes([FORGOTTEN]))


def leave(status: int) -> NoReturn:
    """End the process without Python's own cleanup, which may fail or wait after an interrupted import."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or nobody reads it
            stream.flush()
    os._exit(status)


def _raise(frame: FrameType | None) -> None:
    """Raise `Interrupted`, but not in the middle of an import."""
    if _State.received is None:
        return
    while frame is not None and frame.f_globals.get("__name__") != "importlib._bootstrap":
        frame = frame.f_back
    if frame is None:
        raise Interrupted(_State.received)
    if time.monotonic() - _State.time > LONGEST_IMPORT:
        leave(128 + _State.received)
    _raise_later()


def _raise_later() -> None:
    if hasattr(signal, "setitimer"):  # not on Windows, where `check` raises it
        signal.setitimer(signal.ITIMER_REAL, AGAIN)


def _handle(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _State.received is None:
        _State.received, _State.time = number, now
        _State.ctrl_c = now if number == signal.SIGINT else None
        _raise(frame)
    elif number == signal.SIGINT and not hasattr(os, "register_at_fork") and now - (_State.ctrl_c or 0) > SAME:
        _kill()


def _watch(reader: int) -> None:
    """Kill the process at its second Ctrl-C since the last `forget`."""
    first = None  # when the first one was read
    while True:
        for number in os.read(reader, 64):
            now = time.monotonic()
            if number == FORGOTTEN:
                first = None
            elif number != signal.SIGINT:
                continue
            elif first is None:
                first = now
            elif now - first > SAME:
                if signal.getsignal(signal.SIGINT) is not _handle:  # a training run ends by itself, if it can
                    time.sleep(CLEANUP)
                _kill()


def _kill() -> NoReturn:
    with contextlib.suppress(OSError):
        if os.isatty(2):
            os.write(2, b"\x1b[?25h\n")  # a progress bar hides the cursor
    os._exit(128 + signal.SIGINT)
