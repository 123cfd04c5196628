"""Weights and vocabularies in and out, one file a format; `load` tells them apart."""

from __future__ import annotations

import os
from pathlib import Path

from gpt2_jax.checkpoints import tensorflow
from gpt2_jax.config import GPT2Config
from gpt2_jax.params import Params
from gpt2_jax.tokenizer import Tokenizer


def load(directory: str | os.PathLike) -> tuple[GPT2Config, Params]:
    """Load a model from a directory in OpenAI's layout: the TensorFlow checkpoint and hparams.json.

    Returns:
      config, and params as nested plain dicts of jax arrays under the checkpoint's own names, shapes and orientation:
      `params["h0"]["attn"]["c_attn"]["w"]` is (n_embd, 3 * n_embd).

    Raises:
      FileNotFoundError: the directory or one of its files is not there.
      ValueError: a file is malformed or damaged, or holds another model than hparams.json says.

    """
    return tensorflow.read(_existing(directory))


def load_config(directory: str | os.PathLike) -> GPT2Config:
    """Load a model's hyperparameters alone: the config that `load` gives.

    Raises:
      FileNotFoundError: the directory or its hparams.json is not there.
      ValueError: hparams.json is malformed.

    """
    return tensorflow.read_hparams(_existing(directory))


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
    """Load a model's tokenizer from its encoder.json and vocab.bpe.

    Raises:
      FileNotFoundError: the directory or one of the two files is not there.
      ValueError: a file is malformed, or the number of ids is not the n_vocab of the directory's hparams.json.

    """
    directory = _existing(directory)
    tokenizer = Tokenizer.from_files(directory / "encoder.json", directory / "vocab.bpe")
    if (directory / "hparams.json").is_file():
        config = tensorflow.read_hparams(directory)
        if tokenizer.n_vocab != config.n_vocab:
            raise ValueError(
                f"{directory / 'encoder.json'} has {tokenizer.n_vocab} ids, but the embedding has n_vocab = "
                f"{config.n_vocab} rows: the vocabulary is that of another model"
            )
    return tokenizer


def _existing(directory: str | os.PathLike) -> Path:
    if not isinstance(directory, str | os.PathLike):
        raise ValueError(f"a model directory must be a path, not {directory!r}")
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise FileNotFoundError(f"no such model directory: {directory}")
    return directory


def embedded_model() -> Path:
    """Return the directory of the model in this package: 3.55 M parameters, trained on Shakespeare's plays."""
    package = Path(__file__).resolve().parents[1]
    packed, checkout = package / "models" / "shakespeare", package.parent / "models" / "shakespeare"
    return packed if packed.is_dir() else checkout
