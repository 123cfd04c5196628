"""Prepares a text over existing files. test_prepare.py kills it."""

import forks

import gpt2_jax
from gpt2_jax.data._prepare import prepare

if __name__ == "__main__":
    tokenizer = gpt2_jax.load_tokenizer(gpt2_jax.embedded_model())

    def work(say, source, target):
        say()
        prepare([source], target, tokenizer, overwrite=True)

    forks.serve(work)
