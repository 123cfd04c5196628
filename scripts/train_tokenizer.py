"""Train a vocabulary on a new corpus. `python scripts/train_tokenizer.py --help` shows the options."""

from gpt2_jax.commands.train_tokenizer import main

if __name__ == "__main__":
    main()
