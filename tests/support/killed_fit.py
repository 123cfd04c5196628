"""A helper process of test_fit_killed.py: it forks one that trains, for each line of JSON on its input, and kills it.

Line: {"run", and one of "operation": before which operation on the run's files after the first step it is killed,
"delay": seconds after the first step until it is, or neither: it goes on to the end}. Answer: {"killed", "error"}.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import grain  # noqa: F401  these are imported here once, not in each fork
import jax
import matplotlib.figure  # noqa: F401
import numpy as np
import training_steps
from matplotlib.backends import backend_agg  # noqa: F401
from orbax.checkpoint import v1  # noqa: F401

import gpt2_jax
from gpt2_jax.params import flatten, unflatten
from gpt2_jax.training import fit, loop, make_plan, open_prepared

N_STEPS = 40
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
CONFIG = training_steps.CONFIG.replace(n_embd=6)
RECIPE = training_steps.recipe(
    steps=N_STEPS,
    batch_size=4,
    model={"dropout": 0.2},
    data={"n_tokens": training_steps.N_TOKENS},
    optimizer={"schedule": "cosine", "warmup_steps": 5, "learning_rate": 0.03, "clip": 1.0, "weight_decay": 0.1},
    monitor={"evaluate_every": 8, "save_every": 3, "tensorboard": False},
)


def write_text(folder: Path) -> None:
    """Tokens that can be learned, of some epochs in all: each is the double of the one before, but for some noise."""
    folder.mkdir()
    rng = np.random.default_rng(5)
    for name, n_tokens in (("train", 307), ("val", 71)):
        ids = [3]
        for noise in rng.integers(0, 4, n_tokens - 1):
            ids.append((2 * ids[-1] + (noise == 0)) % CONFIG.n_vocab)
        np.array(ids, "<u2").tofile(folder / f"{name}.bin")


def first_params():
    """Random weights, without JAX: it must not begin before the forks."""
    rng, shapes = np.random.default_rng(7), flatten(gpt2_jax.abstract_params(CONFIG))
    return unflatten({name: rng.normal(0, 0.3, leaf.shape).astype(np.float32) for name, leaf in shapes.items()})


class Watch:
    """Counts operations on the run's files from when it is told to begin, and kills the process before one of them."""

    def __init__(self, run: str, last: int):
        self.run, self.left = run, last
        self.begun = False

    def __call__(self, event, args):
        if self.begun and event in OPERATIONS and str(args[0]).startswith(self.run):
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1


def train(run: str, data: str, cache: str, operation: int | None, pipe: int) -> None:
    """What the fork does: never returns."""
    error = ""
    try:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        watch = Watch(run, -1 if operation is None else operation)
        step = loop.Report.step

        def told(*args, **named):
            step(*args, **named)
            if not watch.begun:
                watch.begun = True
                os.write(pipe, b".")

        loop.Report.step = told  # where the first step is over
        sys.addaudithook(watch)
        prepared = open_prepared(data, n_vocab=CONFIG.n_vocab)
        fit(make_plan(CONFIG, RECIPE), first_params(), prepared, run)
    except BaseException as caught:
        error = f"{type(caught).__name__}: {caught}"
    os.write(pipe, b"." + error.encode())
    os._exit(0)


def one_round(data: str, cache: str, run: str, operation: int | None = None, delay: float | None = None) -> dict:
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        train(run, data, cache, operation, send)
    os.close(send)
    os.read(receive, 1)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(receive, "rb") as pipe:
        told = pipe.read().decode()
    return {"killed": os.WIFSIGNALED(status), "error": told.lstrip(".")}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(one_round(*sys.argv[1:], **json.loads(line))), flush=True)
