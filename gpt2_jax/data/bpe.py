"""A vocabulary for a new corpus: byte-level BPE, trained by Hugging Face tokenizers, with ids in OpenAI's order."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path

from gpt2_jax import files
from gpt2_jax.checks import whole_number
from gpt2_jax.data.fields import Fields
from gpt2_jax.data.sources import Sources
from gpt2_jax.tokenizer import END_OF_TEXT, OPENAI_FILES, Tokenizer

MIN_FREQUENCY = 2  # a pair that occurs once is not worth a token
N_BYTES = 256


def train_tokenizer(
    sources: Sequence[str | os.PathLike], n_merges: int = 50_000, *, field: str = "text", shown: bool = False
) -> Tokenizer:
    """Train a vocabulary: the ids are the 256 bytes in OpenAI's order, a token for each merge, and `<|endoftext|>`.

    Text is first split by GPT-2's pattern. If pairs occur equally often, the pair with the lower ids merges first.

    Args:
      sources: files of text, folders of such files, or "-", as in `prepare`.
      n_merges: maximum number of merges; there are fewer if no more pairs occur twice. GPT-2 has 50,000.
      field: the field of JSON objects, or the column of tables, that contains the text.
      shown: show a progress bar on standard error.

    Raises:
      FileNotFoundError: a source does not exist.
      ValueError: a source is malformed, or there is no text.
    """
    from tokenizers import Tokenizer as Trained
    from tokenizers import models, pre_tokenizers, trainers

    n_merges = whole_number("n_merges", n_merges)
    found = Sources(sources, Fields(field))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # by code point: OpenAI's order of the bytes
    trained = Trained(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=N_BYTES + n_merges, min_frequency=MIN_FREQUENCY, initial_alphabet=alphabet, show_progress=shown
    )
    trained.train_from_iterator((_text(piece.text) for piece in found.pieces()), trainer)
    if not found.n_read or not trainer.get_word_count():
        raise ValueError(f"there is no text in {len(found.files)} files with {found.n_bytes:,} bytes in total")
    merges = {}
    for left, right in json.loads(trained.to_str())["model"]["merges"]:
        # A run of one character can become the same token twice, as "aa a" and "a aa". Only the first is kept: encoding
        # depends on the merged token, and not on how it is divided.
        merges.setdefault(left + right, (left, right))
    tokens = {token: i for i, token in enumerate([*alphabet, *merges, END_OF_TEXT])}
    return Tokenizer(tokens, merges.values(), "the trained tokens", "the trained merges")


def write_tokenizer(folder: str | os.PathLike, tokenizer: Tokenizer, overwrite: bool = False) -> Path:
    """Write encoder.json and vocab.bpe into a new folder, in one step; return the folder.

    Raises:
      FileExistsError: the folder is not empty, and `overwrite` is False or it contains more than a vocabulary.
    """
    folder = files.expanded(folder)
    check = functools.partial(check_replaceable, folder, overwrite)
    check()
    with files.replacing(folder, check) as temporary:
        tokenizer.to_files(*(temporary / name for name in OPENAI_FILES))
    return folder


def check_replaceable(folder: Path, overwrite: bool) -> None:
    """Check that this folder may be written.

    Raises:
      FileExistsError: the folder is not empty, and `overwrite` is False or it contains more than a vocabulary.
    """
    files.check_replaceable(folder, "a vocabulary", lambda names: names - {*OPENAI_FILES}, overwrite)


def _text(text: object) -> str:
    """Return a text that UTF-8 can encode; JSON may contain half of a surrogate pair."""
    return str(text).encode(errors="surrogatepass").decode(errors="replace")
