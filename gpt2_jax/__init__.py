"""GPT-2 in JAX: the params pytree is OpenAI's checkpoint, and everything else is a pure function over it."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

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
    from gpt2_jax.generation import generate, score, stream
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

# The module of each public name. A name is imported when it is first used, so that what needs no JAX does not wait for
# it: `--help` of a command, a recipe, the tokenizer of a data pipeline.
_MODULES = {
    "GPT2": "model",
    "SIZES": "config",
    "GPT2Config": "config",
    "KVCache": "kv_cache",
    "Output": "model",
    "Tokenizer": "tokenizer",
    "abstract_params": "model",
    "generate": "generation",
    "init_cache": "kv_cache",
    "init_params": "model",
    "score": "generation",
    "stream": "generation",
}


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package, when it is first used."""
    if name in __all__:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'checkpoints')}"), name)
        globals()[name] = value
        return value
    if name in _submodules():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return what is there, and what is imported when it is first used."""
    return sorted({*globals(), *__all__, *_submodules()})


def _submodules() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(__path__)}
