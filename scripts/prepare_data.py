"""Turn text into token files for training. `python scripts/prepare_data.py --help` shows the options."""

from gpt2_jax.commands.prepare import main

if __name__ == "__main__":
    main()
