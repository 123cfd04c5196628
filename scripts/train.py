"""Train or fine-tune a model with a recipe. `python scripts/train.py --help` shows the options."""

from gpt2_jax.commands.train import main

if __name__ == "__main__":
    main()
