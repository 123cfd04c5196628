"""Error of logits and gradients against a float64 reference: ours, Hugging Face torch, the original TensorFlow graph.

COMMAND: python benchmarks/fidelity.py --random 124M [355M ...] [--model DIR] [--output FILE.md]
         (124M: 3 minutes on two CPU cores, 4 GB of memory; the reference of 1558M takes 17 GB)

The reference is Hugging Face torch in float64 on the same device, with the same float32 weights. Needs the `parity`
extra; without TensorFlow, its row is left out. The arguments use argparse and the weights safetensors, because a GPU
machine often has neither tyro nor TensorFlow.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from forwards import CONTESTANTS, TRUTH, Contestant, Way, write_gradients, write_logits
from turns import ENVIRONMENT, SIZES, Report, alone, save_weights, survey

LEGEND = """\
- Reference: Hugging Face torch in float64, with the same float32 weights.
- Logits: the largest difference from the reference over {n:,} positions of random ids, divided by the largest absolute
  logit. "their RMS" is the root mean square of all differences, divided by the same number.
- KL: the divergence of the next token's distribution from the reference, in nats: mean and largest over the positions.
- Top-1: share of the positions where the most likely token is that of the reference.
- Gradients: those of the mean loss of {m:,} positions. For each parameter, the largest difference divided by its
  largest absolute gradient. The table has the worst parameter and the median parameter.
- In bfloat16, the weights are rounded too.
- "ours" uses `jax.default_matmul_precision("highest")`, except where the table says "default precision"."""
HEADINGS = "shape | device | dtype | library | logits | their RMS | mean KL | largest KL | top-1 | worst gradient | "
HEADINGS += "median gradient"
AT_A_TIME = 64  # positions whose logits are compared together


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--random", nargs="+", default=[], choices=SIZES, help="random weights of these sizes")
    add("--model", nargs="+", default=[], metavar="DIR", help="checkpoints in any form")
    add("--dtypes", nargs="+", default=["float64", "float32", "bfloat16"], choices=["float64", "float32", "bfloat16"])
    add("--positions", type=int, default=1024, help="positions whose logits are compared")
    add("--gradient-positions", type=int, default=256, help="positions in the loss for gradients; 0 for none")
    add("--output", type=Path, metavar="FILE.md", help="also write the table to this file")
    args = parser.parse_args()
    if not args.random + args.model:
        parser.error("give --random SIZE or --model DIR")
    if args.positions < 1 or args.gradient_positions < 0:
        parser.error("--positions must be 1 or more, --gradient-positions 0 or more")
    return args


def contests(dtypes: list[str], where: str) -> Iterator[tuple[str, Contestant, Way]]:
    """Yield each row's label, library and precision; float32 also at JAX's default precision and in TF32."""
    for dtype, (name, contestant) in itertools.product(dtypes, CONTESTANTS.items()):
        if dtype not in contestant.dtypes or where not in contestant.devices:
            continue
        if importlib.util.find_spec(contestant.package) is None:
            continue
        yield name, contestant, Way(dtype, where)
        if dtype == "float32" and name == "ours":
            yield "ours, default precision", contestant, Way(dtype, where, rounded=True)
        elif (dtype, where) == ("float32", "gpu"):
            yield f"{name}, TF32", contestant, Way(dtype, where, rounded=True)


def compare_logits(path: Path, truth: Path) -> list[str]:
    """Return the relative error of logits, its root mean square, mean and largest KL, and the share of equal top-1."""
    ours_TV, true_TV = np.load(path, mmap_mode="r"), np.load(truth, mmap_mode="r")
    error, largest, square, divergence, same = 0.0, 0.0, 0.0, [], []
    for start in range(0, len(true_TV), AT_A_TIME):
        ours, true = (array[start : start + AT_A_TIME].astype(np.float64) for array in (ours_TV, true_TV))
        error, largest = max(error, abs(ours - true).max()), max(largest, abs(true).max())
        square += np.square(ours - true).mean(-1).sum() / len(true_TV)
        logp, logq = (x - x.max(-1, keepdims=True) for x in (true, ours))
        logp, logq = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (logp, logq))
        divergence.extend((np.exp(logp) * (logp - logq)).sum(-1))
        same.extend(ours.argmax(-1) == true.argmax(-1))
    numbers = [error / largest, square**0.5 / largest, np.mean(divergence), max(divergence)]
    return [*(f"{number:.1e}" for number in numbers), f"{np.mean(same):.2%}"]


def compare_gradients(folder: Path, truth: Path) -> list[str]:
    """Return the relative gradient error of the worst parameter and of the median parameter."""
    errors = []
    for path in sorted(truth.iterdir()):
        ours, true = np.load(folder / path.name).astype(np.float64), np.load(path)
        errors.append(abs(ours - true).max() / abs(true).max())
    return [f"{max(errors):.1e}", f"{np.median(errors):.1e}"]


def attempt(call: Callable, *args: object) -> str | None:
    """Run a call in its own process; return why it failed, or None."""
    try:
        alone(call, *args)
    except BrokenProcessPool:
        return "its process was killed; memory may have run out"
    except Exception as error:  # any error of a library is reported, and the others continue
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def table_rows(
    label: str, folder: Path, tokens_T: np.ndarray, args: argparse.Namespace, where: str, left_out: list[str]
) -> Iterator[str]:
    """Yield the rows of one model."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for what, (write, compare, n_tokens, _) in JOBS.items():
        tokens = tokens_T[: n_tokens(args)]
        truth, path = folder / f"true-{what}.npy", folder / f"{what}.npy"
        reason = attempt(write, TRUTH, folder, tokens, Way("float64", where), truth) if len(tokens) else "not asked for"
        if reason:
            left_out.append(f"{label}, {what}: {reason}")
            continue
        for name, contestant, way in contests(args.dtypes, where):
            cells = found.setdefault((way.dtype, name), {})
            if reason := attempt(write, contestant, folder, tokens, way, path):
                left_out.append(f"{label}, {name}, {way.dtype}, {what}: {reason}")
            else:
                cells[what] = compare(path, truth)
            _remove(path)
        _remove(truth)
    for (dtype, name), cells in found.items():
        numbers = [cell for what, (*_, n_cells) in JOBS.items() for cell in cells.get(what, [""] * n_cells)]
        yield " | ".join([label, where, dtype, name, *numbers])


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


JOBS = {  # for the cells of a row: functions to write and to compare, number of tokens, number of cells
    "logits": (write_logits, compare_logits, lambda args: args.positions, 5),
    "gradients": (
        write_gradients,
        compare_gradients,
        lambda args: args.gradient_positions and args.gradient_positions + 1,
        2,
    ),
}


def main(args: argparse.Namespace) -> None:
    """Measure and print a Markdown table."""
    os.environ |= ENVIRONMENT
    report = Report(args.output)
    machine = alone(survey)
    report.title("Distance from float64", machine.name)
    report.say(LEGEND.format(n=args.positions, m=args.gradient_positions) + "\n")
    report.headings(HEADINGS)
    left_out: list[str] = []
    for source, random in [(size, True) for size in args.random] + [(source, False) for source in args.model]:
        with tempfile.TemporaryDirectory() as folder:
            n_vocab, n_ctx = alone(_prepare, source, random, Path(folder))
            n_tokens = max(args.positions, args.gradient_positions + 1)
            if n_tokens > n_ctx:
                left_out.append(f"{source}: {n_tokens} tokens do not fit its n_ctx of {n_ctx}")
                continue
            tokens_T = np.random.default_rng(0).integers(n_vocab, size=n_tokens)
            for row in table_rows(Path(source).name, Path(folder), tokens_T, args, machine.where, left_out):
                report.say(f"| {row} |")
    for line in left_out:
        report.say(f"\nLeft out: {line}.")


def _prepare(source: str, random: bool, folder: Path) -> tuple[int, int]:
    config, _ = save_weights(source, random, folder)
    return config.n_vocab, config.n_ctx


if __name__ == "__main__":
    main(parse_args())
