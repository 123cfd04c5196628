"""`gpt2-convert`: a model from one format to another."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

import gpt2_jax
from gpt2_jax.commands import _command
from gpt2_jax.files import expanded


@dataclasses.dataclass
class Args:
    """Convert a model: the folder written goes to standard output, all else to standard error."""

    source: Annotated[str, tyro.conf.Positional]
    """A directory with a TensorFlow checkpoint in OpenAI's layout, with Hugging Face's config.json and safetensors, or
    saved by gpt2_jax; a size, 124M, 355M, 774M or 1558M (fetched if it is not there yet); or an id of the Hugging Face
    hub, such as distilbert/distilgpt2."""
    dest: Annotated[Path, tyro.conf.Positional]
    """The folder to write."""
    format: Annotated[Literal["tensorflow", "huggingface", "orbax"], tyro.conf.arg(aliases=["-f"])]
    """What to write: OpenAI's own files; Hugging Face's, which GPT2LMHeadModel.from_pretrained opens; or Orbax."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Cast the weights to this; by default they stay as they are stored."""
    tokenizer: bool = True
    """Carry the vocabulary over, if there is one."""
    overwrite: bool = False
    """Replace the folder if it holds a model that was written by this command."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    _command.call("gpt2-convert", Args, run, argv)


def run(args: Args) -> None:
    """Load, save, print the folder."""
    dest = expanded(args.dest)
    from gpt2_jax.checkpoints import check_replaceable

    check_replaceable(dest, with_vocabulary=True, overwrite=args.overwrite)  # before a vocabulary is fetched
    tokenizer = _tokenizer(args.source) if args.tokenizer else None
    check_replaceable(dest, with_vocabulary=tokenizer is not None)  # before the weights: those can take long
    config, params = gpt2_jax.load(args.source, dtype=args.dtype)
    gpt2_jax.save(dest, config, params, args.format, tokenizer)
    print(
        f"{args.source}: {config.n_params:,} parameters, {config.param_dtype}"
        f"{'' if tokenizer else ', no vocabulary'}, written as {args.format}",
        file=sys.stderr,
    )
    print(dest)


def _tokenizer(source: str):
    """Return the source's tokenizer, None if it has no vocabulary."""
    from gpt2_jax.checkpoints import has_vocabulary

    return gpt2_jax.load_tokenizer(source) if has_vocabulary(source) else None
