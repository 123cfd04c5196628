"""What the parts of benchmarks/device.py share: their report, their time, random weights, and clocks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turns import Report

if TYPE_CHECKING:
    from gpt2_jax import GPT2Config

# Bytes per second of a device's memory, from its maker's data sheet, by `device_kind`. For v2, v3 and 7x, a JAX device
# is one of a chip's two cores; they are not listed.
NOMINAL_BANDWIDTHS = {
    "NVIDIA H200": 4.8e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "TPU v4": 1.228e12,
    "TPU v5": 2.765e12,
    "TPU v5 lite": 0.819e12,
    "TPU v6 lite": 1.64e12,
}

FAILED = "Failed: "  # begins the lines of a part that say what failed


@dataclasses.dataclass
class Job:
    """The work of one part, in its own process.

    Attributes:
      folder: the folder of all results.
      name: the part's name.
      tiny: whether shapes are tiny, so that everything runs within seconds on a CPU.
      until: the `time.monotonic()` after which no new case begins.
      failed: what went wrong so far; the part goes on.
      left_out: sentences about cases that were not measured.
    """

    folder: Path
    name: str
    tiny: bool
    until: float
    failed: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        (self.folder / "parts").mkdir(parents=True, exist_ok=True)
        report = Report(self.folder / "parts" / f"{self.name}.md")
        self.say, self.headings = report.say, report.headings
        self._figures: dict[str, float] = {}

    def row(self, *cells: object) -> None:
        """Write one row of a table. It is in the file when this returns."""
        self.say("| " + " | ".join(map(str, cells)) + " |")

    def figure(self, name: str, value: float) -> None:
        """Keep a number for later parts and for programs, in parts/NAME.json."""
        self._figures[name] = value
        path = self.folder / "parts" / f"{self.name}.json"
        path.write_text(json.dumps(self._figures, indent=1) + "\n", encoding="utf-8")

    def figures_of(self, part: str) -> Mapping[str, float]:
        """Return the numbers that another part kept; none if it has not run."""
        path = self.folder / "parts" / f"{part}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def each(self, cases: Mapping[str, Callable[[], Any]]) -> None:
        """Run the cases in order. One that fails is named at the end, and so is one for which there is no time.

        A case begins if the time left is at least that of the longest case so far.
        """
        longest = 0.0
        for label, case in cases.items():
            begin = time.monotonic()
            if (left := self.until - begin) < longest:
                self.left_out.append(f"{label}: the last case took {longest:.0f} s, and {max(0, left):.0f} s are left")
                continue
            try:
                case()
            except Exception as error:  # any error is reported, and the other cases continue
                traceback.print_exc()
                self.failed.append(f"{label}: {first_line(error)}")
            longest = max(longest, time.monotonic() - begin)

    def finish(self) -> int:
        """Write what was left out and what failed; return the exit status."""
        for line in self.left_out:
            self.say(f"\nLeft out: {line}.")
        for line in self.failed:
            self.say(f"\n{FAILED}{line.removesuffix('.')}.")
        with contextlib.suppress(Exception):  # after a failure, the device may not answer
            if peak := memory_stats().get("peak_bytes_in_use"):
                self.say(f"\nPeak device memory of this part: {peak / 1e9:.2f} GB.")
        return int(bool(self.failed))

    def config(self, size: str, **changes: Any) -> tuple[str, GPT2Config]:
        """Return the label and the config of a size; a tiny config if shapes are tiny."""
        from gpt2_jax import SIZES

        if not self.tiny:
            return size, SIZES[size].replace(**changes)
        tiny = SIZES[size].replace(n_vocab=211, n_ctx=64, n_embd=24, n_head=3, n_layer=2)
        return f"tiny, not {size}", tiny.replace(**changes)


def first_line(error: Exception) -> str:
    """Return an error's type and the first line of its message, at most 300 characters."""
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0][:300]


def memory_stats() -> Mapping[str, int]:
    """Return the memory statistics of the first device; none on a CPU, or if this process does not use JAX."""
    jax = sys.modules.get("jax")
    return {} if jax is None else jax.devices()[0].memory_stats() or {}


def nominal_bandwidth() -> float | None:
    """Return the nominal bytes per second of the first device's memory; None if that is not known."""
    import jax

    return NOMINAL_BANDWIDTHS.get(jax.devices()[0].device_kind)


def bandwidths(tiny: bool) -> tuple[float, float]:
    """Return bytes per second of reading an array of 1 GiB (tiny: 4 MiB) on the device, and of changing it in place.

    Reading counts the array once, and changing it twice. In place, because new pages take longer on a CPU.
    """
    import jax
    import jax.numpy as jnp

    block = jax.jit(lambda key: jax.random.normal(key, (2**20 if tiny else 2**28,)))(jax.random.key(0))
    total, negate = jax.jit(jnp.sum), jax.jit(jnp.negative, donate_argnums=0)
    read = block.nbytes / seconds_of(lambda: total(block))

    def change() -> jax.Array:
        nonlocal block
        block = negate(block)
        return block

    return read, 2 * block.nbytes / seconds_of(change)


def seconds_of(call: Callable[[], Any], least: float = 0.2) -> float:
    """Return the seconds of one call among many in a row: the median of three rounds of about `least` seconds.

    `call` returns arrays. The first call, which may compile, is not measured. The device is waited for once per round.
    """
    import jax

    def round_of(n: int) -> float:
        begin = time.perf_counter()
        result = None
        for _ in range(n):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - begin) / n

    jax.block_until_ready(call())
    n = max(1, min(200, int(least / round_of(1))))
    return statistics.median(round_of(n) for _ in range(3))


def timed(call: Callable[[], Any]) -> float:
    """Return the seconds of a call that waits for the device by itself."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def random_params(config: GPT2Config, seed: int = 0) -> dict[str, Any]:
    """Return random params made on the device, layer by layer: two small programs, and nothing passes the host."""
    import jax

    from gpt2_jax import init_params

    one, key = config.replace(n_layer=1), jax.random.key(seed)
    outer = jax.jit(lambda key: {name: leaf for name, leaf in init_params(one, key).items() if name != "h0"})
    block = jax.jit(lambda key: init_params(one, key)["h0"])
    return {**outer(key), **{f"h{i}": block(jax.random.fold_in(key, i)) for i in range(config.n_layer)}}


def random_prompts(config: GPT2Config, n_rows: int, n_tokens: int) -> list[list[int]]:
    """Return the same random ids every time."""
    import numpy as np

    return np.random.default_rng(0).integers(config.n_vocab, size=(n_rows, n_tokens)).tolist()


@contextlib.contextmanager
def clocked(module: Any, name: str) -> Iterator[list[float]]:
    """Within the block, wait for the device before and after each call of `module.name`; yields the seconds of each."""
    import jax

    real, seconds = getattr(module, name), []

    def clock(*args: Any, **kwargs: Any) -> Any:
        jax.block_until_ready((args, kwargs))
        begin = time.perf_counter()
        result = jax.block_until_ready(real(*args, **kwargs))
        seconds.append(time.perf_counter() - begin)
        return result

    setattr(module, name, clock)
    try:
        yield seconds
    finally:
        setattr(module, name, real)


def relative(ours: Any, theirs: Any) -> float:
    """Return the largest difference, divided by the largest absolute value of `theirs`; infinity for NaN."""
    import numpy as np

    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    return float(error) if np.isfinite(error) else float("inf")


def share(part: float | None, whole: float | None) -> str:
    """Return a share in percent, or n/a."""
    return f"{part / whole:.1%}" if part and whole else "n/a"


def milliseconds(seconds: float | None) -> str:
    """Return seconds as milliseconds with three significant digits or more, or n/a."""
    if seconds is None:
        return "n/a"
    return f"{seconds * 1e3:.3f}" if seconds < 0.1 else f"{seconds * 1e3:.1f}"


def same_bytes(trees: Sequence[Any]) -> list[bool]:
    """Return for each tree after the first whether all its arrays equal those of the first, bit for bit."""
    import jax
    import numpy as np

    first, *others = ([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)] for tree in trees)
    return [other == first for other in others]
