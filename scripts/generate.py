"""Continue prompts with GPT-2. `python scripts/generate.py --help` shows the options."""

from gpt2_jax.commands.generate import main

if __name__ == "__main__":
    main()
