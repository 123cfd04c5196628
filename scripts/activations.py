"""Store the activations of a dataset. `python scripts/activations.py --help` shows the options."""

from gpt2_jax.commands.start import activations

if __name__ == "__main__":
    activations()
