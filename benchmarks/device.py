"""Measure this library on a GPU or TPU in one command of a few minutes: a first hour on a device, without anyone there.

COMMAND: python benchmarks/device.py [--output DIR] [--minutes 8] [--parts decode-124M train-124M] [--tiny]

Needs Linux. Needs neither TensorFlow, tyro nor Grain. Each part runs in its own process with a time limit, so one that
crashes, hangs or runs out of memory does not affect the others. Every row of a table is written to DIR at once:

    DIR/summary.md        all tables, and how each part ended; written again after each part
    DIR/parts/NAME.md     the tables of a part; NAME.json has its main figures
    DIR/logs/NAME.txt     what the part's process printed

The exit status is 0 if all parts ran or were skipped for lack of time, 1 if one failed, and 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import importlib
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

from device_tools import FAILED, Job
from turns import ENVIRONMENT

MINUTES = 8.0  # the default budget, for which the limits below are made; they grow with a larger one
RESERVE = 3.0  # seconds of the budget that no part gets: for the end of the last process, and for the summary
SOFT = 0.9  # share of a part's time after which it begins no new case
MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}  # a part has the device alone
DETERMINISTIC = {"XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the measurements.

    Attributes:
      name: its name, in options and files.
      call: "module:function" of this folder; the function takes a Job.
      limit: seconds after which its process is killed, in a budget of MINUTES.
      least: seconds that must be left for it to begin.
      about: what it measures.
      environment: environment variables of its process; XLA_FLAGS is added to what is set.
    """

    name: str
    call: str
    limit: float
    least: float
    about: str
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


PARTS = (  # by worth: what comes last is skipped first
    Part("environment", "device_speed:environment", 60, 15, "versions, bandwidth, rate of matrix products"),
    Part("checks", "device_checks:checks", 60, 20, "float32 logits and greedy ids of the embedded model"),
    Part("decode-124M", "device_speed:decode_124M", 90, 30, "milliseconds a token at 1, 8 and 64 rows, bfloat16"),
    Part("train-124M", "device_training:train_124M", 120, 40, "training steps: MFU and memory"),
    Part("decode-1558M", "device_speed:decode_1558M", 120, 50, "as decode-124M, at 1558M"),
    Part("train-1558M", "device_training:train_1558M", 180, 60, "as train-124M, at 1558M with rematerialization"),
    Part("prefill", "device_speed:prefill", 100, 30, "prompts of 1,023 tokens, both sizes"),
    Part("fidelity", "device_checks:fidelity", 120, 30, "rounding against float64; one row among many"),
    Part("resume", "device_training:resume", 60, 30, "whether a resumed run equals an uninterrupted one"),
    Part("torch", "device_peers:torch_beside", 150, 60, "Hugging Face torch, if it is installed"),
    Part("resume-deterministic", "device_training:resume", 60, 30, "with deterministic operations", DETERMINISTIC),
    Part("tests", "device_checks:tests", 150, 60, "some of this repository's tests, if pytest is installed"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a part ended: "ran", "failed" or "skipped", after how many seconds, and why."""

    name: str
    result: str
    seconds: float
    why: str = ""


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    listed = "\n".join(f"  {part.name:<22}{part.about}; at most {part.limit:.0f} s" for part in PARTS)
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=f"parts, in order:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("device-results"), metavar="DIR", help="folder (default: device-results)")
    add("--minutes", type=float, default=MINUTES, help="the whole command ends within this time (default: 8); with "
        "more, the limits of the parts grow in proportion")  # fmt: skip
    add("--parts", nargs="+", choices=[part.name for part in PARTS], help="only these (default: all)", metavar="NAME")
    add("--tiny", action="store_true", help="tiny shapes, to try the command on a CPU")
    add("--child", help=argparse.SUPPRESS)  # run this one function, in this process
    add("--name", help=argparse.SUPPRESS)
    add("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if not 0 < args.minutes < 1e6:
        parser.error("--minutes must be more than 0")
    try:
        for folder in ("parts", "logs"):
            (args.output / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output: {error}")
    return args


def run(parts: Sequence[Part], args: argparse.Namespace) -> int:
    """Run the parts, each in its own process, within the budget; return the exit status."""
    begin = time.monotonic()
    end = begin + args.minutes * 60
    outcomes: list[Outcome] = []
    for part in parts:  # an older result must not pass for one of this run
        for suffix in ("md", "json"):
            (args.output / "parts" / f"{part.name}.{suffix}").unlink(missing_ok=True)

    def progress(line: str) -> None:
        now = time.monotonic()
        print(f"[{now - begin:4.0f} s, {max(0, end - now):4.0f} s left] {line}", file=sys.stderr, flush=True)

    for part in parts:
        left = end - RESERVE - time.monotonic()
        seconds = min(part.limit * max(1, args.minutes / MINUTES), left)
        if left < part.least:
            why = f"it needs {part.least:.0f} s or more, and {max(0, left):.0f} s were left"
            last = Outcome(part.name, "skipped", 0, why)
        else:
            progress(f"{part.name}: begins, at most {seconds:.0f} s")
            try:
                last = attempt(part, seconds, args)
            except BaseException:  # Ctrl-C or SIGTERM: what the part measured so far is kept
                stopped = Outcome(part.name, "failed", time.monotonic() - begin, "the command was stopped")
                write_summary(args.output, [*outcomes, stopped], args)
                raise
        outcomes.append(last)
        progress(f"{part.name}: {last.result} after {last.seconds:.0f} s{': ' * bool(last.why)}{last.why}")
        write_summary(args.output, outcomes, args)
    print((args.output / "summary.md").read_text(encoding="utf-8"), flush=True)
    return int(any(outcome.result == "failed" for outcome in outcomes))


def attempt(part: Part, seconds: float, args: argparse.Namespace) -> Outcome:
    """Run one part in a new process; kill it, and all processes that it started, when its time is over."""
    begin = time.monotonic()
    log = args.output / "logs" / f"{part.name}.txt"
    command = [sys.executable, str(Path(__file__).resolve()), "--output", str(args.output), "--child", part.call]
    command += ["--name", part.name, "--until", str(begin + SOFT * seconds), *["--tiny"] * args.tiny]
    environment = os.environ | MEMORY | ENVIRONMENT | part.environment
    if "XLA_FLAGS" in part.environment:
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {part.environment['XLA_FLAGS']}".strip()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill(process)
    took = time.monotonic() - begin
    if code == 0:
        return Outcome(part.name, "ran", took)
    return Outcome(part.name, "failed", took, why_failed(code, seconds, args.output, part.name))


def kill(process: subprocess.Popen) -> None:
    """Kill a process and its group, which outlives it if a process of the group still runs."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may keep it for a while
        process.wait(RESERVE / 2)


def why_failed(code: int | None, seconds: float, folder: Path, name: str) -> str:
    """Return why a part failed, in one line: what it wrote itself, or else the last line that its process printed."""
    if code is None:
        return f"killed at its limit of {seconds:.0f} s"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; memory may have run out"
    table, log = folder / "parts" / f"{name}.md", folder / "logs" / f"{name}.txt"
    written = table.read_text(encoding="utf-8").splitlines() if table.is_file() else []
    if failed := [line.removeprefix(FAILED) for line in written if line.startswith(FAILED)]:
        return " ".join(failed)
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), f"exit status {code}, without a message")[:500]


def write_summary(folder: Path, outcomes: Sequence[Outcome], args: argparse.Namespace) -> None:
    """Write DIR/summary.md: how each part ended, and all tables so far."""
    words = [f"--minutes {args.minutes:g}", *["--tiny"] * args.tiny]
    words += [f"--parts {shlex.join(args.parts)}"] if args.parts else []
    lines = ["# Measurements on a device", "", f"    python benchmarks/device.py {' '.join(words)}", ""]
    now = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    lines += [f"{now} UTC, Python {platform.python_version()}, {versions()}."]
    if args.tiny:
        lines += ["", "**Shapes are tiny: these figures show only that the command works.**"]
    lines += ["", "| part | outcome | seconds | why |", "|---|---|---|---|"]
    for outcome in outcomes:
        why = outcome.why.replace("|", "\\|")
        lines.append(f"| {outcome.name} | {outcome.result} | {outcome.seconds:.0f} | {why} |")
    for outcome in outcomes:
        path = folder / "parts" / f"{outcome.name}.md"
        text = path.read_text(encoding="utf-8").strip() if path.is_file() else "No table."
        lines += ["", f"## {outcome.name}", "", text]
    path = folder / "summary.md"
    path.with_suffix(".new").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.with_suffix(".new").replace(path)  # a reader, or a cut, finds a whole file


def versions() -> str:
    """Return the versions of the libraries, without importing them."""
    found = []
    for name in ("jax", "jaxlib", "flax", "optax", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def child(args: argparse.Namespace) -> NoReturn:
    """Run one part in this process, which ends when its parent does."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    module, function = args.child.split(":")
    job = Job(args.output, args.name, args.tiny, args.until)
    job.each({args.name: lambda: getattr(importlib.import_module(module), function)(job)})
    status = job.finish()
    sys.stdout.flush()
    os._exit(status)  # a driver that hangs when the interpreter ends cannot hold the results up


def main() -> int:
    """Run all parts, or, in a process that this command started, one part."""
    args = parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # gpt2_jax, if it is not installed
    if args.child:
        child(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running part is killed too
    chosen = [part for part in PARTS if args.parts is None or part.name in args.parts]
    return run(chosen, args)


if __name__ == "__main__":
    sys.exit(main())
