"""Text to documents to tokens to batches, and vocabularies from text.

`sources` reads documents, `encoding` makes them tokens, `splitting` divides them, `token_files` keeps them and
`batching` reads them a window at a time; `bpe` trains a vocabulary. Not here: reading a vocabulary and encoding a text
(`gpt2_jax.tokenizer`), and what a model or an optimizer does with batches (`gpt2_jax.training`).
"""

from gpt2_jax.data._prepare import prepare
from gpt2_jax.data.batching import Batch, batches, windows
from gpt2_jax.data.bpe import train_tokenizer, write_tokenizer
from gpt2_jax.data.token_files import Prepared, Tokens, open_prepared

__all__ = [
    "Batch",
    "Prepared",
    "Tokens",
    "batches",
    "open_prepared",
    "prepare",
    "train_tokenizer",
    "windows",
    "write_tokenizer",
]
