"""Load and save weights and vocabularies. `load` recognizes the format, `save` writes any of them.

Each format has a module: `tensorflow`, `huggingface`, `orbax`, and `parts` for the checkpoints of a training run.
`runs` describes a run's folder. Other packages fetch the released files (`gpt2_jax.release`), replace and lock files
(`gpt2_jax.files`), and decide when a run saves its params and its optimizer's state (`gpt2_jax.training`).
"""

from gpt2_jax.checkpoints.adapter import Adapter
from gpt2_jax.checkpoints.adapters import load_adapter, save_adapter
from gpt2_jax.checkpoints.book import download_and_load_gpt2, from_blocks, to_blocks
from gpt2_jax.checkpoints.loading import load, load_config
from gpt2_jax.checkpoints.saving import check_replaceable, save
from gpt2_jax.checkpoints.sources import embedded_model, folder_of, form_of, locate
from gpt2_jax.checkpoints.vocabulary import has_vocabulary, load_tokenizer

__all__ = [
    "Adapter",
    "check_replaceable",
    "download_and_load_gpt2",
    "embedded_model",
    "folder_of",
    "form_of",
    "from_blocks",
    "has_vocabulary",
    "load",
    "load_adapter",
    "load_config",
    "load_tokenizer",
    "locate",
    "save",
    "save_adapter",
    "to_blocks",
]
