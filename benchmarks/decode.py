"""Time greedy decoding against Hugging Face torch and CTranslate2, on the same weights, in one run; print a table.

COMMAND: python benchmarks/decode.py --random 124M [--model DIR] [--cases 1,64 8,512] [--output FILE.md]

Needs Linux, the `parity` extra, and ctranslate2 for its two rows. The report lists libraries that are not installed.
Every size, batch and prompt length that fits into memory is measured: all cases of 124M take two hours on two CPU
cores.

The libraries take turns. Each runs in its own process, which is new for every case, so that their threads do not
disturb each other. The arguments use argparse and the weights safetensors, because a GPU machine often has neither tyro
nor TensorFlow.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from peers import PEERS, prepare, start, timed
from turns import ENVIRONMENT, Report, Turns, add_options, alone, choose, peak_bytes, ratio, survey

if TYPE_CHECKING:
    from gpt2_jax import GPT2Config

GRID = [(n_rows, n_prompt) for n_rows in (1, 8, 64) for n_prompt in (64, 512, 960)]
HEADINGS = "model, batch, prompt | library | prefill ms | ms/step | tok/s | MB/step | floor ms | x floor | compile s | "
HEADINGS += "peak MB | prefill ratio | step ratio | same ids | rounds"
LEGEND = """\
- Prefill: the time of a call for one new token.
- Step: the time that each further token of a longer call adds. A step gives every row one token.
- MB/step: the bytes that a step must read: all weights once, and the keys and values of the tokens so far.
- Floor: MB/step divided by the bandwidth above. `x floor`: the step divided by its floor.
- Compile: the time of the first call minus that of a later equal call, with no cache on disk.
- Ratio: the library's time divided by ours, median over the rounds.
- Same ids: share of the rows whose tokens are all equal to ours.
- Peak MB: {peak}."""
PEAK = {
    "cpu": "peak resident memory of the process after it has loaded, with its weights and its libraries' code",
    "gpu": "peak device memory of the process's arrays, from its start",
}
WIDTHS = {"float32": (4, 4), "bfloat16": (2, 2), "int8": (1, 4)}  # bytes of a weight, and of a key or value


def parse_case(text: str) -> tuple[int, int]:
    """Read "8,512"."""
    try:
        n_rows, n_prompt = map(int, text.split(","))
    except ValueError:
        n_rows = n_prompt = 0
    if min(n_rows, n_prompt) < 1:
        raise argparse.ArgumentTypeError(f"a case is rows,tokens, for example 8,512, not {text!r}")
    return n_rows, n_prompt


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, list(PEERS), rounds=5)
    add = parser.add_argument
    add("--cases", nargs="+", type=parse_case, default=GRID, metavar="B,P", help="rows, and tokens in each prompt")
    add("--new-tokens", type=int, default=64, help="tokens that a call adds to each row, 2 or more")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and products (ours and torch)")
    args = parser.parse_args()
    if not args.model + args.random:
        parser.error("give --model DIR or --random SIZE")
    if args.new_tokens < 2 or args.rounds < 1:
        parser.error("--new-tokens must be 2 or more, --rounds 1 or more")
    return args


@dataclasses.dataclass
class Times:
    """The times of one library in one case, in seconds per call, one per round; and its ids and peak memory."""

    first_call: float
    ids: list[list[int]]
    one: list[float] = dataclasses.field(default_factory=list)
    whole: list[float] = dataclasses.field(default_factory=list)
    peak: int = 0

    def steps(self) -> list[float]:
        """Return the seconds of a step, one per round."""
        return [(whole - one) / (len(self.ids[0]) - 1) for one, whole in zip(self.one, self.whole, strict=True)]


def measure(
    names: list[str], folder: Path, args: argparse.Namespace, where: str, prompts_BP: np.ndarray
) -> tuple[dict[str, Times], dict[str, str]]:
    """Time one case: every library in turn, for `args.rounds` rounds or `args.case_seconds`.

    Returns:
      The times of the libraries that finished, and the reasons why others failed.
    """
    times = {}

    def first(name: str, call: Callable) -> None:
        call(start, name, folder, PEERS[name].dtype or args.dtype, where)
        times[name] = Times(*call(timed, prompts_BP, args.new_tokens))
        call(timed, prompts_BP, 1)

    def once_more(name: str, call: Callable) -> None:
        times[name].one.append(call(timed, prompts_BP, 1)[0])
        times[name].whole.append(call(timed, prompts_BP, args.new_tokens)[0])
        times[name].peak = call(peak_bytes, where)

    with Turns(names) as turns:
        turns.take(first)
        turns.rounds(args.rounds, args.case_seconds, once_more)
    return {name: times[name] for name in names if name not in turns.failed}, turns.failed


def bytes_read(config: GPT2Config, dtype: str, n_rows: int, n_tokens: int) -> int:
    """Return the bytes that a step must read: all weights but wpe, and keys and values of `n_tokens` per row."""
    weight, key = WIDTHS[dtype]
    n_weights = config.n_params - config.param_counts["wpe"]
    return n_weights * weight + 2 * config.n_layer * n_rows * n_tokens * config.n_embd * key


def bytes_held(config: GPT2Config, dtype: str, n_rows: int, n_tokens: int) -> int:
    """Return the minimum bytes of a library: weights, keys and values of `n_tokens` per row, float32 logits."""
    read = bytes_read(config, dtype, n_rows, n_tokens)
    return read + config.param_counts["wpe"] * WIDTHS[dtype][0] + n_rows * config.n_vocab * 4


def why_not(config: GPT2Config, dtypes: list[str], n_rows: int, n_tokens: int, memory: int) -> str | None:
    """Return why a case cannot run here; None if it can."""
    if n_tokens > config.n_ctx:
        return f"prompt and new tokens are {n_tokens} together, more than n_ctx = {config.n_ctx}"
    held = sum(bytes_held(config, dtype, n_rows, n_tokens) for dtype in dtypes)
    if held > memory:
        needed, free = f"{held / 1e9:.1f} GB", f"{memory / 1e9:.1f}"
        return f"weights, cache and logits of {len(dtypes)} libraries together need {needed}; {free} GB are free"
    return None


def table_rows(
    times: dict[str, Times], config: GPT2Config, dtypes: dict[str, str], case: tuple[int, int], bandwidth: float
):
    """Yield the cells of each library, starting with its name."""
    n_rows, n_prompt = case
    ours = times.get("ours")

    for name, mine in times.items():
        step = statistics.median(mine.steps())
        read = bytes_read(config, dtypes[name], n_rows, n_prompt + len(mine.ids[0]) // 2)
        cells = [name, f"{statistics.median(mine.one) * 1e3:.0f}", f"{step * 1e3:.2f}", f"{n_rows / step:.0f}"]
        cells += [f"{read / 1e6:.0f}", f"{read / bandwidth * 1e3:.2f}", f"{step * bandwidth / read:.2f}"]
        cells += [f"{mine.first_call - statistics.median(mine.whole):.1f}", f"{mine.peak / 1e6:.0f}"]
        if ours is None or name == "ours":
            cells += [""] * 3
        else:
            same = np.mean([a == b for a, b in zip(mine.ids, ours.ids, strict=True)])
            cells += [ratio(mine.one, ours.one), ratio(mine.steps(), ours.steps()), f"{same:.0%}"]
        yield [*cells, str(len(mine.one))]


def main(args: argparse.Namespace) -> None:
    """Measure and print a Markdown table."""
    os.environ |= ENVIRONMENT
    import gpt2_jax

    report = Report(args.output)
    say = report.say
    busy = os.getloadavg()[0]  # other programs slow down libraries whose threads wait for each other more than ours
    machine = alone(survey)
    names, left_out = choose(args.peers, PEERS, machine.where)
    dtypes = {name: PEERS[name].dtype or args.dtype for name in names}
    report.title(f"Greedy decoding, {args.dtype}", machine.name)
    kind = "copy, read and written" if machine.where == "gpu" else "read"
    say(f"Bandwidth measured in this run ({kind}): {machine.bandwidth / 1e9:.1f} GB/s. Load when it began: {busy:.1f}.")
    say(f"{args.new_tokens} new tokens per row. Times are medians over the rounds.\n")
    say(LEGEND.format(peak=PEAK[machine.where]) + "\n")
    report.headings(HEADINGS)
    sources = [(source, False) for source in args.model] + [(size, True) for size in args.random]
    for source, random in sources:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            hparams = alone(prepare, source, random, folder, any(name.startswith("ct2") for name in names))
            config = gpt2_jax.GPT2Config.from_hparams(hparams)
            for n_rows, n_prompt in args.cases:
                label = f"{Path(source).name}, {n_rows}, {n_prompt}"
                n_tokens = n_prompt + args.new_tokens
                if reason := why_not(config, list(dtypes.values()), n_rows, n_tokens, machine.memory):
                    left_out.append(f"{label}: {reason}")
                    continue
                prompts_BP = np.random.default_rng(0).integers(config.n_vocab, size=(n_rows, n_prompt))
                times, failed = measure(names, folder, args, machine.where, prompts_BP)
                left_out += [f"{label}, {name}: {reason}" for name, reason in failed.items()]
                for cells in table_rows(times, config, dtypes, (n_rows, n_prompt), machine.bandwidth):
                    say(f"| {label} | {' | '.join(cells)} |")
    for line in left_out:
        say(f"\nLeft out: {line}.")


if __name__ == "__main__":
    main(parse_args())
