"""Time training steps on ragged documents, packed into rows and one in each row; print a table.

COMMAND: python benchmarks/packing.py [--mean 60] [--tokens 256] [--rounds 5] [--output FILE.md]

The lengths of the documents are lognormal. Both programs train the same model on the same documents, with the same
number of rows in a step. They take turns in one process, so that other work on the machine affects both. What counts
are real tokens per second: padding is no work done.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gpt2_jax
from gpt2_jax.data.example_batches import PackedRows, PaddedRows, example_batches, padding_share
from gpt2_jax.data.examples import Examples
from gpt2_jax.data.token_files import Tokens
from gpt2_jax.recipe import Data, Model, Recipe
from gpt2_jax.training import init_state, make_plan, make_train_step, new_params

SIGMA = 0.8  # of the logarithm of the lengths
MARGINS = "rows | padding | rows for all documents | ms a step | real tokens/s | fastest-slowest | x one in a row"


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--mean", type=float, default=60, help="mean tokens of a document")
    add("--tokens", type=int, default=256, help="tokens of a row")
    add("--batch", type=int, default=8, help="rows of a step")
    add("--documents", type=int, default=2000)
    add("--steps", type=int, default=5, help="steps of a turn")
    add("--rounds", type=int, default=5, help="turns of each")
    add("--output", type=Path, metavar="FILE.md", help="also write the table to this file")
    return parser.parse_args()


def documents(folder: Path, args: argparse.Namespace, n_vocab: int) -> Examples:
    """Write random documents with lognormal lengths, at least 2 and at most a row."""
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(args.mean) - SIGMA**2 / 2, SIGMA, args.documents)
    lengths = np.clip(np.rint(drawn), 2, args.tokens + 1).astype(np.int64)
    rng.integers(0, n_vocab, lengths.sum()).astype("<u2").tofile(folder / "train.bin")
    return Examples(Tokens(folder / "train.bin", int(lengths.sum()), n_vocab), np.cumsum(lengths))


class Trainer:
    """Takes steps on rows. `turn` returns real tokens per second, and seconds per step."""

    def __init__(self, config: gpt2_jax.GPT2Config, rows: Any, args: argparse.Namespace, packed: bool):
        data = Data(n_tokens=args.tokens, pack=packed)
        recipe = Recipe(steps=10**6, batch_size=args.batch, data=data, model=Model(dropout=0.0))
        plan = make_plan(config, recipe)
        self.rows, self.n_steps = rows, args.steps
        self.stream = example_batches(rows, args.batch, seed=0)
        self.step, self.state = make_train_step(plan), init_state(plan, new_params(plan.config, 0))
        self.turn()  # compiles

    def turn(self) -> tuple[float, float]:
        """Take the steps of a turn."""
        batches = [jax.tree.map(lambda leaf: leaf[None], next(self.stream)) for _ in range(self.n_steps)]
        n_real, begin = sum(int(batch.weights.sum()) for batch in batches), time.perf_counter()
        for batch in batches:
            self.state, metrics = self.step(self.state, batch)
        jax.block_until_ready(metrics)
        seconds = time.perf_counter() - begin
        return n_real / seconds, seconds / self.n_steps


def main() -> None:
    """Measure, and print the table."""
    args = parse_args()
    config = gpt2_jax.load_config(gpt2_jax.embedded_model())
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        found = documents(Path(folder), args, config.n_vocab)
        begin = time.perf_counter()
        rows = {"one document in a row": PaddedRows(found, args.tokens), "packed": PackedRows(found, args.tokens)}
        packing = time.perf_counter() - begin
        trainers = {name: Trainer(config, one, args, name == "packed") for name, one in rows.items()}
        turns = [{name: one.turn() for name, one in trainers.items()} for _ in range(args.rounds)]
    speeds = {name: [turn[name][0] for turn in turns] for name in rows}
    alone = next(iter(speeds))
    ratios = {name: [turn[name][0] / turn[alone][0] for turn in turns] for name in rows}
    lines = [
        f"# Packed rows, documents of {args.mean:g} tokens on average, rows of {args.tokens}, float32",
        "",
        "    python benchmarks/packing.py --output benchmarks/results/packing_cpu.md",
        "",
        f"{len(os.sched_getaffinity(0))} CPU cores ({processor()}), Python {platform.python_version()}, "
        f"jax {version('jax')}, flax {version('flax')}. Load when it began: {load:.1f}.",
        "",
        f"The embedded model's shape, {config.n_params:,} parameters, {args.batch} rows in a step. {args.documents:,} "
        f"documents with lognormal lengths (sigma {SIGMA}), cut to a row; packing them took {packing * 1e3:.0f} ms. "
        f"Medians of {args.rounds} turns of {args.steps} steps; the last column is the median of the ratios.",
        "",
        f"| {MARGINS} |",
        "|---" * 7 + "|",
    ]
    for name, one in rows.items():
        seconds = statistics.median(turn[name][1] for turn in turns)
        lines.append(
            f"| {name} | {padding_share(one, args.tokens):.1%} | {len(one):,} | {1e3 * seconds:.0f} "
            f"| {statistics.median(speeds[name]):,.0f} | {min(speeds[name]):,.0f}-{max(speeds[name]):,.0f} "
            f"| {statistics.median(ratios[name]):.2f} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


def processor() -> str:
    """Return the name of the processor."""
    path = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in path.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
