"""Download OpenAI's GPT-2. `python scripts/download.py --help` shows the options."""

from gpt2_jax.commands.download import main

if __name__ == "__main__":
    main()
