"""`gpt2-train-tokenizer`: train a byte-level BPE vocabulary on a new corpus."""

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
    """Train a byte-level BPE vocabulary. The folder's path goes to standard output, messages to standard error.

    The folder has encoder.json and vocab.bpe in OpenAI's format.
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE", help_behavior_hint="")]
    """What to read: .txt, .md, .jsonl, .json, .csv, .tsv and .parquet files, compressed or not (.gz), folders of such
    files, or - for standard input."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """The folder to write. gpt2-prepare --tokenizer takes it."""
    merges: int = 50_000
    """Most merges to learn, 0 or more. The vocabulary has 257 more ids: the 256 bytes and <|endoftext|>.
    GPT-2 has 50,000 merges. A small corpus needs fewer: the embedded model has 1,024."""
    field: str = "text"
    """Name of the JSON field or table column that contains the text."""
    overwrite: bool = False
    """Replace the folder, if it contains only a vocabulary."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    _command.call("gpt2-train-tokenizer", Args, run, argv)


def run(args: Args) -> None:
    """Train, write, print the folder."""
    from gpt2_jax.data.bpe import check_replaceable, train_tokenizer, write_tokenizer
    from gpt2_jax.data.finding import counted, left_out

    folder = expanded(args.output)
    check_replaceable(folder, args.overwrite)  # before training: that can take long
    if others := left_out(args.sources):
        print(f"left out: {counted(others)}", file=sys.stderr)
    shown = sys.stderr is not None and sys.stderr.isatty()
    tokenizer = train_tokenizer(args.sources, args.merges, field=args.field, shown=shown)
    write_tokenizer(folder, tokenizer, args.overwrite)
    n_merges = len(tokenizer.merges)
    counted = f"{n_merges:,} merge{'' if n_merges == 1 else 's'}"
    if n_merges < args.merges:
        counted += f", because no other pair occurs twice ({args.merges:,} were allowed)"
    print(f"vocabulary: {tokenizer.n_vocab:,} ids: 256 bytes, {counted}, <|endoftext|>", file=sys.stderr)
    print(folder)
