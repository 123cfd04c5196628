"""`save`, in any format."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from gpt2_jax import files
from gpt2_jax.checkpoints import bases, huggingface, huggingface_labels, orbax, peft, tensorflow, vocabulary_files
from gpt2_jax.checkpoints.integrity import STORED_DTYPES
from gpt2_jax.checkpoints.vocabulary import warn_of_another_model
from gpt2_jax.checks import choice
from gpt2_jax.config import GPT2Config
from gpt2_jax.files import read_object
from gpt2_jax.model import check_params
from gpt2_jax.params import Params, flatten, unflatten
from gpt2_jax.tokenizer import HUGGING_FACE_FILES, OPENAI_FILES, TOKENIZER_CONFIG, Tokenizer

Format = Literal["tensorflow", "huggingface", "orbax"]
WRITERS = {"tensorflow": tensorflow.write, "huggingface": huggingface.write, "orbax": orbax.write}
VOCABULARY = {*OPENAI_FILES, *HUGGING_FACE_FILES, TOKENIZER_CONFIG}
MODELS = (  # the file names of a saved model, without its vocabulary
    {"hparams.json", "checkpoint", "model.ckpt.index", "model.ckpt.data-00000-of-00001"},
    {"config.json", huggingface.WEIGHTS},
    {orbax.MANIFEST, orbax.TREE},
    {peft.CONFIG, peft.WEIGHTS},
)


def save(
    directory: str | os.PathLike,
    config: GPT2Config,
    params: Params,
    format: Format = "tensorflow",
    tokenizer: Tokenizer | None = None,
) -> None:
    """Save a model. `load` returns it bit for bit, and the other tools of the format can open it.

    The model is written under a temporary name and then renamed. If the process is killed, the directory holds its old
    contents or the complete new model. A directory is replaced only if it holds a saved model and nothing else.

    Args:
      directory: the folder to write. Its parent folders are created.
      config: the config of the params.
      params: params as `load` returns them, on any devices of this host.
      format: "tensorflow", OpenAI's own files (variables `model/h0/attn/c_attn/w` (1, in, out), hparams.json);
        "huggingface", which `GPT2LMHeadModel.from_pretrained` opens, or `GPT2ForSequenceClassification.from_pretrained`
        if the config has labels; or "orbax". The last two also hold a sha256 of
        each tensor, and the config's dropout rates and qkv_bias, which OpenAI's files cannot hold. A config whose
        arithmetic is not OpenAI's (`config.variants`) is refused in the format "tensorflow", and so is a classifier; in
        the format "huggingface", a classifier that does not read the last token.
      tokenizer: written too, in the files of the format: encoder.json and vocab.bpe, or Hugging Face's files. A
        tokenizer that OpenAI's two files cannot hold is written in Hugging Face's files in every format. None writes
        only weights and config.

    Warns:
      UserWarning: the tokenizer seems to belong to another model, because its ids do not fit the config's n_vocab.

    Raises:
      FileExistsError: the directory holds files that are not part of a saved model, or holds a vocabulary while
        `tokenizer` is None.
      OSError: the disk is full, or the directory cannot be written.
      ValueError: the format is unknown, the params do not match the config, or the dtype does not fit.
    """
    choice("format", format, WRITERS)
    check_params(config, params)
    _check_dtype(config)

    def write(temporary: Path) -> None:
        WRITERS[format](temporary, config, _on_host(config, params))

    save_with(directory, config, format, tokenizer, write)


def save_change(
    directory: str | os.PathLike,
    config: GPT2Config,
    own: Params,
    pairs: Params,
    settings: Mapping[str, float],
    base: bases.Base,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Save what LoRA has trained, and the name and the hash of the model that it was trained on. `load` merges them.

    The folder is one of the format "orbax" whose gpt2_jax.json has three more fields. It replaces what `save` replaces.

    Args:
      directory: the folder to write.
      config: the config of the model, with the dtype of the arrays.
      own: the params that are trained themselves; {} for none.
      pairs: the LoRA tree.
      settings: LoRA's alpha and dropout.
      base: the frozen params.
      tokenizer: written too.

    Raises:
      FileExistsError, OSError, ValueError: as `save`.
    """
    kept = {**flatten(own), **flatten(pairs)}
    more = {
        "base": base,
        "lora": dict(settings),
        "pairs": list(flatten(pairs)),
        "leaves": {name: [config.param_dtype.name, list(leaf.shape)] for name, leaf in kept.items()},
    }
    _check_dtype(config)

    def write(temporary: Path) -> None:
        orbax.write(temporary, config, _on_host(config, unflatten(kept)), **more)

    save_with(directory, config, "orbax", tokenizer, write)


def save_with(
    directory: str | os.PathLike,
    config: GPT2Config,
    format: Format | Literal["peft"],
    tokenizer: Tokenizer | None,
    write: Callable[[Path], None],
) -> None:
    """Save with `write(temporary folder)`, and the vocabulary in the files of the format. Errors: see `save`."""
    if tokenizer is not None:
        warn_of_another_model(tokenizer, config.n_vocab, "the tokenizer")
    directory = files.expanded(directory)
    if format == "tensorflow":
        tensorflow.check_path(directory)
        tensorflow.check_config(config)
    elif format != "orbax":
        huggingface_labels.check_config(config, format)
    check = functools.partial(check_replaceable, directory, with_vocabulary=tokenizer is not None)
    check()
    _import_library(format)
    try:
        with files.replacing(directory, check) as temporary:
            write(temporary)
            if tokenizer is not None:
                _write_vocabulary(temporary, config, tokenizer, format)
    except FileExistsError:
        raise
    except OSError as error:
        clear = OSError(f"{directory} cannot be written, and was not changed: {error.strerror or error}")
        clear.errno = error.errno
        raise clear from error


def _check_dtype(config: GPT2Config) -> None:
    if config.param_dtype.name not in STORED_DTYPES:
        raise ValueError(f"params must be {', '.join(STORED_DTYPES)}, not {config.param_dtype}: cast them first")


def _import_library(format: str) -> None:
    """Import the library that writes a format. A Ctrl-C during the import must not leave a temporary folder."""
    if format == "tensorflow":
        tensorflow.import_tensorflow()
    elif format == "orbax":
        importlib.import_module("orbax.checkpoint")


def _write_vocabulary(directory: Path, config: GPT2Config, tokenizer: Tokenizer, format: str) -> None:
    if format == "peft":
        vocabulary_files.write(directory, vocabulary_files.huggingface_files(tokenizer, config.n_ctx))
        return
    if format != "huggingface":
        vocabulary_files.write(directory, vocabulary_files.own_files(tokenizer, config.n_ctx))
        return
    own = vocabulary_files.huggingface_files(tokenizer, config.n_ctx, beside_config=True)
    vocabulary_files.write(directory, own)
    path = directory / "config.json"
    ids = vocabulary_files.special_ids(tokenizer, config.n_vocab)
    if config.labels and ids["eos_token_id"] is not None:  # transformers needs an id for padding
        ids = {"pad_token_id": ids["eos_token_id"]} | ids
    vocabulary_files.write_json(path, read_object(path) | ids)


def check_replaceable(directory: Path, with_vocabulary: bool, overwrite: bool = True) -> None:
    """Check that a directory may be replaced: it holds nothing except a saved model.

    Args:
      directory: the folder to write.
      with_vocabulary: whether the new model has a vocabulary.
      overwrite: whether a saved model may be replaced.

    Raises:
      FileExistsError: the directory may not be replaced.
    """

    def others(names: set[str]) -> set[str]:
        model = next((model for model in MODELS if model <= names), set())
        if huggingface.WEIGHTS in model and not huggingface.is_ours(directory):
            model = set()  # it may be a model of another architecture
        folders = {path.name for path in directory.iterdir() if path.is_dir()} - ({orbax.TREE} & model)
        return (names - model - (VOCABULARY if model else set())) | folders

    files.check_replaceable(directory, "a saved model", others, overwrite)
    if not with_vocabulary and any((directory / name).exists() for name in VOCABULARY):
        raise FileExistsError(
            f"{directory} holds a vocabulary that would be lost: pass its tokenizer, or choose another name"
        )


def _on_host(config: GPT2Config, params: Params) -> Mapping[str, np.ndarray]:
    flat = flatten(params)
    for name, leaf in flat.items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ValueError(f"{name} is on the devices of several hosts: gather the params on each host first")
    return {name: np.asarray(leaf, config.param_dtype) for name, leaf in flat.items()}
