"""Training runs of a model with the embedded vocabulary that compiles in a second."""

import contextlib
import json
from pathlib import Path
from unittest import mock

import commands
import jax
import numpy as np
import numpy_reference
import tiny_models
from training_steps import recipe

import gpt2_jax
from gpt2_jax.training import loop, prepare

CONFIG = gpt2_jax.GPT2Config(n_vocab=1281, n_ctx=13, n_embd=6, n_head=3, n_layer=1)
TEXT = "".join(f"The {i % 7} of {'thee' if i % 3 else 'thou'} and the {i * i % 11}.\n" for i in range(83))
CURVE = loop.CURVE
TIMES = {"seconds", "tokens_per_second", "mfu"}
QUIET = {"evaluate_every": 0, "sample_every": 0, "tensorboard": False}
SMALL = {"steps": 4, "batch_size": 3, "data": {"n_tokens": 11}, "optimizer": {"learning_rate": 0.01}, "monitor": QUIET}


def small(**changes):
    """A recipe of four steps without dropout, at a constant learning rate."""
    return recipe(**(SMALL | changes))


def params():
    return tiny_models.random_params(CONFIG, 7, scale=0.3)


def prepared(folder, tokenizer, text=TEXT, **settings):
    """TEXT as prepared tokens in a folder: a fifth, its end, is for validation."""
    (folder / "text.txt").write_text(text)
    settings = {"val_fraction": 0.2, "split": "tail", "shown": False} | settings
    return prepare([folder / "text.txt"], folder / "tokens", tokenizer, **settings)


def mean_nats(params, n_head, tokens, targets):
    """Nats per token, by NumPy."""
    logits = numpy_reference.forward(params, np.asarray(tokens), n_head)
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, np.asarray(targets)[..., None], -1).mean()


def records(run: Path) -> list[dict]:
    """The records of metrics.jsonl without the values that depend on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


@contextlib.contextmanager
def compiled_once(folder):
    """Cache compiled programs, because each `fit` would compile them again. Do not plot the loss curve."""
    with commands.config_of_jax_kept(), mock.patch.object(loop, "plot_curve"):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        yield
