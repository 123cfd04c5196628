"""Time until a command answers `--help` or reports a wrong option. It should be at most 1.5 s on an idle machine.

COMMAND: python benchmarks/help_time.py     (a few seconds)
"""

from __future__ import annotations

import dataclasses
import resource
import subprocess
import sys
import time
from pathlib import Path

import tyro

SCRIPTS = Path(__file__).parents[1] / "scripts"


@dataclasses.dataclass
class Args:
    """Print the best wall and processor time of `--help` for each script, each in a new process."""

    rounds: int = 3
    """Runs of each script; the best counts."""


def main(args: Args) -> None:
    """Measure and print a table."""
    print(f"{'script':<22} {'wall':>7} {'processor':>10}")
    for script in sorted(SCRIPTS.glob("*.py")):
        times = [measure(script) for _ in range(args.rounds)]
        wall, processor = (min(column) for column in zip(*times, strict=True))
        print(f"{script.name:<22} {wall:5.2f} s {processor:8.2f} s", flush=True)


def measure(script: Path) -> tuple[float, float]:
    """Return the wall time and the processor time in seconds."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, str(script), "--help"], stdout=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main(tyro.cli(Args))
