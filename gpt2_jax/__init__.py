"""GPT-2 in JAX: the params pytree is OpenAI's checkpoint, and everything else is a pure function over it."""

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
