"""`load_tokenizer`, and how a vocabulary is found, compared with its model and written beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpt2_jax.checkpoints import huggingface, huggingface_tokenizer, orbax, peft, run_weights, runs, tensorflow
from gpt2_jax.checkpoints.integrity import warn
from gpt2_jax.checkpoints.sources import locate
from gpt2_jax.tokenizer import HUGGING_FACE_FILES, OPENAI_FILES, Tokenizer

OTHER_KINDS = ("vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
PADDING = 1024  # an embedding may have fewer than this many rows more than the vocabulary has ids
MULTIPLE = 8  # programs pad the rows to a multiple of 8, 64 or 128


def load_tokenizer(source: str | os.PathLike) -> Tokenizer:
    """Load a model's tokenizer: OpenAI's encoder.json and vocab.bpe, or the files of Hugging Face's tokenizers.

    Hugging Face's files are read as `AutoTokenizer.from_pretrained` of transformers 5 reads them, with the same ids.

    Warns:
      UserWarning: files disagree, so that ids depend on which is read, or the embedding's number of rows does not fit
        the vocabulary. A few rows more than ids are padding if their number is a multiple of 8. Added tokens may lack
        rows until one of them is used.

    Raises:
      FileNotFoundError: there is no such source, or it has no vocabulary.
      ValueError: a file is malformed, or files do not belong together.
    """
    directory = _directory(source)
    if _any_of(directory, OPENAI_FILES):
        encoder, merges = (directory / name for name in OPENAI_FILES)
        tokenizer = Tokenizer.from_files(encoder, merges)
    elif _any_of(directory, HUGGING_FACE_FILES):
        tokenizer = huggingface_tokenizer.read(directory)
    else:
        if others := [name for name in OTHER_KINDS if (directory / name).is_file()]:
            raise ValueError(
                f"{directory} holds {others[0]}, which is the vocabulary of another kind of tokenizer than GPT-2's: if "
                "transformers opens it, save it there, so that there is a tokenizer.json"
            )
        raise FileNotFoundError(
            f"{directory} holds no vocabulary: encoder.json and vocab.bpe, vocab.json and merges.txt, or tokenizer.json"
        )
    for n_vocab in dict.fromkeys(_rows(directory)):
        warn_of_another_model(tokenizer, n_vocab, f"the vocabulary in {directory}")
        _warn_of_odd_padding(tokenizer, n_vocab, directory)
        if tokenizer.eot is not None and tokenizer.eot >= n_vocab:
            tokenizer.eot = None
    return tokenizer


def _rows(directory: Path) -> Iterator[int]:
    """Yield the number of the embedding's rows from each config in a directory."""
    for name, read_config in _CONFIGS.items():
        if (directory / name).is_file() and (name != runs.RUN or runs.is_run(directory)):
            yield read_config(directory).n_vocab


def _warn_of_odd_padding(tokenizer: Tokenizer, n_vocab: int, directory: Path) -> None:
    """Warn if an embedding has more rows than ids, and no program pads to that number of rows."""
    n_ids = tokenizer.n_vocab
    if fits(tokenizer, n_vocab) and n_ids < n_vocab and n_vocab % MULTIPLE:
        unused = f"id {n_ids:,} is" if n_ids + 1 == n_vocab else f"ids {n_ids:,} to {n_vocab - 1:,} are"
        warn(
            f"the vocabulary in {directory} has {n_ids:,} ids and the model has {n_vocab:,} rows, which is not padding "
            f"to a multiple of {MULTIPLE}: {unused} never sampled, and the vocabulary may be that of another model"
        )


def warn_of_another_model(tokenizer: Tokenizer, n_vocab: int, name: str) -> None:
    """Warn the caller of the calling function if a vocabulary does not fit an embedding. `name` begins the message."""
    if not fits(tokenizer, n_vocab):
        warn(
            f"{name} has {tokenizer.n_vocab:,} ids, but the embedding has n_vocab = {n_vocab:,} rows: it seems to "
            "belong to another model",
        )


def fits(tokenizer: Tokenizer, n_vocab: int) -> bool:
    """Return whether a vocabulary can belong to an embedding with this many rows.

    Embeddings are often padded, to 50,304 rows for example, and added tokens often have no row. So only tokens that are
    not added must have a row, and fewer than 1,024 rows may have no id.
    """
    last = next((i for token, i in reversed(tokenizer.tokens.items()) if token not in tokenizer.added), -1)
    return last < n_vocab < tokenizer.n_vocab + PADDING


def has_vocabulary(source: str | os.PathLike) -> bool:
    """Return whether a source has at least one file of a vocabulary.

    Raises:
      FileNotFoundError, ValueError, OSError: the source cannot be found or fetched.
    """
    return _any_of(_directory(source), (*OPENAI_FILES, *HUGGING_FACE_FILES))


def _directory(source: str | os.PathLike) -> Path:
    """Return the folder that has the vocabulary of a source. An adapter without a vocabulary has that of its base."""
    directory = runs.run_of(locate(source, "tokenizer"))
    own = _any_of(directory, (*OPENAI_FILES, *HUGGING_FACE_FILES))
    return directory if own or not (directory / peft.CONFIG).is_file() else _directory(peft.base_name(directory))


def _any_of(directory: Path, names: Sequence[str]) -> bool:
    return any((directory / name).is_file() for name in names)


_CONFIGS = {
    "hparams.json": tensorflow.read_hparams,
    "config.json": huggingface.read_config,
    orbax.MANIFEST: orbax.read_config,
    runs.RUN: run_weights.read_config,
}
