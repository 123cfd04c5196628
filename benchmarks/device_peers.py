"""Part of benchmarks/device.py: Hugging Face torch on the same device, beside this library's figures."""

from __future__ import annotations

import functools
import importlib.util
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from device_tools import Job, milliseconds, random_prompts, timed
from peers import PEERS
from trainers import PEERS as TRAINERS
from trainers import Case

ROUNDS = 3


def torch_beside(job: Job) -> None:
    """Time torch's decoding and training at 124M, compiled on a GPU and eager on a CPU."""
    if missing := [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]:
        job.left_out.append(f"Hugging Face torch: {' and '.join(missing)} not installed")
        return
    import torch
    import transformers

    where = "gpu" if torch.cuda.is_available() else "cpu"
    if where == "cpu" and not job.tiny:
        job.left_out.append("Hugging Face torch: it finds no GPU")
        return
    name = "torch-compiled" if where == "gpu" else "torch"
    label, config = job.config("124M")
    device = torch.cuda.get_device_name() if where == "gpu" else "the CPU"
    job.say(f"""\
{label}, random weights, torch {torch.__version__}, transformers {transformers.__version__}, {name} on {device}.
Products in bfloat16. Decoding is greedy: each further token of a longer call. A ratio is torch's time divided by ours
in the parts before, n/a if they have no such row.
""")
    job.headings("what | torch, ms | ours, ms | ratio | compile, s")
    with tempfile.TemporaryDirectory() as folder:
        save_random(Path(folder) / "hf", config)
        about = (job, name, Path(folder), where, config)
        cases = {"decode, 1 row": functools.partial(_decode, *about, 1), "train": functools.partial(_train, *about)}
        for n_rows in () if job.tiny else (64, 8):
            cases[f"decode, {n_rows} rows"] = functools.partial(_decode, *about, n_rows)
        job.each(cases)


def save_random(folder: Path, config: Any) -> None:
    """Write random weights in Hugging Face's format, made by transformers."""
    import transformers

    shape = {"vocab_size": config.n_vocab, "n_positions": config.n_ctx, "n_embd": config.n_embd}
    shape |= {"n_head": config.n_head, "n_layer": config.n_layer, "bos_token_id": 0, "eos_token_id": 0}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).save_pretrained(folder)


def _decode(job: Job, name: str, folder: Path, where: str, config: Any, n_rows: int) -> None:
    n_prompt, n_new = (8, 33) if job.tiny else (64, 129)
    prompts = np.array(random_prompts(config, n_rows, n_prompt))
    greedy = PEERS[name].load(folder, "bfloat16", where)
    first = timed(lambda: greedy(prompts, n_new))
    greedy(prompts, 1)
    pairs = [(timed(lambda: greedy(prompts, n_new)), timed(lambda: greedy(prompts, 1))) for _ in range(ROUNDS)]
    step = statistics.median(long - short for long, short in pairs) / (n_new - 1)
    ours = job.figures_of("decode-124M").get(f"{n_rows} rows, greedy")
    _row(job, f"decode, {n_rows} rows, a token", step, ours, first - statistics.median(long for long, _ in pairs))


def _train(job: Job, name: str, folder: Path, where: str, config: Any) -> None:
    n_rows, n_steps = (2, 2) if job.tiny else (8, 20)
    steps = TRAINERS[name].load(folder, Case(n_rows, config.n_ctx, "bfloat16", 1, False), where)
    first = timed(lambda: steps(1))
    steps(2)
    step = statistics.median(timed(lambda: steps(n_steps)) / n_steps for _ in range(ROUNDS))
    ours = job.figures_of("train-124M").get(f"{config.n_layer} layers, {n_rows} rows")
    _row(job, f"training step, {n_rows} x {config.n_ctx}", step, ours, first - step)


def _row(job: Job, what: str, theirs: float, ours: float | None, compiling: float) -> None:
    ratio = f"{theirs / ours:.2f}" if ours else "n/a"
    job.row(what, milliseconds(theirs), milliseconds(ours), ratio, f"{compiling:.1f}")
