"""`gpt2-convert`: convert a model from one format to another."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

import gpt2_jax
from gpt2_jax.commands import _command, _model
from gpt2_jax.files import expanded


@dataclasses.dataclass
class Args:
    """Convert a model to another format. The new folder's path goes to standard output, messages to standard error."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=_model.SOURCES)]
    dest: Annotated[Path, tyro.conf.Positional]
    """The folder to write."""
    format: Annotated[Literal["tensorflow", "huggingface", "orbax", "peft"], tyro.conf.arg(aliases=["-f"])]
    """The format to write: OpenAI's files, files for GPT2LMHeadModel.from_pretrained, or an Orbax checkpoint. Or, of a
    run with LoRA, the adapter for PEFT, without the base model."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Cast the weights to this dtype; by default they keep the dtype in which they are stored."""
    tokenizer: bool = True
    """Also write the vocabulary, if the source has one."""
    overwrite: bool = False
    """Replace the folder, if it contains only a saved model."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    _command.call("gpt2-convert", Args, run, argv)


def run(args: Args) -> None:
    """Load, save, print the folder."""
    dest = expanded(args.dest)
    from gpt2_jax.checkpoints import check_replaceable

    check_replaceable(dest, with_vocabulary=True, overwrite=args.overwrite)  # before downloads
    tokenizer = _tokenizer(args.source) if args.tokenizer else None
    check_replaceable(dest, with_vocabulary=tokenizer is not None)  # before weights are loaded: that can take long
    if args.format == "peft":
        _save_adapter(args, dest, tokenizer)
        return
    config, params = gpt2_jax.load(args.source, dtype=args.dtype)
    gpt2_jax.save(dest, config, params, args.format, tokenizer)
    print(
        f"{args.source}: {config.n_params:,} parameters, {config.param_dtype}"
        f"{'' if tokenizer else ', no vocabulary'}, written as {args.format}",
        file=sys.stderr,
    )
    print(dest)


def _save_adapter(args: Args, dest: Path, tokenizer) -> None:
    """Save the adapter of the source."""
    from gpt2_jax.checkpoints import load_adapter, save_adapter

    if args.dtype is not None:
        raise ValueError("--dtype works for models: an adapter keeps its dtype")
    adapter = load_adapter(args.source)
    save_adapter(dest, gpt2_jax.load_config(args.source), adapter, tokenizer)
    base = f", of the base model {adapter.base}" if adapter.base else ""
    print(f"{args.source}: an adapter of {adapter.n_params:,} parameters{base}, written as peft", file=sys.stderr)
    print(dest)


def _tokenizer(source: str):
    """Return the source's tokenizer, or None if it has no vocabulary."""
    from gpt2_jax.checkpoints import has_vocabulary

    return gpt2_jax.load_tokenizer(source) if has_vocabulary(source) else None
