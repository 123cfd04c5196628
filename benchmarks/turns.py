"""Shared code of the benchmarks: properties of the machine, and libraries that take turns in their own processes."""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

SIZES = ("124M", "355M", "774M", "1558M")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # the compile time is measured
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the libraries share one GPU
}


@dataclass(frozen=True)
class Machine:
    """The machine: "cpu" or "gpu", its name, its bandwidth in bytes per second, and the available memory in bytes."""

    where: str
    name: str
    bandwidth: float
    memory: int


def where_and_name() -> tuple[str, str]:
    """Return "cpu" or "gpu", and the machine's name."""
    import jax

    device = jax.devices()[0]
    if device.platform == "gpu":
        return "gpu", device.device_kind
    return "cpu", f"{len(os.sched_getaffinity(0))} CPU cores ({platform.machine()})"


def survey() -> Machine:
    """Measure the machine."""
    import jax

    where, name = where_and_name()
    if where == "gpu":
        return Machine(where, name, copy_bandwidth(), jax.devices()[0].memory_stats()["bytes_limit"])
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return Machine(where, name, read_bandwidth(), int(available.split()[1]) * 1024)


def read_bandwidth() -> float:
    """Return bytes per second of reading 1 GiB with all cores: the best of seven."""
    import torch

    block = torch.ones(2**28)
    return block.nbytes / best_of(7, block.sum)


def copy_bandwidth() -> float:
    """Return bytes per second, read and written, of copying 4 GiB on the device: the best of seven."""
    import jax
    import jax.numpy as jnp

    copy = jax.jit(lambda x: x + 1)
    block = copy(jnp.zeros(2**30))
    return 2 * block.nbytes / best_of(7, lambda: copy(block).block_until_ready())


def best_of(n: int, call: Callable[[], Any]) -> float:
    """Return the seconds of the fastest of n calls."""
    seconds = []
    for _ in range(n):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def save_weights(source: str, random: bool, folder: Path) -> tuple[Any, Any]:
    """Write a model's float32 weights in Hugging Face's format, which every library reads; return (config, params).

    Runs on the CPU; call it in a separate process.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    import gpt2_jax

    if random:
        config = gpt2_jax.SIZES[source]
        params = gpt2_jax.init_params(config, jax.random.key(0))
    else:
        config, params = gpt2_jax.load(source, dtype="float32")
    gpt2_jax.save(folder / "hf", config, params, format="huggingface")
    return config, params


def forget_peak(where: str) -> None:
    """Reset a worker's peak memory to its present memory, on a CPU. On a GPU this is not possible."""
    if where == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the present resident memory


def peak_bytes(where: str) -> int:
    """Return a worker's peak memory in bytes: resident memory since `forget_peak`, or on a GPU its device memory."""
    if where == "cpu":
        status = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) * 1024
    if torch := sys.modules.get("torch"):
        return torch.cuda.max_memory_allocated()
    import jax

    return jax.devices()[0].memory_stats()["peak_bytes_in_use"]


def worker() -> ProcessPoolExecutor:
    """Return one new process."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def alone(call: Callable, *args: Any) -> Any:
    """Run one call in its own process, which frees all memory when it ends."""
    with worker() as pool:
        return pool.submit(call, *args).result()


class Turns:
    """Libraries that take turns, each in its own new process; `failed` says why some no longer run."""

    def __init__(self, names: Sequence[str]):
        self.pools: dict[str, Any] = {name: worker() for name in names}
        self.failed: dict[str, str] = {}
        self.begin = time.perf_counter()

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *error: object) -> None:
        for pool in self.pools.values():
            pool.shutdown()

    def take(self, turn: Callable[[str, Callable], None]) -> None:
        """Run turn(name, call) for each in order; call(function, *args) runs in that library's process."""
        for name in [name for name in self.pools if name not in self.failed]:
            try:
                turn(name, lambda *call, pool=self.pools[name]: pool.submit(*call).result())
            except BrokenProcessPool:
                self.failed[name] = "its process was killed; memory may have run out"
            except Exception as error:  # any error of a library is reported, and the others continue
                self.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]

    def rounds(self, n: int, seconds: float, turn: Callable[[str, Callable], None]) -> None:
        """Run `n` rounds; only the first round starts if more than `seconds` have passed since the start."""
        for done in range(n):
            if done == 0 or time.perf_counter() - self.begin < seconds:
                self.take(turn)


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> str:
    """Return their time divided by ours: the median over the rounds that both finished."""
    return f"{statistics.median(a / b for a, b in zip(theirs, ours, strict=False)):.2f}"


def choose(asked: list[str] | None, peers: dict[str, Any], where: str) -> tuple[list[str], list[str]]:
    """Return the peers to time, by default those for the device, and a line for each that is not installed."""
    names = asked or [name for name, peer in peers.items() if where in peer.devices]
    found = [name for name in names if importlib.util.find_spec(peers[name].package)]
    return found, [f"{name}: {peers[name].package} is not installed" for name in names if name not in found]


def add_options(parser: argparse.ArgumentParser, peers: Sequence[str], rounds: int) -> None:
    """Add the options that the benchmarks have in common."""
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="DIR", help="a checkpoint in any form; may be repeated")
    add("--random", action="append", default=[], choices=SIZES, help="random weights of this size; may be repeated")
    add("--rounds", type=int, default=rounds, help="runs of each library in each case")
    add("--case-seconds", type=float, default=600, help="no new round of a case starts after this time")
    add("--peers", nargs="+", choices=peers, help="default: those for the device that are installed")
    add("--output", type=Path, metavar="FILE.md", help="also write the table to this file")


class Report:
    """Lines that are printed at once, and also written to a file if there is one."""

    def __init__(self, path: Path | None):
        self.path, self.lines = path, []

    def say(self, line: str) -> None:
        """Add a line."""
        self.lines.append(line)
        print(line, flush=True)
        if self.path:
            self.path.write_text("\n".join(self.lines) + "\n", encoding="utf-8")

    def title(self, title: str, machine: str) -> None:
        """Write a title, the command, the machine, and the versions of the installed libraries."""
        # Folder names of this machine are left out of the command.
        words = [f"DIR/{Path(word).name}" if Path(word).is_absolute() else word for word in sys.argv[1:]]
        command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
        names = ("jax", "flax", "torch", "transformers", "ctranslate2")
        versions = [f"{name} {version(name)}" for name in names if importlib.util.find_spec(name)]
        self.say(f"# {title}\n\n    {command}\n")
        self.say(f"{machine}, Python {platform.python_version()}, {', '.join(versions)}.\n")

    def headings(self, headings: str) -> None:
        """Begin a table; `headings` are separated by bars."""
        self.say(f"| {headings} |\n|" + "---|" * (headings.count("|") + 1))
