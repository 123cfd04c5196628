"""The older name of train.py. `python scripts/finetune.py --help` shows the options."""

from gpt2_jax.commands.start import finetune

if __name__ == "__main__":
    finetune()
