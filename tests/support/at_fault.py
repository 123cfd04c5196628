"""Runs the command $COMMAND. What $FAULT says goes wrong in the process with index $AT, once it is connected."""

import os
import resource
import sys

from gpt2_jax.commands import _processes, start

LARGEST = 60_000  # bytes of a file on the small disk: the vocabulary's are smaller, a checkpoint's are not


def small_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def fails(error, owner, name, call=1):
    """Let the n-th call of a function raise an error."""
    function, calls = getattr(owner, name), []

    def changed(*args, **named):
        calls.append(None)
        if len(calls) == call:
            raise error
        return function(*args, **named)

    setattr(owner, name, changed)


def go_wrong(fault):
    """Import what JAX needs only now."""
    from gpt2_jax.training import loop, observer, report

    kind = report.Silence if int(os.environ["AT"]) else report.Report
    {
        "disk": small_disk,
        "step": lambda: fails(OSError(5, "cannot write"), kind, "step", call=3),
        "bug": lambda: fails(RuntimeError("a bug"), kind, "step", call=3),
        "bug in samples": lambda: fails(RuntimeError("a bug"), observer.Observer, "_write_samples"),
        "samples": lambda: fails(OSError(28, "no space"), observer.Observer, "_write_samples"),
        "picture": lambda: fails(OSError(28, "no space"), loop, "plot_curve"),
    }[fault]()


def main():
    connect = _processes._connect

    def connected(processes):
        connect(processes)
        if "FAULT" in os.environ and str(_processes._State.index) in os.environ["AT"]:
            go_wrong(os.environ["FAULT"])

    _processes._connect = connected
    start._run(os.environ["COMMAND"])


if __name__ == "__main__":
    sys.modules["at_fault"] = sys.modules["__main__"]
    main()
