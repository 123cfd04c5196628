"""Time training, evaluation and generation in several processes beside one with as many devices; print tables.

COMMAND: python benchmarks/processes.py --random 124M --devices 2 --batch 2 --tokens 64 [--output FILE.md]
         python benchmarks/processes.py --model shakespeare --devices 4 --batch 8 --tokens 128

Needs Linux, and for `--random` the `parity` extra. The first command takes 5 minutes and 12 GB on two CPU cores.

All processes are on this machine. They connect over its loopback interface, so a network's time is not in the figures.
On a CPU, the devices are forced (`--xla_force_host_platform_device_count`) and share the cores. With GPUs, each process
gets its own by CUDA_VISIBLE_DEVICES; `--devices-per-process 1` is one process a GPU. This was never run on GPUs.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import process_work
from process_work import Case, Times
from trainers import prepare
from turns import ENVIRONMENT, SIZES, Report, Turns, alone, ratio, where_and_name, worker

LEGEND = """\
- Layout: processes x devices of each. The mesh is data = {devices}, model = 1. The layouts take turns. Each keeps its
  processes and its state; those of the others wait.
- A step: {batch} x {tokens} tokens in {accumulate} part{s}, {dtype} products, float32 params, AdamW, no dropout.
  Batches are read from a file, as in `gpt2-train`: every process reads the whole batch.
- Times are those of the slowest process. Those of steps, evaluation and generation are medians of {rounds} rounds
  {steps}.
- Ratio: the time of one process divided by the layout's, median over the rounds. 1.00 is as fast as one process.
- Collectives: operations of the compiled step in which devices exchange arrays.
- Parts of a step, alone, on idle devices: gather all params on every device, place a batch, and ask all processes for
  signals. A step gathers once in each pass, sums gradients too, and overlaps the last two with its computation.
- Import, connect, load and compile: from the start of a process to its first step.
- Evaluate: {scored} windows of {tokens} tokens. Generate: {prompts} prompts, {new_tokens} new tokens each. Each process
  has the whole model, and does its share of the batches.
- First losses, nats: those of the first {n_first} steps. They show that all layouts compute the same."""
TRAINING = "model, layout | ms/step | ratio | collectives | gather ms | batch ms | signals ms | first losses"
START = "model, layout | import s | connect s | load s | compile s | save s | restore s | checkpoint MB"
SHARED = "model, layout | evaluate s | ratio | generate s | ratio"
N_FIRST = 3
N_PARTS = 9


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="DIR", help="a checkpoint in any form; may be repeated")
    add("--random", action="append", default=[], choices=SIZES, help="random weights of this size; may be repeated")
    add("--devices", type=int, default=4, help="devices of each layout, in all its processes together")
    add("--devices-per-process", type=int, nargs="+", metavar="D", help="default: every D that divides --devices")
    add("--batch", type=int, default=8, help="rows of a step")
    add("--tokens", type=int, default=128, help="tokens of a row")
    add("--accumulate", type=int, default=1, help="parts of a step (gradient accumulation)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the matrix products")
    add("--new-tokens", type=int, default=32, help="tokens that each prompt is continued by")
    add("--rounds", type=int, default=5, help="turns of each layout")
    add("--steps", type=int, default=4, help="steps of a turn")
    add("--case-seconds", type=float, default=300, help="no new round of a model starts after this time")
    add("--output", type=Path, metavar="FILE.md", help="also write the tables to this file")
    args = parser.parse_args(argv)
    if not args.model + args.random:
        parser.error("give --model DIR or --random SIZE")
    if min(args.devices, args.batch, args.tokens, args.accumulate, args.new_tokens, args.rounds, args.steps) < 1:
        parser.error("all numbers must be 1 or more")
    whole = args.devices
    each = args.devices_per_process or [n for n in range(whole, 0, -1) if whole % n == 0]
    if any(n < 1 or whole % n for n in each):
        parser.error("each of --devices-per-process must divide --devices")
    if args.batch % (args.accumulate * whole):
        parser.error("--batch must be a multiple of --accumulate times --devices")
    args.devices_per_process = list(dict.fromkeys([whole, *each]))  # one process is what the others are compared with
    return args


class Group:
    """The processes of a layout. It takes the place of a pool of `Turns`: a call runs in all, and has one result."""

    def __init__(self, n: int):
        self.pools, self.pids = [worker() for _ in range(n)], []

    def submit(self, call: Callable[..., Times], *args: Any) -> Group:
        """Start a call in every process."""
        self.calls = [pool.submit(call, *args) for pool in self.pools]
        return self

    def connect(self, n_devices: int, where: str) -> Times:
        """Connect the processes."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port, n = free.getsockname()[1], len(self.pools)
        calls = enumerate(self.pools)
        self.calls = [pool.submit(process_work.connect, i, n, port, n_devices, where) for i, pool in calls]
        return self.result()

    def result(self) -> Times:
        """Return the times of the slowest process. If one fails, the others are killed: they would wait for it."""
        done, _ = concurrent.futures.wait(self.calls, return_when=concurrent.futures.FIRST_EXCEPTION)
        if failed := [call for call in done if call.exception()]:
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            failed[0].result()
        found = [call.result() for call in self.calls]
        self.pids = self.pids or [one["pid"] for one in found if "pid" in one]
        return {name: slowest([one[name] for one in found]) for name in found[0]}

    def shutdown(self) -> None:
        """End the processes, all at once: each waits for the others."""
        for pool in self.pools:
            pool.shutdown(wait=False)
        for pool in self.pools:
            pool.shutdown()


def slowest(found: list[Any]) -> Any:
    """Return the largest of numbers, or of lists of numbers at each place."""
    return list(map(max, zip(*found, strict=True))) if isinstance(found[0], list) else max(found)


def measure(case: Case, where: str, args: argparse.Namespace) -> tuple[dict[str, Times], dict[str, str]]:
    """Time all layouts of one case, in turns. Return {layout: times}, and why others failed."""
    layouts = {f"{args.devices // n} x {n}": n for n in args.devices_per_process}
    times: dict[str, Times] = {name: {} for name in layouts}

    def first(name: str, call: Callable) -> None:
        mine = times[name]
        mine |= groups[name].connect(layouts[name], where)
        mine |= call(process_work.load, case)
        mine["losses"] = call(process_work.train, N_FIRST)["losses"]
        mine |= call(process_work.parts, N_PARTS)
        mine |= call(process_work.save, case.folder / f"run {name}")
        call(process_work.evaluate)  # compiles
        call(process_work.generate, case.folder / f"compiling {name}.jsonl")

    def once_more(name: str, call: Callable) -> None:
        number = len(times[name].get("round", []))
        found = call(process_work.train, args.steps) | call(process_work.evaluate)
        found |= call(process_work.generate, case.folder / f"{name} {number}.jsonl")
        for what in ("evaluate", "generate"):
            times[name].setdefault(what, []).append(found[what][0])
        times[name].setdefault("round", []).append(statistics.median(found["step"]))

    groups = {name: Group(args.devices // n) for name, n in layouts.items()}
    with Turns([]) as turns:
        turns.pools |= groups
        turns.take(first)
        turns.rounds(args.rounds, args.case_seconds, once_more)
    return {name: mine for name, mine in times.items() if name not in turns.failed}, turns.failed


def write_inputs(source: str, random: bool, folder: Path, args: argparse.Namespace) -> int:
    """Write weights, tokens and prompts of random ids. Return the number of prompts. Runs in a process of its own."""
    import numpy as np

    hparams, draw = prepare(source, random, folder), np.random.default_rng(0)
    n_vocab, n_prompts = hparams["n_vocab"], 2 * args.devices * args.batch
    (folder / "tokens").mkdir()
    ids = draw.integers(n_vocab, size=max(100_000, 8 * args.batch * args.tokens))
    ids.astype(np.uint16).tofile(folder / "tokens" / "train.bin")
    lengths = draw.integers(5, 17, size=n_prompts)
    prompts = (json.dumps(draw.integers(n_vocab, size=n).tolist()) for n in lengths)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": ids}) + "\n" for ids in prompts))
    return n_prompts


def rows_of(times: dict[str, Times]) -> tuple[list[list[str]], list[list[str]], list[list[str]]]:
    """Return the cells of the three tables, from the layout's name on."""

    def against(mine: Times, what: str) -> str:
        return ratio(one[what], mine[what]) if mine is not one else ""

    one = next(iter(times.values()))
    training, start, shared = [], [], []
    for name, mine in times.items():
        step = [f"{statistics.median(mine['round']) * 1e3:.1f}", against(mine, "round")]
        losses = " ".join(f"{loss:.5f}" for loss in mine["losses"])
        step.append(str(mine["collectives"]))
        training.append([name, *step, *(f"{mine[x] * 1e3:.2f}" for x in ("gather", "batch", "signals")), losses])
        seconds = [mine[x] for x in ("import", "connect")] + [
            mine[x][0] for x in ("load", "compile", "save", "restore")
        ]
        start.append([name, *(f"{x:.2f}" for x in seconds), f"{mine['bytes'] / 1e6:.1f}"])
        shared.append([name])
        for what in ("evaluate", "generate"):
            shared[-1] += [f"{statistics.median(mine[what]):.2f}", against(mine, what)]
    return training, start, shared


def main(args: argparse.Namespace) -> None:
    """Measure and print Markdown tables."""
    os.environ |= ENVIRONMENT
    report, busy = Report(args.output), os.getloadavg()[0]  # load of other programs
    where, machine = alone(where_and_name)
    report.title("Several processes", machine)
    report.say(f"Load when it began: {busy:.1f}.\n")
    tables, left_out, n_prompts = ([], [], []), [], 0
    for source, random in [(source, False) for source in args.model] + [(size, True) for size in args.random]:
        with tempfile.TemporaryDirectory() as folder:
            n_prompts = alone(write_inputs, source, random, Path(folder), args)
            case = Case(Path(folder), args.batch, args.tokens, args.accumulate, args.dtype, args.new_tokens)
            times, failed = measure(case, where, args)
            label = Path(source).name
            left_out += [f"{label}, {name}: {reason}" for name, reason in failed.items()]
            for table, rows in zip(tables, rows_of(times) if times else tables, strict=True):
                table += [[f"{label}, {row[0]}", *row[1:]] for row in rows]
    steps = f"of {args.steps} steps" if args.steps > 1 else "of one step"
    sizes = {"scored": 4 * args.batch, "prompts": n_prompts, "n_first": N_FIRST, "steps": steps}
    sizes["s"] = "s" * (args.accumulate > 1)
    report.say(LEGEND.format(**{**vars(args), **sizes}))
    for headings, table in zip((TRAINING, START, SHARED), tables, strict=True):
        report.say("")
        report.headings(headings)
        for cells in table:
            report.say(f"| {' | '.join(cells)} |")
    for line in left_out:
        report.say(f"\nLeft out: {line}.")


if __name__ == "__main__":
    main(parse_args())
