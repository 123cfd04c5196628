"""`gpt2-prepare`: text to token files to train on."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import gpt2_jax
from gpt2_jax.commands import _command, _model
from gpt2_jax.files import expanded

if TYPE_CHECKING:
    from gpt2_jax.data.token_files import Prepared


@dataclasses.dataclass
class Args:
    """Turn text into token files to train on: the folder written goes to standard output, all else to standard error.

    It holds train.bin and val.bin (ids as uint16, nanoGPT's layout) and tokens.json, which says what they are.
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE", help_behavior_hint="")]
    """What to read, in this order: .txt files, each a document; .jsonl, a document a line; .csv, a document a row, the
    first row naming the columns; .bin, ids already; folders, all such files in them; - for standard input, a text."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """The folder to write."""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="MODEL", help_behavior_hint="(default: embedded)")] = None
    """The model to train, whose vocabulary is used: a size, 124M, 355M, 774M or 1558M (its vocabulary is fetched if it
    is not there yet); an id of the Hugging Face hub; or a directory with a model or with encoder.json and vocab.bpe."""
    field: str = "text"
    """Where the text is: the field of a .jsonl file's objects, and the column of a .csv file. A lone column needs no
    name."""
    prompt_field: Annotated[str, tyro.conf.arg(help_behavior_hint="")] = ""
    """With --completion-field: documents are pairs, of which the completion alone, and the end-of-text after it, counts
    in the loss."""
    completion_field: Annotated[str, tyro.conf.arg(help_behavior_hint="")] = ""
    """The other half of a pair. It follows its prompt as it is: begin it with the space between them."""
    val_fraction: float = 0.1
    """Share that is kept for validation, 0 to less than 1."""
    split: Literal["auto", "documents", "tail"] = "auto"
    """Which share: documents drawn by the seed; the tail of the tokens; or documents where there are enough of them."""
    seed: int = 0
    """Seed of that draw, 0 to 4294967295."""
    processes: int = 0
    """How many processes encode; 0 is as many as there are cores, where there is enough text."""
    overwrite: bool = False
    """Replace the folder if it holds prepared text and nothing else."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    _command.call("gpt2-prepare", Args, run, argv)


def run(args: Args) -> None:
    """Prepare, report, print the folder."""
    from gpt2_jax.data._prepare import check_replaceable, prepare

    folder = expanded(args.output)
    check_replaceable(folder, args.overwrite)  # before a vocabulary is fetched
    prepared = prepare(
        args.sources,
        folder,
        gpt2_jax.load_tokenizer(_model.source(args.tokenizer)),
        field=args.field,
        prompt_field=args.prompt_field,
        completion_field=args.completion_field,
        val_fraction=args.val_fraction,
        split=args.split,
        seed=args.seed,
        n_processes=args.processes,
        overwrite=args.overwrite,
    )
    print(_report(prepared, args.tokenizer), file=sys.stderr)
    print(folder)


def _report(prepared: Prepared, tokenizer: str | None) -> str:
    """Return a table of what was written, and what may be other than was meant."""
    manifest = prepared.manifest or {}
    masked = "targets" in manifest["train"]
    rows: list[tuple[str, ...]] = [("", "tokens", "documents", *(["targets"] if masked else []))]
    for name, title in (("train", "training"), ("val", "validation")):
        rows.append((title, *(f"{value:,}" for value in manifest[name].values())))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{row[0]:<{widths[0]}}  " + "  ".join(map(str.rjust, row[1:], widths[1:])) for row in rows]
    return "\n".join([*lines, *_notes(manifest, tokenizer)])


def _notes(manifest: dict[str, Any], tokenizer: str | None) -> list[str]:
    how = {
        "documents": "drawn by document",
        "tail": "the tail of the tokens; the document that it cuts counts where it begins",
    }
    n_tokens = sum(manifest[split]["tokens"] for split in ("train", "val"))
    notes = [
        f"text: {manifest['characters']:,} characters in {_several(manifest['files'], 'file')}, "
        f"{manifest['characters'] / n_tokens:.2f} a token",
        f"vocabulary: {manifest['n_vocab']:,} ids, of {_model.title(tokenizer)}",
        f"validation: {how[manifest['split']]}" if manifest["val_fraction"] else "validation: none",
    ]
    if manifest["empty_documents"]:
        notes.append(f"left out: {_several(manifest['empty_documents'], 'document')} without text")
    if manifest["end_of_text_as_text"]:
        notes.append(
            f"note: the characters <|endoftext|> stand in the text {_several(manifest['end_of_text_as_text'], 'time')} "
            "and were taken as text; a document ends with its file, line or row"
        )
    return notes


def _several(count: int, name: str) -> str:
    return f"{count:,} {name}{'' if count == 1 else 's'}"
