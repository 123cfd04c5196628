"""Weights and vocabularies in and out, one file a format; `load` tells them apart, `save` writes each."""

from gpt2_jax.checkpoints.book import download_and_load_gpt2, from_blocks, to_blocks
from gpt2_jax.checkpoints.loading import has_vocabulary, load, load_config, load_tokenizer
from gpt2_jax.checkpoints.saving import check_replaceable, save
from gpt2_jax.checkpoints.sources import embedded_model, form_of, locate

__all__ = [
    "check_replaceable",
    "download_and_load_gpt2",
    "embedded_model",
    "form_of",
    "from_blocks",
    "has_vocabulary",
    "load",
    "load_config",
    "load_tokenizer",
    "locate",
    "save",
    "to_blocks",
]
