"""Convert a model from one format to another. `python scripts/convert.py --help` shows the options."""

from gpt2_jax.commands.start import convert

if __name__ == "__main__":
    convert()
