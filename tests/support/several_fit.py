"""Trains a tiny model in one of several processes. The arguments: index, number of processes, port, and jobs in JSON.

A job is {"run": folder, "recipe": changes of `RECIPE`}. The result of each is a line on standard output. More entries:
"stop_after": a step after which the last process gets SIGTERM.
"largest_file": a process, and the bytes of the largest file that it can write, as if its disk was full then.
"""

import contextlib
import json
import os
import resource
import signal
import sys
from pathlib import Path
from unittest import mock

import jax

RECIPE = {
    "steps": 12,
    "batch_size": 8,
    "accumulate": 2,
    "model": {
        "source": "",
        "tokenizer": "shakespeare",
        "dropout": 0.2,
        "n_ctx": 13,
        "n_embd": 12,
        "n_head": 3,
        "n_layer": 1,
    },
    "data": {"n_tokens": 11, "val_fraction": 0.2, "split": "tail"},
    "optimizer": {"schedule": "cosine", "learning_rate": 0.003, "clip": 1.0, "weight_decay": 0.1},
    "mesh": {"data": -1, "model": 1},
    "monitor": {"evaluate_every": 5, "save_every": 5, "sample_every": 6, "sample_tokens": 7, "tensorboard": True},
}


def recipe_of(changes):
    """RECIPE with changes; changes of a part are dicts."""
    from training_steps import recipe

    merged = RECIPE | changes
    return recipe(**{k: {**RECIPE.get(k, {}), **v} if isinstance(v, dict) else v for k, v in merged.items()})


@contextlib.contextmanager
def stopped(step):
    """Send SIGTERM to this process, if it is the last one, when it has reported a step."""
    from gpt2_jax.training import report

    kind = report.Silence if jax.process_count() > 1 else report.Report
    reported = kind.step

    def told(self, number, *rest):
        reported(self, number, *rest)
        if number == step and jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(kind, "step", told):
        yield


@contextlib.contextmanager
def small_disk(index, n_bytes):
    """Let a process write no larger file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if jax.process_index() == index:
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def train(job):
    """Train as `gpt2-train` does."""
    from gpt2_jax.training import fit, start_data, start_model

    recipe, run = recipe_of(job["recipe"]), Path(job["run"])
    plan, params, tokenizer = start_model(recipe, run)
    data = start_data(recipe, tokenizer, run / "data")
    with contextlib.ExitStack() as stack:
        if step := job.get("stop_after"):
            stack.enter_context(stopped(step))
        if limit := job.get("largest_file"):
            stack.enter_context(small_disk(*limit))
        fitted = fit(plan, params, data, run, tokenizer, donate=True)
    return {name: value for name, value in vars(fitted).items() if name != "params"}


if __name__ == "__main__":
    index, n, port = map(int, sys.argv[1:4])
    if n > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", n, index)
    for job in json.loads(sys.argv[4]):
        jax.config.update("jax_enable_x64", job["recipe"].get("compute_dtype") == "float64")
        try:
            print(json.dumps(train(job)), flush=True)
        except (ValueError, OSError) as error:
            print(f"{type(error).__name__}: {error}", flush=True)
