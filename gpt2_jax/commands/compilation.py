"""Keeping compiled programs between runs, for the commands."""

from __future__ import annotations

import os

from gpt2_jax.files import cache_dir

LARGEST = 2**30  # bytes of programs; those not used for longest go first


def keep_compiled() -> None:
    """Keep every program that is compiled from here on in the cache folder, and use what is there.

    To be called before anything is compiled. JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false turns it off. Where nothing can be written, nothing is kept: JAX would warn of
    every program.
    """
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        try:
            directory = cache_dir() / "compiled"
            directory.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        if not os.access(directory, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_compilation_cache_max_size", LARGEST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
