"""Trains in several processes, kills one of them at a random moment, and starts all again, until the run is done.

    python tests/support/killed_processes.py FOLDER --kills 20 --seed 1

A run that is done begins again in another folder. A table of all kills goes to standard output.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from process_groups import SOON, free_port, until_gone
from tiny_runs import TEXT, records

ROOT = Path(__file__).resolve().parents[2]
TEMPFAIL = 75
LONGEST = 240  # seconds of a whole run; two cores may have much else to do
N_STEPS = 36
OPTIONS = (
    "--model.source= --model.tokenizer=shakespeare --model.n-ctx=13 --model.n-embd=12 --model.n-head=3 "
    f"--model.n-layer=1 --model.dropout=0.2 --steps={N_STEPS} --batch-size=8 --accumulate=2 --data.n-tokens=11 "
    "--optimizer.learning-rate=0.003 --monitor.evaluate-every=10 --monitor.save-every=4 --monitor.sample-every=0 "
    "--monitor.no-tensorboard --processes.timeout=20"
)


class Kill(NamedTuple):
    """One kill.

    Attributes:
      victim: for example "child 1", or "parent 0".
      after: seconds from the start of the processes to the kill.
      before, step: the newest checkpoints before the kill, and when all had ended. 0 is none.
      seconds: from the kill to the end of the last process.
      statuses: of all parents.
      errors: what each wrote to standard error.
    """

    victim: str
    after: float
    before: int
    step: int
    seconds: float
    statuses: list[int]
    errors: list[str]


class Trainer:
    """Trains in `n` processes of two devices."""

    def __init__(self, base: Path, n: int = 2):
        base.mkdir(parents=True, exist_ok=True)
        self.base, self.n = base, n
        (base / "text.txt").write_text(TEXT, encoding="utf-8")
        self.env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "JAX_COMPILATION_CACHE_DIR": str(base / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }

    @contextlib.contextmanager
    def started(self, run: Path):
        """Start all processes; yield the parents. What is left of them and of their children is killed."""
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), *OPTIONS.split()]
        command += [f"--data.path={self.base / 'text.txt'}", f"--run={run}", f"--processes.count={self.n}"]
        command += [f"--processes.coordinator=127.0.0.1:{free_port()}"]
        parents, pipes = [], {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        try:
            for index in range(self.n):
                words = [*command, f"--processes.index={index}"]
                parents.append(subprocess.Popen(words, env=self.env, text=True, errors="replace", **pipes))
            yield parents
        finally:
            for parent in parents:
                parent.kill()  # its child ends with it
                parent.communicate()

    def train(self, run: Path) -> float:
        """Train to the end. Return the seconds that it took."""
        start = time.monotonic()
        with self.started(run) as parents:
            errors = [parent.communicate(timeout=LONGEST)[1] for parent in parents]
            assert [parent.returncode for parent in parents] == [0] * self.n, errors
        return time.monotonic() - start

    def killed(self, run: Path, rng: random.Random, after: float) -> Kill | None:
        """Start the run or go on with it, and kill a random process. Return None if it was done before that."""
        with self.started(run) as parents:
            ended = _first_end(parents, after)
            there = [(f"parent {i}", parent.pid) for i, parent in enumerate(parents)]
            there += [(f"child {i}", pid) for i, parent in enumerate(parents) for pid in _children(parent.pid)]
            victim, pid = rng.choice(there)
            before = newest(run)
            if ended:
                errors = [parent.communicate(timeout=LONGEST)[1] for parent in parents]
                assert [parent.returncode for parent in parents] == [0] * self.n, errors
                return None
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            start = time.monotonic()
            errors = [parent.communicate(timeout=LONGEST)[1] for parent in parents]
            for _, one in there:
                until_gone(one)
            seconds = time.monotonic() - start
            statuses = [parent.returncode for parent in parents]
        return Kill(victim, after, before, newest(run), seconds, statuses, errors)


def _first_end(parents: list[subprocess.Popen], seconds: float) -> bool:
    """Wait so long for the end of the first of some processes. Return whether it has ended."""
    try:
        parents[0].wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def newest(run: Path) -> int:
    """The step of the newest complete checkpoint; 0 if there is none."""
    return max((int(path.name) for path in (run / "checkpoints").glob("[0-9]*")), default=0)


def faults(kill: Kill) -> list[str]:
    """What was wrong after a kill."""
    kind, victim = kill.victim.split()
    found = []
    if kill.seconds > SOON:
        found.append(f"the last process ended after {kill.seconds:.1f} s")
    if kill.step < kill.before:
        found.append(f"the checkpoint of step {kill.before} is gone: the newest is {kill.step}")
    for index, (status, error) in enumerate(zip(kill.statuses, kill.errors, strict=True)):
        if index == int(victim):
            expected = {-signal.SIGKILL} if kind == "parent" else {128 + signal.SIGKILL, 0}
        else:
            expected = {TEMPFAIL, 0}
        said = [line for line in error.splitlines() if line.startswith("train.py: ") or line.startswith("gpt2-train: ")]
        if status not in expected:
            found.append(f"process {index} ended with status {status}: {error[-500:]}")
        elif status > 0 and len(said) != 1:
            found.append(f"process {index} said: {error[-500:]}")
        if "Traceback" in error:
            found.append(f"process {index} wrote a traceback: {error[-1500:]}")
    return found


def campaign(base: Path, n_kills: int, seed: int) -> tuple[list[Kill], list[str]]:
    """Kill until there were so many kills. Return them and all faults: also runs that differ from a straight one."""
    trainer, rng = Trainer(base), random.Random(seed)
    seconds = 0.8 * trainer.train(base / "straight")  # the others find its compiled programs
    kills, found, runs = [], [], [base / "run0"]
    while len(kills) < n_kills:
        kill = trainer.killed(runs[-1], rng, rng.uniform(0, seconds))
        if kill is None:
            runs.append(base / f"run{len(runs)}")
            continue
        kills.append(kill)
        found += [f"kill {len(kills)} ({kill.victim} after {kill.after:.2f} s): {fault}" for fault in faults(kill)]
    trainer.train(runs[-1])
    for run in runs:
        if records(run) != records(base / "straight"):
            found.append(f"{run} differs from a straight run")
        if newest(run) != N_STEPS:
            found.append(f"{run} has reached step {newest(run)}")
    return kills, found


def main():
    """Kill, print a table, and end with status 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a new folder for the runs")
    parser.add_argument("--kills", type=int, default=20, help="number of kills; default: 20")
    parser.add_argument("--seed", type=int, default=1, help="of the victims and moments; default: 1")
    args = parser.parse_args()
    kills, found = campaign(args.folder, args.kills, args.seed)
    print("victim    after s  newest before  newest after  all ended after s  statuses")
    for kill in kills:
        print(
            f"{kill.victim:<9} {kill.after:7.2f}  {kill.before:13}  {kill.step:12}  {kill.seconds:17.2f}  "
            + " ".join(map(str, kill.statuses))
        )
    for fault in found:
        print(fault)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
