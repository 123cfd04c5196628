"""Time the activations of a dataset, written to files, against a loop over TransformerLens's run_with_cache.

COMMAND: python benchmarks/harvest.py [--texts 10000] [--tokens 128] [--output FILE.md]

Needs Linux, and the `parity` extra with transformer-lens. Runs on the CPU: four minutes on two cores. The model is
small and has random weights. All texts have the same length, so that neither side needs padding. Both sides store one
activation of all tokens in .npy files, and compute no block above it. The batch size and the kind of attention of the
loop are those that are fastest in a trial.

Each library runs in its own process, and they take turns.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from patching import ROWS, product_rate
from turns import ENVIRONMENT, Report, Turns, alone, best_of, forget_peak, peak_bytes, ratio

SHAPE = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 128, "n_head": 4, "n_layer": 4}
LAYER = 2
NAMES = {
    "resid_post": (f"h{LAYER}/resid_post", f"blocks.{LAYER}.hook_resid_post"),
    "mlp/post": (f"h{LAYER}/mlp/post", f"blocks.{LAYER}.mlp.hook_post"),
}
BATCHES, ATTENTION = (16, 32, 64), ("sdpa", "eager")
TRIAL = 128  # texts
HEADINGS = "what | seconds | fastest-slowest | tokens/s | x floor | x ours | peak MB"
LEGEND = """\
- Ours: `research.harvest`, with shards of 268 MB, each flushed to the disk. The first call compiles, with no cache on
  disk. The hash of the model is part of each call.
- TransformerLens {lens}: its bridge with compatibility mode off, `run_with_cache` with `names_filter` and
  `stop_at_layer`, under `torch.no_grad`, {batch} texts at a time with {attention} attention: the fastest of
  {batches} with {kinds}. Each batch is appended to one .npy file, which is not flushed. Its threads
  sleep while they wait (`OMP_WAIT_POLICY=PASSIVE`). By default they spin, and other programs slow them down far more.
- x ours: the time divided by ours, median over the rounds.
- Floor: the operations of {n_blocks} blocks, {tera:.2f}e12, at the rate of plain products of [{rows}, D] with two
  matrices of an MLP, measured in our process at each turn: {rate} GFLOP/s. It has no softmax, no GELU, no layer
  normalization and no files.
- Computation alone: our programs over all batches, without fetching and writing. Files alone: our shards, written and
  flushed.
- Peak MB: what a call adds to the peak resident memory of its process. Our first call includes the compiler."""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--texts", type=int, default=10_000, help="number of texts")
    add("--tokens", type=int, default=128, help="tokens of each text")
    add("--activation", default="resid_post", choices=NAMES, help=f"what is stored, of block {LAYER} (counted from 0)")
    add("--rounds", type=int, default=3, help="runs of each library")
    add("--output", type=Path, metavar="FILE.md", help="also write the table to this file")
    return parser.parse_args()


def operations(n_tokens: int) -> int:
    """Return the floating-point operations of the blocks for one text, with full attention matrices halved."""
    width = SHAPE["n_embd"]
    return (LAYER + 1) * (24 * width**2 * n_tokens + 2 * width * n_tokens**2)


def texts(n_texts: int, n_tokens: int) -> np.ndarray:
    """Return the ids of the texts."""
    return np.random.default_rng(0).integers(0, SHAPE["n_vocab"], (n_texts, n_tokens))


def save_model(folder: Path) -> None:
    """Write random weights in Hugging Face's format, in a separate process."""
    import jax

    import gpt2_jax

    config = gpt2_jax.GPT2Config(**SHAPE)
    gpt2_jax.save(folder / "hf", config, gpt2_jax.init_params(config, jax.random.key(0)), format="huggingface")


# ---- in the libraries' processes


def timed(target: Path) -> tuple[float, int]:
    """Return the seconds of a run into a new folder, and the bytes that it adds to the peak resident memory."""
    shutil.rmtree(target, ignore_errors=True)
    forget_peak("cpu")
    held, begin = peak_bytes("cpu"), time.perf_counter()
    harvested(target)
    return time.perf_counter() - begin, peak_bytes("cpu") - held


def start_ours(folder: Path, args: argparse.Namespace) -> None:
    """Load the model, and set the globals harvested(target), computed() and written(target)."""
    import jax

    import gpt2_jax
    from gpt2_jax import research
    from gpt2_jax.research import _harvest_files, _harvest_plan, _harvest_program

    global harvested, computed, written
    config, params = gpt2_jax.load(folder / "hf")
    documents, name = list(texts(args.texts, args.tokens)), NAMES[args.activation][0]

    def harvested(target: Path) -> None:
        research.harvest(config, params, documents, target, name)

    def computed() -> None:
        """Run the programs over all batches."""
        plan = _harvest_plan.make_plan(config, documents, config.n_ctx, 0, 10**9)
        program, waiting = _harvest_program.Program(config, params, (name,), np.dtype(np.float32), 512), None
        for batch in _harvest_plan.batches(plan, [0], program.tokens_per_call, 1):
            results = program.start(plan, batch)
            jax.block_until_ready(waiting)
            waiting = results
        jax.block_until_ready(waiting)

    def written(source: Path, target: Path) -> float:
        """Write the shards of a harvest again. Return the seconds without reading them."""
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        stored, seconds = research.open_activations(source), 0.0
        plan = _harvest_plan.make_plan(config, documents, config.n_ctx, 0, 10**9)
        writer = _harvest_files.Writer(target, plan, {}, np.dtype(np.float32), False)
        for number in range(len(stored.manifest["shards"])):
            arrays = {one: np.array(stored[one].shard(number)) for one in (name, "tokens", "document", "position")}
            begin = time.perf_counter()
            writer.write(number, arrays)
            seconds += time.perf_counter() - begin
        return seconds


def parts(source: Path, target: Path) -> tuple[float, float]:
    """Return the seconds of computation alone, and of the files alone."""
    begin = time.perf_counter()
    computed()
    return time.perf_counter() - begin, written(source, target)


def start_theirs(folder: Path, args: argparse.Namespace) -> tuple[int, str]:
    """Load the model, choose the fastest way, and set the global harvested(target). Return that way."""
    import tokenizers
    import torch
    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    global harvested
    torch.set_grad_enabled(False)
    transformers.utils.logging.disable_progress_bar()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"0": 0}, unk_token="0"))  # else the bridge asks the hub
    ids, name = torch.tensor(texts(args.texts, args.tokens)), NAMES[args.activation][1]

    def bridge(kind: str) -> TransformerBridge:
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0")
        model = transformers.GPT2LMHeadModel.from_pretrained(folder / "hf", attn_implementation=kind).eval()
        return TransformerBridge.boot_transformers("gpt2", hf_model=model, tokenizer=tokenizer)

    def run(model: TransformerBridge, batch: int, n_texts: int, target: Path) -> None:
        how = {"names_filter": [name], "stop_at_layer": LAYER + 1, "return_cache_object": False}
        with target.open("wb") as file:
            for start in range(0, n_texts, batch):
                values = model.run_with_cache(ids[start : start + batch], **how)[1][name].numpy()
                if not start:
                    shape = (n_texts * args.tokens, values.shape[-1])
                    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(values).data)

    models, trials = {kind: bridge(kind) for kind in ATTENTION}, {}
    for kind, model in models.items():
        for batch in BATCHES:
            one = (model, batch, min(TRIAL, args.texts), folder / "trial.npy")
            trials[batch, kind] = best_of(2, lambda one=one: run(*one))
    batch, kind = min(trials, key=trials.get)

    def harvested(target: Path) -> None:
        target.mkdir()
        run(models[kind], batch, args.texts, target / "values.npy")

    return batch, kind


# ---- the table


def measure(folder: Path, args: argparse.Namespace) -> tuple[dict[str, list], dict[str, list], tuple[int, str]]:
    """Run both in turns; return the results of `timed`, the rates and parts of our process, and their way."""
    done: dict[str, list] = {"ours": [], "theirs": []}
    more: dict[str, list] = {"rates": [], "parts": []}
    way = []

    def first(name: str, call: Callable) -> None:
        way.append(call(start_ours if name == "ours" else start_theirs, folder, args))
        if name == "ours":
            done[name].append(call(timed, folder / name))

    def once_more(name: str, call: Callable) -> None:
        done[name].append(call(timed, folder / name))
        if name == "ours":
            more["rates"].append(call(product_rate, SHAPE["n_embd"]))
            more["parts"].append(call(parts, folder / name, folder / "again"))

    with Turns(list(done)) as turns:
        turns.take(first)
        turns.rounds(args.rounds, 3600, once_more)
    if turns.failed:
        raise SystemExit("\n".join(f"{name}: {reason}" for name, reason in turns.failed.items()))
    return done, more, way[1]


def difference(folder: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Return the largest difference of the stored values, and the largest value."""
    from gpt2_jax import research

    ours = research.open_activations(folder / "ours")[NAMES[args.activation][0]]
    theirs = np.load(folder / "theirs" / "values.npy", mmap_mode="r")
    errors, largest, first = [], [], 0
    for number, count in enumerate(ours.counts):
        one = ours.shard(number)
        errors.append(np.abs(one - theirs[first : first + count]).max())
        largest.append(np.abs(one).max())
        first += count
    if first != len(theirs):
        raise SystemExit(f"ours has {first} rows, theirs {len(theirs)}")
    return float(max(errors)), float(max(largest))


def row(
    what: str, seconds: Sequence[float], n: int, floor: float, ours: Sequence[float] | None, peak: int | None
) -> str:
    """Return a line of the table."""
    middle = statistics.median(seconds)
    cells = [what, f"{middle:.1f}", f"{min(seconds):.1f}-{max(seconds):.1f}", f"{n / middle:,.0f}"]
    cells += [f"{middle / floor:.2f}", ratio(seconds, ours) if ours else ""]
    return f"| {' | '.join([*cells, f'{peak / 1e6:.0f}' if peak is not None else ''])} |"


def main(args: argparse.Namespace) -> None:
    """Measure and print a Markdown table."""
    # Torch's threads wait for each other in loops. On a machine with other work, that takes many times as long.
    os.environ |= ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "TQDM_DISABLE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    report, busy = Report(args.output), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone(save_model, folder)
        done, more, (batch, attention) = measure(folder, args)
        error, largest = alone(difference, folder, args)
        n_bytes = sum(path.stat().st_size for path in (folder / "ours").rglob("*.npy"))
    n, tera = args.texts * args.tokens, operations(args.tokens) * args.texts / 1e12
    floors = [tera * 1e12 / rate for rate in more["rates"]]
    first, later = done["ours"][0], done["ours"][1:]
    seconds, looped = [call[0] for call in later], [call[0] for call in done["theirs"]]

    say = report.say
    title = f"`{NAMES[args.activation][0]}` of {args.texts:,} texts of {args.tokens} tokens, float32"
    report.title(title, f"{len(os.sched_getaffinity(0))} CPU cores, {processor()}")
    shape = ", ".join(f"{key} {value}" for key, value in SHAPE.items())
    say(f"The model: {shape}. Load when it began: {busy:.1f}. Our files have {n_bytes / 1e6:,.0f} MB.\n")
    rates = "-".join(f"{rate / 1e9:.0f}" for rate in (min(more["rates"]), max(more["rates"])))
    words = {"batches": ", ".join(map(str, BATCHES)), "kinds": " and ".join(ATTENTION), "n_blocks": LAYER + 1}
    words |= {"lens": version("transformer-lens"), "batch": batch, "attention": attention}
    say(LEGEND.format(tera=tera, rows=ROWS, rate=rates, **words) + "\n")
    report.headings(HEADINGS)
    floor = statistics.median(floors)
    say(row("ours, first call", [first[0]], n, floor, None, first[1]))
    say(row("ours, later calls", seconds, n, floor, seconds, max(call[1] for call in later)))
    say(row("computation alone", [one[0] for one in more["parts"]], n, floor, seconds, None))
    say(row("files alone", [one[1] for one in more["parts"]], n, floor, seconds, None))
    say(row("TransformerLens, the loop", looped, n, floor, seconds, max(call[1] for call in done["theirs"])))
    say(row("floor", floors, n, floor, seconds, None))
    say(f"\nLargest difference of a value between the two: {error:.1e}. The largest value is {largest:.3g}.")


def processor() -> str:
    """Return the name of the processor, with its widest vectors."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    vectors = [name for name in ("avx512f", "avx2") if name in fields.get("flags", "").split()]
    return " with ".join([fields.get("model name", "unknown"), *(vector.upper() for vector in vectors[:1])])


if __name__ == "__main__":
    main(parse_args())
