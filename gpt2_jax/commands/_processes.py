"""Several processes that do the work of one command: the options, and what each process does at its start and end.

A command whose arguments have a field `processes: Processes` takes the options; `_command.call` does the rest. With
more than one process the command runs again, as the child of a process that does not import JAX (`_supervisor`). JAX
aborts a process whose peer is lost, from C++ code, and a process that waits for a lost peer handles no signal. The
parent turns both into one sentence and a status.

Process 0 writes ordinary messages and results. All processes report errors, with their index.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Annotated, NoReturn

import tyro

from gpt2_jax.commands import _interrupts, _streams

TEMPFAIL = 75  # EX_TEMPFAIL of sysexits.h: a scheduler may start the same command again
CHILD = "GPT2_JAX_CHILD"  # an environment variable for the child: two file descriptors
HEARTBEAT = 10  # seconds without a sign of life until JAX takes a process for dead
LONGEST_END = 86_400  # seconds that a process that has ended waits for the last one, which may write large files
TOGETHER = 3.0  # seconds that a failed process waits for the others to fail too, each with its own message
AGAIN = "start all processes again"
NOTE = "gpt2_jax: "  # begins a line of the log that the child writes for its parent
GONE = re.compile(  # in errors of JAX's operations and of its coordination service
    r"Gloo .{0,40}failed|coordination.?service|heartbeat|barrier.{0,40}(failed|timed out)"
    r"|NCCL.*(remote process|remote error|aborted)",
    re.IGNORECASE | re.DOTALL,
)
NO_CLUSTER = (
    "--processes.auto found no SLURM, Open MPI, Kubernetes or TPU pod: give --processes.count, --processes.index and "
    "--processes.coordinator"
)


@dataclasses.dataclass(frozen=True)
class Processes:
    """Several processes that work together, usually one a machine. Start the same command in each, with its index."""

    count: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Number of processes."""
    index: Annotated[int | None, tyro.conf.arg(metavar="I", help_behavior_hint="")] = None
    """Number of this process, 0 to N - 1. Process 0 writes the files, the messages and the results."""
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT", help_behavior_hint="")] = None
    """Machine of process 0, and a free port there. The same for all processes."""
    auto: bool = False
    """Take the three values above from SLURM, Open MPI, Kubernetes or a TPU pod."""
    timeout: Annotated[int, tyro.conf.arg(metavar="SECONDS")] = 300
    """Seconds to wait until all processes are connected."""

    def several(self) -> bool:
        """Check the options, and return whether there may be more than one process.

        Raises:
          ValueError: an option is wrong, missing or superfluous, or this system has no process groups.
        """
        if self.timeout < 1:
            raise ValueError(f"--processes.timeout must be 1 or more, not {self.timeout}")
        if self.auto:
            if (self.count, self.index, self.coordinator) != (1, None, None):
                raise ValueError("--processes.auto finds count, index and coordinator: leave them out")
        elif self.count < 1:
            raise ValueError(f"--processes.count must be 1 or more, not {self.count}")
        elif self.index is not None and not 0 <= self.index < self.count:
            raise ValueError(f"--processes.index must be 0 to {self.count - 1} (count - 1), not {self.index}")
        elif self.count == 1:
            return False
        else:
            self._check_address()
        if os.name != "posix":
            raise ValueError("several processes need Linux or macOS")
        return True

    def _check_address(self) -> None:
        for name in ("index", "coordinator"):
            if getattr(self, name) is None:
                raise ValueError(f"--processes.count {self.count} needs --processes.{name}")
        host, _, port = str(self.coordinator).rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
            raise ValueError(f"--processes.coordinator must be HOST:PORT, not {self.coordinator}")


class Unconnected(OSError):
    """The processes could not connect now; later they may."""


class _State:
    """This process."""

    restarts = False  # its command line starts it again
    child = False  # it runs under a parent
    connected = False  # to the other processes
    lost = False  # it has found that another process is gone
    index: int | None = None


def prepare() -> None:
    """Prepare a command's process, before anything large is imported.

    A child ends with its parent. What C++ code writes to its standard output and error goes into the parent's log.
    """
    _State.restarts = sys.orig_argv[-len(sys.argv[1:]) :] == sys.argv[1:]  # false for %run of IPython
    descriptors = os.environ.pop(CHILD, None)
    if descriptors is None:
        return
    lifeline, log = map(int, descriptors.split(","))
    os.set_inheritable(lifeline, False)
    for number in (signal.SIGTTOU, signal.SIGTTIN):  # to write to a terminal is allowed, and to read is an error
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    _streams.divert(log)
    os.close(log)
    _State.child = True


def _end_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)  # returns when no process can write to it any more
    os.killpg(os.getpgrp(), signal.SIGKILL)


def check_restart() -> None:
    """Raise ValueError unless the command line of this process starts the command again."""
    if not _State.restarts:
        raise ValueError("several processes need the command gpt2-...: in Python, call jax.distributed.initialize")


def is_child() -> bool:
    """Return whether this process runs under a parent."""
    return _State.child


def is_connected() -> bool:
    """Return whether this process is connected to others, and has to tell them that it ends."""
    return _State.connected


def named(prog: str, index: int | None = None) -> str:
    """Return the name of this process in errors, for example "gpt2-train: process 1"."""
    index = _State.index if index is None else index
    return prog if index is None else f"{prog}: process {index}"


def work(processes: Processes, function: Callable[[], int | None]) -> int | None:
    """Connect to the other processes, call the function, and wait for the others to end, too."""
    _connect(processes)
    with quiet_unless_first():
        status = function()
    import jax

    jax.distributed.shutdown()
    _State.connected = False
    return status


def _connect(processes: Processes) -> None:
    import jax

    address = {}
    if not processes.auto:
        _State.index = processes.index
        address = {"coordinator_address": processes.coordinator, "num_processes": processes.count}
        address["process_id"] = processes.index
        if processes.index == 0:
            _check_port(int(str(processes.coordinator).rpartition(":")[2]))
    try:
        jax.distributed.initialize(
            **address,
            initialization_timeout=processes.timeout,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=LONGEST_END,
        )
    except ValueError as error:
        if processes.auto and "defined" in str(error):  # of the address, the count or the index
            raise ValueError(NO_CLUSTER) from error
        raise
    except jax.errors.JaxRuntimeError as error:
        raise Unconnected(f"the processes could not connect: {error}") from error
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # JAX has put its own handler in this one's place
    from jax._src import distributed  # jax.process_index() would look for devices

    _State.connected, _State.index = True, distributed.global_state.process_id
    note(f"connected {_State.index}")


def _check_port(port: int) -> None:
    """Refuse a port that is in use. JAX's service crashes on it."""
    if "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return  # JAX listens there instead
    import errno
    import socket

    family, host = (socket.AF_INET6, "::") if socket.has_dualstack_ipv6() else (socket.AF_INET, "")
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not matter
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise Unconnected(f"port {port} of --processes.coordinator is used by another program") from error


@contextlib.contextmanager
def quiet_unless_first() -> Iterator[None]:
    """Discard ordinary output of the block in all processes but process 0. Errors are reported after the block."""
    if not _State.index:
        yield
        return
    nothing = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    with nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        yield


def peer_ended(error: BaseException | None) -> bool:
    """Return whether an error of a connected process is only the consequence of another process's end.

    Remember whether that process is gone: then nothing can be agreed with the others.
    """
    if not _State.connected:
        return False
    from gpt2_jax.processes import PeerError  # imports JAX, as this process has

    while error is not None:
        of_jax = isinstance(error, RuntimeError | ValueError) and not isinstance(error, OSError)
        _State.lost = bool(of_jax and GONE.search(str(error)))
        if _State.lost or isinstance(error, PeerError):
            return True
        error = error.__cause__ or error.__context__
    return False


def note(text: str) -> None:
    """Write a line for the parent into the log."""
    os.write(2, f"{NOTE}{text}\n".encode())


def abandon(status: int) -> NoReturn:
    """End a connected process that has failed, without Python's and JAX's cleanup, which waits for the others.

    If all processes fail for the same reason, each has time to say so. The end of this one ends the others.
    """
    note(f"status {status}")
    if not _State.lost:
        ending = threading.Thread(target=_disconnect, daemon=True)
        ending.start()
        ending.join(TOGETHER)
    _interrupts.leave(status)


def _disconnect() -> None:
    import jax

    with contextlib.suppress(Exception):
        jax.distributed.shutdown()
