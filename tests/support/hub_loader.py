"""Loads from the hub, for test_hub.py. Each call is a fork: huggingface_hub reads its settings when it is imported."""

import os
import sys

import checkpoint_forms as forms
import forks
import jax  # noqa: F401  these are imported here once, not in each fork
import safetensors.numpy  # noqa: F401

import gpt2_jax
from gpt2_jax.checkpoints import loading  # noqa: F401


def work(say, name, functions, env, err):
    """Send the result of each function, and which heavy libraries were imported. Warnings go to the file `err`."""
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    assert "huggingface_hub" not in sys.modules
    for key in [key for key in os.environ if key.startswith(("HF_", "HUGGING"))]:
        del os.environ[key]
    os.environ.update(env)
    answer = {}
    for function in functions:
        if function == "load_tokenizer":
            answer[function] = gpt2_jax.load_tokenizer(name).encode("First Citizen:")
        elif function == "load_config":
            answer[function] = gpt2_jax.load_config(name).to_hparams()
        else:
            config, params = gpt2_jax.load(name)
            answer[function] = forms.difference(params, forms.random_model(config))
    say(answer | {"imported": sorted({"tensorflow", "torch", "transformers"} & sys.modules.keys())})


if __name__ == "__main__":
    forks.serve(work)
