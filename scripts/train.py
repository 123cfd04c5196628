"""Train or fine-tune a model with a recipe. `python scripts/train.py --help` shows the options."""

from gpt2_jax.commands.start import train

if __name__ == "__main__":
    train()
