"""Prepares a text over existing files. test_prepare.py and test_prepare_parts.py kill it."""

import forks

import gpt2_jax
from gpt2_jax.data import encoding, parts, reading
from gpt2_jax.data._prepare import prepare
from gpt2_jax.processes import Share

if __name__ == "__main__":
    tokenizer = gpt2_jax.load_tokenizer(gpt2_jax.embedded_model())

    def work(say, source, target, small=0):
        """With `small`, blocks have so many bytes, and units four of them."""
        share = None
        if small:
            reading.BLOCK, encoding.BLOCK, parts.BLOCKS, share = small, 101, (4, 4), Share()
        say()
        prepare([source], target, tokenizer, n_workers=1 if small else 0, overwrite=not small, share=share)

    forks.serve(work)
