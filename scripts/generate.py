"""Continue prompts with GPT-2. `python scripts/generate.py --help` shows the options."""

from gpt2_jax.commands.start import generate

if __name__ == "__main__":
    generate()
