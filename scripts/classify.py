"""Classify texts with a trained classifier. `python scripts/classify.py --help` shows the options."""

from gpt2_jax.commands.start import classify

if __name__ == "__main__":
    classify()
