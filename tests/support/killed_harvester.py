"""Stores activations of random texts. test_research_harvest.py kills it."""

import forks
import numpy as np
from tiny_models import CONFIG, random_params

from gpt2_jax import research

CAPTURE = ("h0/attn/q$", "h1/mlp/out$")
HOW = {"max_tokens": 29, "skip_first": 1, "shard_bytes": 9000, "checksums": True}


def some_documents(n=60, longest=70, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.n_vocab, length).tolist() for length in rng.integers(1, longest, n)]


def work(say, target):
    params = random_params(CONFIG, 0)
    say()
    research.harvest(CONFIG, params, some_documents(), target, CAPTURE, check=lambda: say(1), **HOW)


if __name__ == "__main__":
    forks.serve(work)
