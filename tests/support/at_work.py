"""A command whose processes work together until they are stopped. test_processes.py starts and kills them.

It does not import JAX until it works. After the first round each process writes "INDEX PID HELPER" into the pipe
$PIPE: its number, its own process and one that it has started.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys

from gpt2_jax.commands import _command, _processes, _supervisor, start


@dataclasses.dataclass
class Args:
    """Work together."""

    processes: _processes.Processes = dataclasses.field(default_factory=_processes.Processes)
    rounds: int = 10**9
    agree: bool = True
    """Stop together after a signal to any of them, as a training run. Otherwise a signal ends one process."""
    fail: str = ""
    """Processes that fail in round 3, and how: "1 ValueError", "1 crash". "01 ValueError": 1 after 0."""


def run(args: Args) -> int:
    print("ordinary message", file=sys.stderr)
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from gpt2_jax.training.signals import stopping

    index, total, helper = jax.process_index(), 0, None
    with stopping() if args.agree else contextlib.nullcontext(False) as stop:
        for i in range(args.rounds):
            if i == 3 and str(index) in args.fail:
                if index and args.fail.startswith("0"):
                    open(os.environ["TURN"]).close()  # noqa: PTH123  waits until the test opens this pipe
                fail(args.fail.split()[1])
            flags = multihost_utils.process_allgather(np.array([bool(stop), 1]))
            total += flags.reshape(-1, 2)[:, 1].sum()
            if i == 0 and "PIPE" in os.environ:
                helper = subprocess.Popen(["sleep", "600"])
                with open(os.environ["PIPE"], "w") as pipe:  # noqa: PTH123
                    pipe.write(f"{index} {os.getpid()} {helper.pid}\n")
            if flags.reshape(-1, 2)[:, 0].any():
                break
    if helper:
        helper.kill()
    print(total)
    return 128 + signal.SIGTERM if i < args.rounds - 1 else 0


def fail(how: str):
    if how == "crash":
        os.write(2, b"last words of C++\n")
        os.kill(os.getpid(), signal.SIGSEGV)
    raise {"ValueError": ValueError, "RuntimeError": RuntimeError}[how]("wrong")


def main():
    _command.call("gpt2-train", Args, run, again="the last checkpoint is complete; start all processes again")


if __name__ == "__main__":
    _supervisor.GRACE = float(os.environ.get("GRACE", _supervisor.GRACE))
    _processes.HEARTBEAT = int(os.environ.get("HEARTBEAT", _processes.HEARTBEAT))
    sys.modules["gpt2_jax.commands.at_work"] = sys.modules["__main__"]
    start.MAINS["at_work"] = "at_work.main"
    start._run("at_work")
