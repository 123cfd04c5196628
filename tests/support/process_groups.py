"""Groups of local processes that a test starts, signals, kills and waits for."""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import commands

SCRIPT = commands.ROOT / "tests" / "support" / "at_work.py"
SECONDS = 60  # for what takes a few, on a busy machine
SOON = 30  # seconds in which all processes of a run end after one of them
ENDED = "another process of this run ended: the last checkpoint is complete; start all processes again\n"
CLUSTERS = ("SLURM_", "OMPI_", "KUBERNETES_", "JAX_COORDINATOR")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until_gone(pid: int) -> None:
    """Wait for the end of a process that is not ours."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        ended = selector.select(SOON)
    os.close(descriptor)
    assert ended, f"process {pid} is still there"


class Group:
    """Processes of a script, by default at_work.py.

    Attributes:
      parents: the processes that the test started, by index.
      children, helpers: the processes that they started, {index: pid}, after `until_working`.
    """

    def __init__(self, folder: Path, script: Path = SCRIPT):
        self.script, self.pipe, self.port = script, folder / "pipe", free_port()
        os.mkfifo(self.pipe)
        self._reader = os.open(self.pipe, os.O_RDWR)  # a reader and a writer: no end of file
        self.parents: list[subprocess.Popen] = []
        self.children, self.helpers = {}, {}

    def address(self, n: int, index: int) -> list[str]:
        host = f"--processes.coordinator=127.0.0.1:{self.port}"
        return [f"--processes.count={n}", f"--processes.index={index}", host]

    def add(self, *args, **env: str) -> None:
        """Start one process."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(CLUSTERS)}
        self.parents.append(
            subprocess.Popen(
                [sys.executable, str(self.script), *map(str, args)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=clean | {"JAX_PLATFORMS": "cpu", "PIPE": str(self.pipe)} | env,
            )
        )

    def start(self, n: int, *args, **env: str) -> None:
        for index in range(n):
            self.add(*self.address(n, index), *args, **env)

    def until_working(self, n: int) -> None:
        """Wait until the processes have worked together."""
        text, deadline = "", time.monotonic() + SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(self._reader, selectors.EVENT_READ)
            while text.count("\n") < n:
                assert selector.select(deadline - time.monotonic()), text
                text += os.read(self._reader, 4096).decode()
        for line in text.splitlines():
            index, child, helper = map(int, line.split())
            self.children[index], self.helpers[index] = child, helper

    def end(self, index: int, seconds: float = SECONDS) -> commands.Run:
        out, err = self.parents[index].communicate(timeout=seconds)
        return commands.Run(self.parents[index].returncode, out, err)

    def close(self) -> None:
        for process in self.parents:
            process.kill()
            process.communicate()
        for pid in (*self.children.values(), *self.helpers.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.close(self._reader)
