"""Inspect a model before you use it. `python scripts/inspect_checkpoint.py --help` shows the options."""

from gpt2_jax.commands.inspect import main

if __name__ == "__main__":
    main()
