"""Weights and vocabularies in and out, one module a format; `load` tells the formats apart, `save` writes each.

The formats are `tensorflow`, `huggingface` and `orbax`, and `parts`, the checkpoints of a training run, whose folder is
`runs`. Not here: fetching the released files (`gpt2_jax.release`); replacing and locking files (`gpt2_jax.files`); when
a run saves, and its optimizer's state (`gpt2_jax.training`).
"""

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
