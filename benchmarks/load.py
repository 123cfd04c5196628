"""Time and peak memory of loading a model against Hugging Face torch, each in a new process, with imports.

COMMAND: python benchmarks/load.py     (the 124M shape, 2 GB of scratch disk, 3 minutes on two CPU cores)

The time includes the sum of every array on the device, so that all data is read. The first load of a TensorFlow
checkpoint uses TensorFlow and keeps a copy; the second load reads the copy. `before` is the peak memory of a process
that has only imported jax (torch and transformers for theirs).
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import tyro

PEAK = "int(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM'))) * 1024"
OURS = """
import time; start = time.perf_counter()
import jax, gpt2_jax
config, params = gpt2_jax.load({model!r})
sums = jax.block_until_ready(jax.jit(lambda tree: [x.sum() for x in jax.tree.leaves(tree)])(params))
seconds = time.perf_counter() - start
"""
THEIRS = """
import time; start = time.perf_counter()
import transformers; transformers.utils.logging.disable_progress_bar()
model = transformers.GPT2LMHeadModel.from_pretrained({model!r})
sums = [float(p.sum()) for p in model.parameters()]
seconds = time.perf_counter() - start
"""
BEFORE = {OURS: "import time, jax; jax.devices(); seconds = 0.0", THEIRS: "import torch, transformers; seconds = 0.0"}


@dataclasses.dataclass
class Args:
    """Compare loading a model with Hugging Face torch."""

    size: Literal["124M", "355M", "774M", "1558M"] = "124M"
    """Size of the model; its weights are random."""
    repeats: int = 5
    """Runs of each row. The rows take turns, and the table has medians."""


def main(args: Args) -> None:
    """Write the checkpoints, measure, and print a Markdown table."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"GPT2_JAX_CACHE": f"{scratch}/cache", "HF_HUB_OFFLINE": "1"}
        models = {format: f"{scratch}/{format}" for format in ("tensorflow", "huggingface", "orbax")}
        for format, directory in models.items():
            command = [sys.executable, Path(__file__).with_name("random_checkpoint.py"), args.size, directory]
            subprocess.run([*command, "--format", format], check=True)
        rows = {
            "ours, TensorFlow, first load": (OURS, models["tensorflow"], True),
            "ours, TensorFlow, second load": (OURS, models["tensorflow"], False),
            "ours, Hugging Face's form": (OURS, models["huggingface"], False),
            "ours, Orbax": (OURS, models["orbax"], False),
            "Hugging Face torch, from_pretrained": (THEIRS, models["huggingface"], False),
        }
        measured = {name: [] for name in rows}
        for _ in range(args.repeats):
            for name, (program, model, make_copy) in rows.items():
                if make_copy:
                    for copy in Path(f"{scratch}/cache/copies").glob("*"):
                        copy.unlink()
                measured[name].append(_run(program.format(model=model)))
        before = {program: _run(bare)["peak"] for program, bare in BEFORE.items()}
        n_bytes = sum(path.stat().st_size for path in Path(models["tensorflow"]).glob("*.data-*"))
    second = statistics.median(run["seconds"] for run in measured["ours, TensorFlow, second load"])
    print(f"{args.size}, {n_bytes:,} bytes of weights, float32; medians of {args.repeats} runs\n")
    print("| load | seconds | times the second load | peak memory over `before`, in weights | before, MB |")
    print("|---|---|---|---|---|")
    for name, (program, *_) in rows.items():
        seconds = statistics.median(run["seconds"] for run in measured[name])
        peak = max(run["peak"] for run in measured[name]) - before[program]
        spread = "-".join(f"{f(run['seconds'] for run in measured[name]):.2f}" for f in (min, max))
        print(
            f"| {name} | {seconds:.2f} ({spread}) | {seconds / second:.2f} | {peak / n_bytes:.2f} "
            f"| {before[program] / 1e6:.0f} |"
        )


def _run(program: str) -> dict[str, float]:
    """Run a program in a new process; the program stores its time in `seconds`."""
    code = f"{program}\nimport json; print(json.dumps({{'seconds': seconds, 'peak': {PEAK}}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main(tyro.cli(Args))
