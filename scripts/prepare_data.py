"""Turn text into token files for training. `python scripts/prepare_data.py --help` shows the options."""

from gpt2_jax.commands.start import prepare

if __name__ == "__main__":
    prepare()
