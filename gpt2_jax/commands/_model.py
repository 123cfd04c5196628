"""The model that a command is told: the option, the name that messages give it, and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

import gpt2_jax

if TYPE_CHECKING:
    from gpt2_jax import GPT2Config
    from gpt2_jax.params import Params

EMBEDDED = "the embedded Shakespeare model"

ModelOption = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="MODEL",
        help_behavior_hint="(default: embedded)",
        help="A size, 124M, 355M, 774M or 1558M (fetched if it is not there yet); an id of the Hugging Face hub "
        "(\"owner/name\"); or a directory with OpenAI's TensorFlow checkpoint, with Hugging Face's files, or saved by "
        "gpt2_jax.",
    ),
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16"] | None,
    tyro.conf.arg(metavar="{float32,bfloat16}", help_behavior_hint="(default: the checkpoint's)"),
]


def source(model: str | None) -> str | Path:
    """Return what `gpt2_jax.load` takes for an option's model; None is the embedded one."""
    return gpt2_jax.embedded_model() if model is None else model


def title(model: str | None) -> str:
    """Return what messages call it."""
    return EMBEDDED if model is None else model


def load(model: str | None, dtype: str | None) -> tuple[GPT2Config, Params]:
    """Return config and params, both computing and stored in `dtype`; None leaves the checkpoint's.

    Raises:
      as `gpt2_jax.load`.

    """
    config, params = gpt2_jax.load(source(model), dtype=dtype)
    return (config if dtype is None else config.replace(compute_dtype=dtype)), params
