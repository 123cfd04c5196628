"""Time training steps against Hugging Face torch, on the same weights and batch, in one run; print a table.

COMMAND: python benchmarks/train.py --random 124M --batch 4 --tokens 256 [--rounds 5] [--output FILE.md]     (CPU)
         python benchmarks/train.py --random 124M --batch 32 --tokens 1024 --dtype bfloat16 [--remat]        (GPU)

Needs Linux and the `parity` extra; the first command takes 3 minutes and 5 GB on two CPU cores.

On a CPU the peer is eager torch, on a GPU torch.compile. The libraries take turns. Each runs in its own process, so
that their memory and threads do not disturb each other. The arguments use argparse and the weights safetensors, because
a GPU machine often has neither tyro nor TensorFlow.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trainers import OPTIMIZER, PEERS, Case, device_flops, prepare, start, timed
from turns import ENVIRONMENT, Report, Turns, add_options, alone, choose, peak_bytes, ratio, survey

if TYPE_CHECKING:
    from gpt2_jax import GPT2Config

N_FIRST = 3  # untimed first steps, whose losses are shown
HEADINGS = "model, batch x tokens | library | tok/s | ms/step | MFU | peak MB | compile s | first losses | "
HEADINGS += "ratio | rounds"
LEGEND = """\
- Every step uses the same batch of random ids: forward pass, backward pass, gradients clipped to norm {clip:g}, AdamW
  (learning rate {learning_rate:g}, betas {betas}, epsilon {epsilon:g}, decay {weight_decay:g} on matrices). Dropout is
  0 in every library.
- Params, optimizer state and loss are float32. Matrix products are {dtype}{autocast}.{saving}
- torch: Hugging Face's GPT2LMHeadModel{compiled}, with scaled_dot_product_attention and torch's fused AdamW.
- Times: of {n_steps}, median over the rounds.
- MFU: tokens/s times 6 N + 12 L D T (N: all parameters), divided by the device's bfloat16 peak ({flops}).
- Compile: the time of the first step minus that of a later one, with no cache on disk.
- First losses: those of the first {n_first} steps. They show that all libraries compute the same.
- Ratio: the library's time divided by ours, median over the rounds.
- Peak MB: {peak}."""
PEAK = {
    "cpu": "peak resident memory of the process after it has loaded, with its weights and its libraries' code",
    "gpu": "peak device memory of the process's arrays, from its start",
}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, list(PEERS), rounds=5)
    add = parser.add_argument
    add("--batch", type=int, nargs="+", default=[4], help="rows of a step; each number is one case")
    add("--tokens", type=int, default=256, help="tokens of a row")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the matrix products")
    add("--accumulate", type=int, default=1, help="parts of a step (gradient accumulation)")
    add("--remat", action="store_true", help="use rematerialization of each block, in every library")
    add("--steps", type=int, help="steps of a turn; default 1 on a CPU, 20 on a GPU")
    args = parser.parse_args()
    if not args.model + args.random:
        parser.error("give --model DIR or --random SIZE")
    if min(args.tokens, args.rounds, args.accumulate, args.steps or 1, *args.batch) < 1:
        parser.error("--batch, --tokens, --rounds, --accumulate and --steps must be 1 or more")
    if any(n_rows % args.accumulate for n_rows in args.batch):
        parser.error("--accumulate must divide --batch")
    return args


@dataclasses.dataclass
class Times:
    """The times of one library in one case, in seconds per step, one per round; and its losses and peak memory."""

    first_step: float
    losses: list[float]
    step: list[float] = dataclasses.field(default_factory=list)
    peak: int = 0


def measure(
    names: list[str], folder: Path, case: Case, where: str, args: argparse.Namespace
) -> tuple[dict[str, Times], dict[str, str]]:
    """Time one case: every library in turn, for `args.rounds` rounds or `args.case_seconds`.

    Returns:
      The times of the libraries that finished, and the reasons why others failed.
    """
    times = {}

    def first(name: str, call: Callable) -> None:
        call(start, name, folder, case, where)
        times[name] = Times(*call(timed, 1))
        times[name].losses += call(timed, N_FIRST - 1)[1]

    def once_more(name: str, call: Callable) -> None:
        times[name].step.append(call(timed, args.steps)[0] / args.steps)
        times[name].peak = call(peak_bytes, where)

    with Turns(names) as turns:
        turns.take(first)
        turns.rounds(args.rounds, args.case_seconds, once_more)
    return {name: times[name] for name in names if name not in turns.failed}, turns.failed


def why_not(config: GPT2Config, case: Case, n_libraries: int, memory: int) -> str | None:
    """Return why a case cannot run here; None if it can."""
    if case.n_tokens > config.n_ctx:
        return f"{case.n_tokens} tokens are more than n_ctx = {config.n_ctx}"
    if (held := n_libraries * config.adam_bytes) > memory:
        needed, free = f"{held / 1e9:.1f} GB", f"{memory / 1e9:.1f}"
        return f"weights, gradients and moments of {n_libraries} libraries together need {needed}; {free} GB are free"
    return None


def table_rows(times: dict[str, Times], config: GPT2Config, case: Case, peak: float | None) -> Iterator[list[str]]:
    """Yield the cells of each library, starting with its name."""
    from gpt2_jax.training.hardware import flops_per_token

    ours = times.get("ours")
    for name, mine in times.items():
        step = statistics.median(mine.step)
        speed = case.n_rows * case.n_tokens / step
        mfu = f"{speed * flops_per_token(config, case.n_tokens) / peak:.1%}" if peak else "n/a"
        yield [
            *(name, f"{speed:.0f}", f"{step * 1e3:.1f}", mfu, f"{mine.peak / 1e6:.0f}"),
            f"{mine.first_step - step:.1f}",
            " ".join(f"{loss:.5f}" for loss in mine.losses),
            "" if ours is None or name == "ours" else ratio(mine.step, ours.step),
            str(len(mine.step)),
        ]


def legend(args: argparse.Namespace, where: str, peak: float | None) -> str:
    """Return the text above the table, which explains its columns."""
    saving = [f"Gradients are accumulated over {args.accumulate} parts of a step."] * (args.accumulate > 1)
    saving += ["Every library uses rematerialization of each block."] * args.remat
    return LEGEND.format(
        **OPTIMIZER,
        dtype=args.dtype,
        autocast=" (torch's by autocast)" if args.dtype == "bfloat16" else "",
        saving="".join(f" {sentence}" for sentence in saving),
        n_steps=f"{args.steps} steps in a row" if args.steps > 1 else "one step",
        flops=f"{peak / 1e12:.0f} TFLOP/s" if peak else "not known here, so n/a",
        n_first=N_FIRST,
        compiled=" under torch.compile" if where == "gpu" else ", eager",
        peak=PEAK[where],
    )


def main(args: argparse.Namespace) -> None:
    """Measure and print a Markdown table."""
    os.environ |= ENVIRONMENT
    import gpt2_jax

    report = Report(args.output)
    busy = os.getloadavg()[0]  # load of other programs
    machine = alone(survey)
    args.steps = args.steps or (20 if machine.where == "gpu" else 1)
    names, left_out = choose(args.peers, PEERS, machine.where)
    peak = alone(device_flops)
    report.title(f"Training steps, {args.dtype}", machine.name)
    report.say(f"Load when it began: {busy:.1f}.\n")
    report.say(legend(args, machine.where, peak) + "\n")
    report.headings(HEADINGS)
    for source, random in [(source, False) for source in args.model] + [(size, True) for size in args.random]:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            config = gpt2_jax.GPT2Config.from_hparams(alone(prepare, source, random, folder))
            for n_rows in args.batch:
                label = f"{Path(source).name}, {n_rows} x {args.tokens}"
                case = Case(n_rows, args.tokens, args.dtype, args.accumulate, args.remat)
                if reason := why_not(config, case, len(names), machine.memory):
                    left_out.append(f"{label}: {reason}")
                    continue
                times, failed = measure(names, folder, case, machine.where, args)
                left_out += [f"{label}, {name}: {reason}" for name, reason in failed.items()]
                for cells in table_rows(times, config, case, peak):
                    report.say(f"| {label} | {' | '.join(cells)} |")
    for line in left_out:
        report.say(f"\nLeft out: {line}.")


if __name__ == "__main__":
    main(parse_args())
