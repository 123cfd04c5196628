"""The command lines, packed into the package as `gpt2_jax.scripts` for the installed commands."""
