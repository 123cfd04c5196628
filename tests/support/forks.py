"""Child processes that tests kill at any point. One process imports the modules once and forks a child for each call.

A module of this folder, killed_NAME.py, defines `work(say, **request)`, which a child runs, and calls `serve(work)`.
A test starts it with `Forks("killed_NAME")`, and calls the result. This module does not import JAX.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Container
from pathlib import Path
from typing import NamedTuple

CHANGES = ("mkdir", "rename", "remove", "rmdir", "link", "symlink", "chmod", "truncate")
OPERATIONS = {"open", *(f"os.{name}" for name in CHANGES)}


class Ended(NamedTuple):
    """How a child ended: its messages, the seconds since the first one, and the rest if it was not killed."""

    killed: bool
    said: list
    seconds: float
    operations: int | None = None
    error: str = ""
    kinds: tuple[str, ...] = ()


# ---- in the test


class Forks:
    """The process that forks, as a context manager. `arguments` is the module's command line."""

    def __init__(self, module: str, *arguments, **env: str):
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(Path(__file__).with_name(f"{module}.py")), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"} | env,
        )
        self._told = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._told.put(json.loads(line))
        self._told.put(None)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.process.stdin.close()
        if error != (None, None, None):
            self.process.kill()  # it may wait for a child that is not killed any more
        self._reader.join()
        self.process.stdout.close()
        self.process.wait()

    def __call__(
        self,
        *,
        operation: int | None = None,
        delay: float | None = None,
        until: Callable[[list], bool] | None = None,
        folder: Path | str = "",
        **request,
    ) -> Ended:
        """Fork a child with the request, and wait for its end.

        Args:
          operation: kill it before this operation on files, counted from 0 at its first message.
          delay: kill it this many seconds after its first message.
          until: kill it when this function of its messages is true. It is called every millisecond.
          folder: opening a file counts only if its path begins with this. Other operations always count.
          request: the JSON arguments of `work`.
        """
        print(json.dumps([operation, str(folder), request]), file=self.process.stdin, flush=True)
        child = self._next(None)[1]
        start, said, result = None, [], []
        while True:
            now = time.perf_counter()
            left = None if delay is None or start is None else max(0, start + delay - now)
            if left == 0 or (until and until(said)):
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(child, signal.SIGKILL)
                delay = until = left = None
            told = self._next(0.001 if until else left)
            if told is None:
                continue
            kind, value = told
            if kind == "said":
                start = start or time.perf_counter()
                said.append(value)
            elif kind == "result":
                result = value
            else:
                return Ended(value, said, now - (start or now), *result)

    def _next(self, seconds: float | None):
        """Return the next message, or None after the timeout."""
        try:
            told = self._told.get(timeout=seconds)
        except queue.Empty:
            return None
        assert told is not None, "the process that forks has died"
        return told


# ---- in the process that forks, and in its children


def serve(work: Callable, operations: Container[str] = OPERATIONS, lines_of: Container[str] = ()) -> None:
    """Fork a child for each line on standard input. It runs `work(say, **request)`. `say` takes JSON values.

    These audit events of Python count as operations, and also reaching a line of the files `lines_of`.
    """
    told = os.dup(1)
    os.dup2(2, 1)  # printed output must not mix with the messages
    for line in sys.stdin:
        operation, folder, request = json.loads(line)
        if not (child := os.fork()):
            _Child(told, operation, folder, operations, lines_of).run(work, request)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0, status
        _tell(told, "ended", os.WIFSIGNALED(status))


def _tell(pipe: int, kind: str, value) -> None:
    os.write(pipe, json.dumps([kind, value]).encode() + b"\n")


class _Child:
    """Counts operations after the first message, and kills the process before number `last`."""

    def __init__(self, told, last: int | None, folder: str, operations: Container[str], lines_of: Container[str]):
        self.told, self.last, self.folder = told, last, folder
        self.operations, self.lines_of = operations, lines_of
        self.n_operations, self.counts = 0, False

    def run(self, work: Callable, request: dict) -> None:
        """Do the work. Never returns."""
        error, kinds = "", ()
        _tell(self.told, "forked", os.getpid())
        sys.addaudithook(self.hook)
        try:
            work(self.say, **request)
        except BaseException as caught:
            error, kinds = f"{type(caught).__name__}: {caught}", [kind.__name__ for kind in type(caught).__mro__]
        self.counts = False
        sys.settrace(None)
        _tell(self.told, "result", [self.n_operations, error, kinds])
        os._exit(0)

    def say(self, value=None) -> None:
        """Send a message to the test. The first call starts the count of operations and the clock."""
        _tell(self.told, "said", value)
        if not self.counts and self.lines_of:
            sys.settrace(self.trace)
        self.counts = True

    def hook(self, event: str, arguments) -> None:
        elsewhere = event == "open" and not str(arguments[0]).startswith(self.folder)
        if self.counts and event in self.operations and not elsewhere:
            self.step()

    def trace(self, frame, event, argument):
        if frame.f_code.co_filename not in self.lines_of:
            return None
        if event == "line":
            self.step()
        return self.trace

    def step(self) -> None:
        if self.n_operations == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.n_operations += 1
