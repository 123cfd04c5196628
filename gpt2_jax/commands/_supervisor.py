"""The parent of a command that is one of several processes. It does not import JAX."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from typing import IO

from gpt2_jax.commands import _command, _processes

GRACE = 60.0  # seconds from SIGTERM to the end: a training run saves a checkpoint, with the other processes
UNCONNECTED_GRACE = 3.0  # the same before the processes are connected: the child waits, and has nothing to save
ABORTED = "JAX distributed service detected fatal errors"  # JAX's message when it aborts a process
TAIL = 4000  # characters of the log


class _Child:
    """The command, run again in a process group of its own, so that Ctrl-C reaches it once, from its parent.

    Attributes:
      received: the first signal that was forwarded to it.
      killed: whether it was killed because it did not end after a signal.
    """

    def __init__(self, log: IO[bytes]):
        self.log, self.received, self.killed = log, 0, False
        self.process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Run it to its end. Return its exit status, or minus the signal that ended it."""
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._forward)
        signal.signal(signal.SIGALRM, self._kill)
        signal.signal(signal.SIGTSTP, self._pause)
        reader, _writer = os.pipe()  # the writer closes when this process ends
        inherited = reader, self.log.fileno()
        self.process = subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]],
            env=os.environ | {_processes.CHILD: "{},{}".format(*inherited)},
            pass_fds=inherited,
            process_group=0,
        )
        os.close(reader)
        if self.received:
            self._forward(self.received)
        status = self.process.wait()
        signal.setitimer(signal.ITIMER_REAL, 0)
        if status:
            self._send_to_group(signal.SIGKILL)  # processes that it started, and has not ended
        return status

    def text(self) -> str:
        """Return the log: messages of C++ code, and notes."""
        self.log.flush()
        size = os.fstat(self.log.fileno()).st_size
        return os.pread(self.log.fileno(), size, 0).decode(errors="replace")

    def _forward(self, number: int, _frame: object = None) -> None:
        self.received = self.received or number
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)
        connected = f"{_processes.NOTE}connected" in self.text()
        if connected and number == signal.SIGINT:
            return  # a second Ctrl-C ends the child at once
        if not signal.getitimer(signal.ITIMER_REAL)[0]:
            signal.setitimer(signal.ITIMER_REAL, GRACE if connected else UNCONNECTED_GRACE)

    def _kill(self, _number: int, _frame: object) -> None:
        self.killed = True
        self._send_to_group(signal.SIGKILL)

    def _pause(self, _number: int, _frame: object) -> None:
        """Stop with the child at Ctrl-Z, and continue with it."""
        self._send_to_group(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._send_to_group(signal.SIGCONT)

    def _send_to_group(self, number: int) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # none is left; on macOS, the second
                os.killpg(self.process.pid, number)


def supervise(prog: str, processes: _processes.Processes, again: str) -> int:
    """Run this command again as a child, and return its exit status.

    SIGTERM, SIGHUP, SIGUSR1 and SIGINT are forwarded. A child that does not end is killed 60 seconds after one of the
    first three, or 3 seconds after any of them if the processes are not connected yet. A child whose parent is
    killed is killed, too.

    Args:
      prog: the command's name.
      processes: its options.
      again: what to do after another process has ended.

    Returns:
      the child's status; 75 if another process ended or did not connect; 128 + signal after a signal.
    """
    with tempfile.TemporaryFile(buffering=0) as log:
        child = _Child(log)
        status = child.run()
        text = child.text()
    if noted := re.search(rf"^{_processes.NOTE}status (\d+)$", text, re.MULTILINE):
        status = int(noted[1])  # JAX may have aborted the child in the middle of its end
    connected = re.search(rf"^{_processes.NOTE}connected (\d+)$", text, re.MULTILINE)
    name = _processes.named(prog, int(connected[1]) if connected else processes.index)
    message = _message(child, status, processes, connected is not None, ABORTED in text, again)
    if message is None:
        return status
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h\n")  # a progress bar hides the cursor
    if status < 0 and not child.killed and ABORTED not in text:
        sys.stderr.write(text[-TAIL:])
    if message:
        _command.report(name, message)
    if child.received:
        return 128 + child.received
    return 128 - status if status < 0 and ABORTED not in text else _processes.TEMPFAIL


def _message(
    child: _Child, status: int, processes: _processes.Processes, connected: bool, aborted: bool, again: str
) -> str | None:
    """Return the sentence for an end that the child did not report itself, "" for no sentence; None for others."""
    if child.killed:
        return f"killed, because it did not end after {signal.Signals(child.received).name}"
    if connected and (status == _processes.TEMPFAIL or (status < 0 and aborted)):
        return f"another process of this run ended: {again}"
    if status >= 0:
        return None
    if aborted:
        where = "" if processes.auto else f" of {processes.coordinator}"
        late = f"not all processes connected to the coordinator{where} within {processes.timeout} s"
        return f"{late}: {_processes.AGAIN}"
    return "" if -status == child.received else f"ended by {signal.Signals(-status).name}"
