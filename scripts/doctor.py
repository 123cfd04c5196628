"""Report on the installation, or verify a model. `python scripts/doctor.py --help` shows the options."""

from gpt2_jax.commands.start import doctor

if __name__ == "__main__":
    doctor()
