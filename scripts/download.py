"""Download OpenAI's GPT-2. `python scripts/download.py --help` shows the options."""

from gpt2_jax.commands.start import download

if __name__ == "__main__":
    download()
