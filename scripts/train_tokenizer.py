"""Train a vocabulary on a new corpus. `python scripts/train_tokenizer.py --help` shows the options."""

from gpt2_jax.commands.start import train_tokenizer

if __name__ == "__main__":
    train_tokenizer()
