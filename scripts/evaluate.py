"""Measure how good a model is. `python scripts/evaluate.py --help` shows the options."""

from gpt2_jax.commands.start import evaluate

if __name__ == "__main__":
    evaluate()
