"""`gpt2-train-tokenizer`: a byte-level BPE vocabulary for a new corpus."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from gpt2_jax.commands import _command
from gpt2_jax.files import expanded


@dataclasses.dataclass
class Args:
    """Train a byte-level BPE vocabulary: the folder written goes to standard output, all else to standard error.

    It holds encoder.json and vocab.bpe in OpenAI's format.
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE", help_behavior_hint="")]
    """What to read: .txt, .jsonl and .csv files, folders of such files, or - for standard input."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """The folder to write; --tokenizer of gpt2-prepare takes it."""
    merges: int = 50_000
    """Most merges to learn, 0 or more; the vocabulary has 257 ids more, the bytes and <|endoftext|>. 50,000 is GPT-2's;
    a small corpus needs less: the embedded model has 1,024."""
    field: str = "text"
    """Where the text is: the field of a .jsonl file's objects, and the column of a .csv file."""
    overwrite: bool = False
    """Replace the folder if it holds a vocabulary and nothing else."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    _command.call("gpt2-train-tokenizer", Args, run, argv)


def run(args: Args) -> None:
    """Train, write, print the folder."""
    from gpt2_jax.data.bpe import check_replaceable, train_tokenizer, write_tokenizer

    folder = expanded(args.output)
    check_replaceable(folder, args.overwrite)  # before training: that can take long
    shown = sys.stderr is not None and sys.stderr.isatty()
    tokenizer = train_tokenizer(args.sources, args.merges, field=args.field, shown=shown)
    write_tokenizer(folder, tokenizer, args.overwrite)
    n_merges = len(tokenizer.merges)
    counted = f"{n_merges:,} merge{'' if n_merges == 1 else 's'}"
    if n_merges < args.merges:
        counted += f", as no other pair occurs twice ({args.merges:,} were allowed)"
    print(f"vocabulary: {tokenizer.n_vocab:,} ids: 256 bytes, {counted}, <|endoftext|>", file=sys.stderr)
    print(folder)
