"""Turn text into documents, tokens and batches, and train vocabularies on text.

`finding` finds files, `reading` opens and decodes them, and `tables` reads the records of `json_files` and
`table_files`. `sources` makes documents of them, `encoding` turns these into tokens, `splitting` divides them,
`token_files` and `bare` know the files of tokens, and `batching` reads them one window at a time. `examples` are short
texts that are trained on one by one, `templates` makes them from instructions, and `example_batches` puts them into
rows. `bpe` trains a vocabulary. Not in this package: reading a vocabulary and encoding one text (`gpt2_jax.tokenizer`),
and training on batches (`gpt2_jax.training`).
"""

from gpt2_jax.data._prepare import prepare
from gpt2_jax.data.batching import Batch, batches, windows
from gpt2_jax.data.bpe import train_tokenizer, write_tokenizer
from gpt2_jax.data.conversations import Conversation, Turn
from gpt2_jax.data.templates import TEMPLATES, Template, load_template
from gpt2_jax.data.token_files import Prepared, Tokens, open_prepared

__all__ = [
    "TEMPLATES",
    "Batch",
    "Conversation",
    "Prepared",
    "Template",
    "Tokens",
    "Turn",
    "batches",
    "load_template",
    "open_prepared",
    "prepare",
    "train_tokenizer",
    "windows",
    "write_tokenizer",
]
