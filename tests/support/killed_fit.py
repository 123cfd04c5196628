"""Trains a model. test_fit_killed.py kills it. The arguments are the folders of tokens and of the compilation cache."""

import sys
from pathlib import Path

import forks
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

N_STEPS = 24
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
    """Tokens for a few epochs that a model can learn: each is twice the one before, with some noise."""
    folder.mkdir()
    rng = np.random.default_rng(5)
    for name, n_tokens in (("train", 307), ("val", 71)):
        ids = [3]
        for noise in rng.integers(0, 4, n_tokens - 1):
            ids.append((2 * ids[-1] + (noise == 0)) % CONFIG.n_vocab)
        np.array(ids, "<u2").tofile(folder / f"{name}.bin")


def first_params():
    """Random weights without JAX, because JAX must not start before the forks."""
    rng, shapes = np.random.default_rng(7), flatten(gpt2_jax.abstract_params(CONFIG))
    return unflatten({name: rng.normal(0, 0.3, leaf.shape).astype(np.float32) for name, leaf in shapes.items()})


def work(say, run):
    """Train to the end, or resume from the newest checkpoint. Send a message after each step."""
    data, cache = sys.argv[1:]
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    step = loop.Report.step

    def told(*args, **named):
        step(*args, **named)
        say()

    loop.Report.step = told
    prepared = open_prepared(data, n_vocab=CONFIG.n_vocab)
    fit(make_plan(CONFIG, RECIPE), first_params(), prepared, run)


if __name__ == "__main__":
    forks.serve(work)
