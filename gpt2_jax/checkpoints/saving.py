"""One way out: `save` in any format."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from gpt2_jax.checkpoints import huggingface, huggingface_tokenizer, orbax, tensorflow
from gpt2_jax.checkpoints.integrity import STORED_DTYPES
from gpt2_jax.config import GPT2Config
from gpt2_jax.files import expanded, replacing
from gpt2_jax.model import check_params
from gpt2_jax.params import Params, flatten
from gpt2_jax.tokenizer import Tokenizer

Format = Literal["tensorflow", "huggingface", "orbax"]
WRITERS = {"tensorflow": tensorflow.write, "huggingface": huggingface.write, "orbax": orbax.write}
VOCABULARY = {"encoder.json", "vocab.bpe", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"}
MODELS = (  # the names that a saved model has, without its vocabulary
    {"hparams.json", "checkpoint", "model.ckpt.index", "model.ckpt.data-00000-of-00001"},
    {"config.json", "model.safetensors"},
    {orbax.MANIFEST, orbax.TREE},
)


def save(
    directory: str | os.PathLike,
    config: GPT2Config,
    params: Params,
    format: Format = "tensorflow",
    tokenizer: Tokenizer | None = None,
) -> None:
    """Save a model so that `load` gives it back bit for bit, and the tools of the format open it.

    It is written beside and renamed: killed at any moment, the directory holds what it held or the new model, never
    half of one. A directory that holds a saved model and nothing else is replaced, one that holds anything else never.

    Args:
      directory: where; folders above it are made.
      config: the params' config.
      params: as `load` gives them, on any devices of this host.
      format: "tensorflow", OpenAI's own files (variables `model/h0/attn/c_attn/w` (1, in, out), hparams.json);
        "huggingface", which `GPT2LMHeadModel.from_pretrained` opens; or "orbax". The last two carry a sha256 of each
        tensor, and the config's dropout rates and qkv_bias, for which OpenAI's files have no place.
      tokenizer: written too, as the format has it: encoder.json and vocab.bpe, or Hugging Face's files. None writes
        weights and config alone.

    Raises:
      FileExistsError: the directory holds files that are not a saved model's, or a vocabulary and `tokenizer` is None.
      OSError: the disk is full, or the directory cannot be written.
      ValueError: an unknown format, params that are not this config's, or a dtype or tokenizer that does not fit.

    """
    if format not in WRITERS:
        raise ValueError(f"format must be one of {', '.join(WRITERS)}, not {format!r}")
    check_params(config, params)
    if config.param_dtype.name not in STORED_DTYPES:
        raise ValueError(f"params are saved as {', '.join(STORED_DTYPES)}, not {config.param_dtype}: cast them first")
    if tokenizer is not None and tokenizer.n_vocab != config.n_vocab:
        raise ValueError(f"the tokenizer has {tokenizer.n_vocab} ids, the config n_vocab = {config.n_vocab}")
    directory = expanded(directory)
    if format == "tensorflow":
        tensorflow.check_path(directory)
    check = functools.partial(check_replaceable, directory, with_vocabulary=tokenizer is not None)
    check()
    flat = _on_host(config, params)
    try:
        with replacing(directory, check) as temporary:
            WRITERS[format](temporary, config, flat)
            if tokenizer is not None and format == "huggingface":
                huggingface_tokenizer.write(temporary, tokenizer, config.n_ctx)
            elif tokenizer is not None:
                tokenizer.to_files(temporary / "encoder.json", temporary / "vocab.bpe")
    except FileExistsError:
        raise
    except OSError as error:
        told = OSError(f"{directory} cannot be written, and is as it was: {error.strerror or error}")
        told.errno = error.errno
        raise told from error


def check_replaceable(directory: Path, with_vocabulary: bool) -> None:
    """Check that nothing but a saved model would go if this directory were replaced.

    Raises:
      FileExistsError: something would.

    """
    if not directory.exists():
        return
    if not directory.is_dir():
        raise FileExistsError(f"{directory} is a file: choose another name")
    names = {path.name for path in directory.iterdir()}
    model = next((model for model in MODELS if model <= names), set())
    if "model.safetensors" in model and not huggingface.is_ours(directory):
        model = set()  # perhaps another architecture's
    folders = {path.name for path in directory.iterdir() if path.is_dir()} - ({orbax.TREE} & model)
    if others := sorted((names - model - (VOCABULARY if model else set())) | folders):
        raise FileExistsError(
            f"{directory} holds other files ({', '.join(others[:5])}), which stay: choose another name"
        )
    if names & VOCABULARY and not with_vocabulary:
        raise FileExistsError(
            f"{directory} holds a vocabulary, which would be lost: pass its tokenizer, or choose another name"
        )


def _on_host(config: GPT2Config, params: Params) -> Mapping[str, np.ndarray]:
    flat = flatten(params)
    for name, leaf in flat.items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ValueError(f"{name} lies on the devices of several hosts: gather the params on each first")
    return {name: np.asarray(leaf, config.param_dtype) for name, leaf in flat.items()}
