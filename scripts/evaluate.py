"""Measure how good a model is. `python scripts/evaluate.py --help` shows the options."""

from gpt2_jax.commands.evaluate import main

if __name__ == "__main__":
    main()
