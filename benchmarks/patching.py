"""Time activation patching of every head at every position against TransformerLens's loop; print a table.

COMMAND: python benchmarks/patching.py [--size 124M] [--tokens 32] [--sample 64] [--output FILE.md]

Needs Linux, and the `parity` extra with transformer-lens. Runs on the CPU: 124M takes five minutes on two cores. The
weights are random, and the batch has one row. The metric is the logit difference of two tokens at the last position.
Ours does all patches in one compiled call. TransformerLens runs the whole model for each patch, so each takes the same
time. Its loop therefore runs over a sample, spread evenly over the grid, and the total is calculated from that.

Each library runs in its own process, and they take turns.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from turns import ENVIRONMENT, SIZES, Report, Turns, alone, best_of, forget_peak, peak_bytes, ratio, save_weights

if TYPE_CHECKING:
    from gpt2_jax import GPT2Config

ANSWER, WRONG = 11, 13
ROWS = 512  # rows of the products that measure the rate: about as many as the tokens that are computed together
HEADINGS = "what | seconds | fastest-slowest | patches/s | x floor | x ours | peak MB"
LEGEND = """\
- Ours: one call for all {n:,} patches (`attn/z` of each head at each position). The first call compiles, with no cache
  on disk.
- TransformerLens {lens}: its bridge with compatibility mode off, and its own `get_act_patch_attn_head_out_by_pos`
  without gradients. It runs over {sample} patches of the grid. The time for all patches is calculated from these.
- x ours: the time divided by ours, median over the rounds.
- Floor: the time of the operations that come after each patch: the rest of its layer, the layers above, and the logits
  of one position, {tera:.2f}e12 operations in all. The rate is that of plain products of [{rows}, D] with a layer's two
  largest matrices, measured in our process at each turn: {rate} GFLOP/s.
- Peak MB: what a call adds to the peak resident memory of its process. Our first call includes the compiler."""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--size", default="124M", choices=SIZES, help="size of the model; its weights are random")
    add("--tokens", type=int, default=32, help="tokens in the row")
    add("--sample", type=int, default=64, help="patches in TransformerLens's loop in each round")
    add("--rounds", type=int, default=3, help="runs of each library")
    add("--output", type=Path, metavar="FILE.md", help="also write the table to this file")
    return parser.parse_args()


def operations(config: GPT2Config, n_tokens: int) -> int:
    """Return the floating-point operations after a patch of attn/z, summed over all heads and positions."""
    width = config.n_embd
    block = 24 * width**2 * n_tokens + 4 * width * n_tokens**2
    rest = 18 * width**2 * n_tokens  # c_proj and the MLP
    head = 2 * width * config.n_vocab
    of_layers = sum(above * block + rest + head for above in range(config.n_layer))
    return of_layers * config.n_head * n_tokens


def both_runs(n_vocab: int, n_tokens: int) -> np.ndarray:
    """Return the tokens of the run that is patched and of the source run, [2, 1, T]."""
    return np.random.default_rng(0).integers(0, n_vocab, (2, 1, n_tokens))


# ---- in the libraries' processes


def timed(*args: np.ndarray) -> tuple[float, int, np.ndarray]:
    """Return the seconds of a call, the bytes that it adds to the peak resident memory, and the metrics."""
    forget_peak("cpu")
    held, begin = peak_bytes("cpu"), time.perf_counter()
    metrics = patched(*args)
    return time.perf_counter() - begin, peak_bytes("cpu") - held, metrics


def start_ours(folder: Path, n_tokens: int) -> None:
    """Load the model, capture activations, and set the global patched() -> [layers, heads, positions]."""
    import jax

    import gpt2_jax
    from gpt2_jax import research

    global patched
    config, params = gpt2_jax.load(folder / "hf")
    tokens_BT, source_BT = both_runs(config.n_vocab, n_tokens)
    _, source = research.forward(config, params, source_BT, capture="attn/z$")
    metric = research.logit_difference(ANSWER, WRONG)
    jax.block_until_ready(source)

    def patched() -> np.ndarray:
        args = (config, params, tokens_BT, source, metric, "attn/z")
        return np.asarray(research.activation_patching(*args, each=("head", "position")))


def start_theirs(folder: Path, n_tokens: int) -> None:
    """Load the model, capture activations, and set the global patched(places [P, 3]: layer, head, position) -> [P]."""
    import pandas
    import tokenizers
    import torch
    import transformers
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge

    global patched
    torch.set_grad_enabled(False)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.GPT2LMHeadModel.from_pretrained(folder / "hf", attn_implementation="eager").eval()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"0": 0}, unk_token="0"))  # else the bridge asks the hub
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0")
    bridge = TransformerBridge.boot_transformers("gpt2", hf_model=model, tokenizer=tokenizer)
    tokens_BT, source_BT = map(torch.tensor, both_runs(model.config.vocab_size, n_tokens))
    _, source = bridge.run_with_cache(source_BT)

    def metric(logits_BTV: torch.Tensor) -> torch.Tensor:
        return logits_BTV[0, -1, ANSWER] - logits_BTV[0, -1, WRONG]

    def patched(places: np.ndarray) -> np.ndarray:
        rows = pandas.DataFrame(places[:, [0, 2, 1]], columns=["layer", "pos", "head"])
        which = {"index_df": rows, "index_axis_names": None}
        return patching.get_act_patch_attn_head_out_by_pos(bridge, tokens_BT, source, metric, **which).numpy()


def product_rate(width: int) -> float:
    """Return the operations per second of products only: [ROWS, D] by [D, 4 D] and back, over eight layers."""
    import jax

    keys = jax.random.split(jax.random.key(0), 8)
    weights = [(jax.random.normal(key, (width, 4 * width)), jax.random.normal(key, (4 * width, width))) for key in keys]

    @jax.jit
    def through(x: jax.Array, weights: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
        for up, down in weights:
            x = (x @ up @ down) / (2 * width)
        return x

    x = jax.random.normal(keys[0], (ROWS, width))
    seconds = best_of(20, lambda: through(x, weights).block_until_ready())
    return len(weights) * 4 * ROWS * 4 * width**2 / seconds


# ---- the table


def measure(folder: Path, args: argparse.Namespace, config: GPT2Config) -> tuple[dict[str, list], list[float], str]:
    """Run both in turns; return the results of `timed` by library, the rates of products, and how well they agree."""
    n_all = config.n_layer * config.n_head * args.tokens
    grid = (config.n_layer, config.n_head, args.tokens)
    sample = np.unique(np.linspace(0, n_all - 1, args.sample).astype(int))
    places = np.stack(np.unravel_index(sample, grid), axis=-1)
    start = {"ours": start_ours, "theirs": start_theirs}
    begin = {"ours": (), "theirs": (places[:4],)}  # a first call: it compiles, or warms up
    later = {"ours": (), "theirs": (places,)}
    done, rates = {}, []

    def first(name: str, call: Callable) -> None:
        call(start[name], folder, args.tokens)
        done[name] = [call(timed, *begin[name])]

    def once_more(name: str, call: Callable) -> None:
        done[name].append(call(timed, *later[name]))
        if name == "ours":
            rates.append(call(product_rate, config.n_embd))

    with Turns(list(start)) as turns:
        turns.take(first)
        turns.rounds(args.rounds, 3600, once_more)
    if turns.failed:
        raise SystemExit("\n".join(f"{name}: {reason}" for name, reason in turns.failed.items()))
    ours, theirs = done["ours"][-1][2], done["theirs"][-1][2]
    error = np.abs(ours.reshape(-1)[sample] - theirs).max()
    return done, rates, f"{error:.1e}, where patches change it by up to {np.ptp(ours):.1e}"


def row(
    what: str, seconds: Sequence[float], n: int, floor: float, ours: Sequence[float] | None, peak: int | None
) -> str:
    """Return a line of the table."""
    middle = statistics.median(seconds)
    cells = [what, f"{middle:.1f}", f"{min(seconds):.1f}-{max(seconds):.1f}", f"{n / middle:.0f}"]
    cells += [f"{middle / floor:.2f}", ratio(seconds, ours) if ours else ""]
    return f"| {' | '.join([*cells, f'{peak / 1e6:.0f}' if peak is not None else ''])} |"


def main(args: argparse.Namespace) -> None:
    """Measure and print a Markdown table."""
    os.environ |= ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "TQDM_DISABLE": "1"}
    import gpt2_jax

    config, report, busy = gpt2_jax.SIZES[args.size], Report(args.output), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        alone(save_weights, args.size, True, Path(folder))
        done, rates, agreement = measure(Path(folder), args, config)
    n, tera = config.n_layer * config.n_head * args.tokens, operations(config, args.tokens) / 1e12
    floors = [tera * 1e12 / rate for rate in rates]
    first, later = done["ours"][0], done["ours"][1:]
    seconds = [call[0] for call in later]
    looped = [call[0] / len(call[2]) * n for call in done["theirs"][1:]]

    say, lens = report.say, version("transformer-lens")
    title = f"Patching each head at each of {args.tokens} positions, {args.size}, float32"
    report.title(title, f"{len(os.sched_getaffinity(0))} CPU cores ({platform.machine()})")
    say(f"Load when it began: {busy:.1f}.\n")
    rate = "-".join(f"{rate / 1e9:.0f}" for rate in (min(rates), max(rates)))
    say(LEGEND.format(n=n, lens=lens, sample=len(done["theirs"][1][2]), tera=tera, rows=ROWS, rate=rate) + "\n")
    report.headings(HEADINGS)
    floor = statistics.median(floors)
    say(row("ours, first call", [first[0]], n, floor, None, first[1]))
    say(row("ours, later calls", seconds, n, floor, seconds, max(call[1] for call in later)))
    say(row("TransformerLens, the loop", looped, n, floor, seconds, max(call[1] for call in done["theirs"])))
    say(row("floor", floors, n, floor, seconds, None))
    say(f"\nLargest difference of a metric between the two: {agreement}.")


if __name__ == "__main__":
    main(parse_args())
