"""Inspect a model before you use it. `python scripts/inspect_checkpoint.py --help` shows the options."""

from gpt2_jax.commands.start import inspect

if __name__ == "__main__":
    inspect()
