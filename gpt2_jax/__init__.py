"""GPT-2 in JAX: the params pytree is OpenAI's checkpoint, and everything else is a pure function over it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpt2_jax import _lazy

if TYPE_CHECKING:
    from gpt2_jax.checkpoints import (
        download_and_load_gpt2,
        embedded_model,
        from_blocks,
        load,
        load_config,
        load_tokenizer,
        save,
        to_blocks,
    )
    from gpt2_jax.config import SIZES, GPT2Config
    from gpt2_jax.generation import classify, generate, score, stream
    from gpt2_jax.kv_cache import KVCache, init_cache
    from gpt2_jax.model import GPT2, Output, abstract_params, init_params
    from gpt2_jax.tokenizer import Tokenizer

__all__ = [
    "GPT2",
    "SIZES",
    "GPT2Config",
    "KVCache",
    "Output",
    "Tokenizer",
    "abstract_params",
    "classify",
    "download_and_load_gpt2",
    "embedded_model",
    "from_blocks",
    "generate",
    "init_cache",
    "init_params",
    "load",
    "load_config",
    "load_tokenizer",
    "save",
    "score",
    "stream",
    "to_blocks",
]

# The module of each public name.
_MODULES = dict.fromkeys(__all__, "checkpoints")
_MODULES |= dict.fromkeys(("GPT2", "Output", "abstract_params", "init_params"), "model")
_MODULES |= {"SIZES": "config", "GPT2Config": "config", "KVCache": "kv_cache", "init_cache": "kv_cache"}
_MODULES |= dict.fromkeys(("classify", "generate", "score", "stream"), "generation") | {"Tokenizer": "tokenizer"}

__getattr__, __dir__ = _lazy.attach(__name__, _MODULES)
