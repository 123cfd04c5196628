"""What the benchmarks share: a look at the machine, and libraries in processes of their own that take turns."""

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
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # what compiling takes is measured
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the libraries share one GPU
}


@dataclass(frozen=True)
class Machine:
    """Where this runs: "cpu" or "gpu", its name, its bandwidth in bytes a second, and bytes of memory to be had."""

    where: str
    name: str
    bandwidth: float
    memory: int


def survey() -> Machine:
    """Look at the machine."""
    import jax

    device = jax.devices()[0]
    if device.platform == "gpu":
        return Machine("gpu", device.device_kind, copy_bandwidth(), device.memory_stats()["bytes_limit"])
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    name = f"{len(os.sched_getaffinity(0))} CPU cores ({platform.machine()})"
    return Machine("cpu", name, read_bandwidth(), int(available.split()[1]) * 1024)


def read_bandwidth() -> float:
    """Return bytes a second of going through 1 GiB with every core: the best of seven."""
    import torch

    block = torch.ones(2**28)
    return block.nbytes / best_of(7, block.sum)


def copy_bandwidth() -> float:
    """Return bytes a second, read and written, of copying 4 GiB on the device: the best of seven."""
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
    """Write a model's float32 weights in Hugging Face's form, which every library reads, and return it.

    Runs on the CPU, in a process of its own.
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
    """Let a worker's peak begin anew with what it holds now, where that can be done."""
    if where == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now


def peak_bytes(where: str) -> int:
    """Return a worker's peak: of resident memory since `forget_peak`; on a GPU, of the device memory it took."""
    if where == "cpu":
        status = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) * 1024
    if torch := sys.modules.get("torch"):
        return torch.cuda.max_memory_allocated()
    import jax

    return jax.devices()[0].memory_stats()["peak_bytes_in_use"]


def worker() -> ProcessPoolExecutor:
    """Return one fresh process."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def alone(call: Callable, *args: Any) -> Any:
    """Run one call in a process of its own, which gives back all it took when it ends."""
    with worker() as pool:
        return pool.submit(call, *args).result()


class Turns:
    """Libraries by name, each in a fresh process, that take turns; `failed` says why some no longer do."""

    def __init__(self, names: Sequence[str]):
        self.pools = {name: worker() for name in names}
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
            except Exception as error:  # whatever a library raises: it is told, and the others go on
                self.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]

    def rounds(self, n: int, seconds: float, turn: Callable[[str, Callable], None]) -> None:
        """Let all take `n` turns; none but the first begins when more than `seconds` have gone since the start."""
        for done in range(n):
            if done == 0 or time.perf_counter() - self.begin < seconds:
                self.take(turn)


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> str:
    """Return their time over ours: the median over the rounds that both did."""
    return f"{statistics.median(a / b for a, b in zip(theirs, ours, strict=False)):.2f}"


def choose(asked: list[str] | None, peers: dict[str, Any], where: str) -> tuple[list[str], list[str]]:
    """Return which of the peers to time, by default those for the device, and a line on each that is not installed."""
    names = asked or [name for name, peer in peers.items() if where in peer.devices]
    found = [name for name in names if importlib.util.find_spec(peers[name].package)]
    return found, [f"{name}: {peers[name].package} is not installed" for name in names if name not in found]


def add_options(parser: argparse.ArgumentParser, peers: Sequence[str], rounds: int) -> None:
    """Add the options that the benchmarks have in common."""
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="DIR", help="a checkpoint in any form; may be repeated")
    add("--random", action="append", default=[], choices=SIZES, help="random weights of this size; may be repeated")
    add("--rounds", type=int, default=rounds, help="turns each library takes at each case")
    add("--case-seconds", type=float, default=600, help="no further round of a case begins after so long")
    add("--peers", nargs="+", choices=peers, help="default: those for the device that are installed")
    add("--output", type=Path, metavar="FILE.md", help="write the table there too")


class Report:
    """Lines that are printed as they come, and written to a file too if there is one."""

    def __init__(self, path: Path | None):
        self.path, self.lines = path, []

    def say(self, line: str) -> None:
        """Add a line."""
        self.lines.append(line)
        print(line, flush=True)
        if self.path:
            self.path.write_text("\n".join(self.lines) + "\n", encoding="utf-8")

    def title(self, title: str, machine: str) -> None:
        """Begin with a title, the command, the machine and the versions of the libraries that are installed."""
        # The folders of this machine are left out of the command.
        words = [f"DIR/{Path(word).name}" if Path(word).is_absolute() else word for word in sys.argv[1:]]
        command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
        names = ("jax", "flax", "torch", "transformers", "ctranslate2")
        versions = [f"{name} {version(name)}" for name in names if importlib.util.find_spec(name)]
        self.say(f"# {title}\n\n    {command}\n")
        self.say(f"{machine}, Python {platform.python_version()}, {', '.join(versions)}.\n")

    def headings(self, headings: str) -> None:
        """Begin a table; `headings` are parted by bars."""
        self.say(f"| {headings} |\n|" + "---|" * (headings.count("|") + 1))
