"""`gpt2-prepare`: turn text into token files for training."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import gpt2_jax
from gpt2_jax.commands import _command, _model, _processes
from gpt2_jax.files import expanded

if TYPE_CHECKING:
    from gpt2_jax.data.token_files import Prepared


@dataclasses.dataclass
class Args:
    """Turn text into token files for training. The folder's path goes to standard output, messages to standard error.

    The folder has train.bin and val.bin (nanoGPT's layout: token ids as uint16, or as uint32 if the vocabulary has more
    than 65,535 ids) and tokens.json, which describes them.
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE", help_behavior_hint="")]
    """What to read, in order. A .txt or .md file is one document. A .jsonl file has one document per line, a .json file
    one per object of its array. A .csv, .tsv or .parquet file has one per row; .csv files may use ; or tabs.
    Text may be compressed: .gz. A .bin file has token ids. A folder means all such files in it.
    Standard input (-) is one document."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """The folder to write."""
    tokenizer: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="MODEL",
            help_behavior_hint="(default: embedded)",
            help="The model that you will train; only its vocabulary is read. A folder with a vocabulary is enough. "
            + _model.SOURCES,
        ),
    ] = None
    field: str = "text"
    """Name of the JSON field or table column that contains the text.
    If a .csv or .tsv file has only one column, its name does not matter."""
    prompt_field: Annotated[str, tyro.conf.arg(help_behavior_hint="")] = ""
    """Field of the prompts, together with --completion-field: each document is a pair.
    Only the completion, and the end-of-text id after it, count in the loss."""
    completion_field: Annotated[str, tyro.conf.arg(help_behavior_hint="")] = ""
    """Field of the completions.
    Nothing is inserted between prompt and completion: begin the completion with a space if the text needs one."""
    encoding: str = "utf-8"
    """Encoding of the text, as Python names it, for example cp1252 or utf-16. Not used for .parquet and .bin files."""
    end_of_text: Literal["text", "split"] = "text"
    """What the characters <|endoftext|> in a text are: "text", ordinary text, or "split", the end of a document.
    Some corpora separate documents so. Not for prompts and completions."""
    skip_bad_rows: bool = False
    """Leave out malformed lines, records without the field, and rows with too few or too many columns.
    They are counted, and the first is reported. Otherwise it is an error."""
    val_fraction: float = 0.1
    """Fraction of the text that is kept for validation; 0 or more, less than 1."""
    split: Literal["auto", "documents", "tail"] = "auto"
    """How the validation part is chosen: "documents" draws whole documents with the seed, "tail" takes the last tokens.
    The default, "auto", uses documents, or the tail if there are too few documents."""
    seed: int = 0
    """Seed of the draws, 0 to 4294967295."""
    workers: int = 0
    """Number of processes on this machine that encode; 0 uses one per core if there is enough text, else one."""
    overwrite: bool = False
    """Replace the folder, if it contains only prepared text."""
    processes: _processes.Processes = dataclasses.field(default_factory=_processes.Processes)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    _command.call("gpt2-prepare", Args, run, argv)


def run(args: Args) -> None:
    """Prepare, report, print the folder."""
    from gpt2_jax import processes
    from gpt2_jax.data._prepare import check_replaceable, prepare

    folder, share = expanded(args.output), processes.share()
    with share.telling():
        check_replaceable(folder, args.overwrite)  # before a vocabulary is downloaded
        prepared = prepare(
            args.sources,
            folder,
            gpt2_jax.load_tokenizer(_model.source(args.tokenizer)),
            field=args.field,
            prompt_field=args.prompt_field,
            completion_field=args.completion_field,
            encoding=args.encoding,
            end_of_text=args.end_of_text,
            skip_bad_rows=args.skip_bad_rows,
            val_fraction=args.val_fraction,
            split=args.split,
            seed=args.seed,
            n_workers=args.workers,
            overwrite=args.overwrite,
            share=share,
        )
    print(_report(prepared, args.tokenizer), file=sys.stderr)
    print(folder)


def _report(prepared: Prepared, tokenizer: str | None) -> str:
    """Return a table of what was written, and notes on the result."""
    manifest = prepared.manifest or {}
    masked = "targets" in manifest["train"]
    rows: list[tuple[str, ...]] = [("", "tokens", "documents", *(["targets"] if masked else []))]
    for name, title in (("train", "training"), ("val", "validation")):
        rows.append((title, *(f"{value:,}" for value in manifest[name].values())))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{row[0]:<{widths[0]}}  " + "  ".join(map(str.rjust, row[1:], widths[1:])) for row in rows]
    return "\n".join([*lines, *_notes(manifest, tokenizer)])


def _notes(manifest: dict[str, Any], tokenizer: str | None) -> list[str]:
    from gpt2_jax.data.notes import notes_on

    how = {
        "documents": "drawn by document",
        "tail": "the last tokens; a document that is cut counts where it begins",
    }
    n_tokens = sum(manifest[split]["tokens"] for split in ("train", "val"))
    notes = [
        f"text: {manifest['characters']:,} characters in {_several(manifest['files'], 'file')}, "
        f"{manifest['characters'] / n_tokens:.2f} per token",
        f"vocabulary: {manifest['n_vocab']:,} ids, of {_model.title(tokenizer)}",
        f"validation: {how[manifest['split']]}" if manifest["val_fraction"] else "validation: none",
    ]
    return notes + notes_on(manifest, "pass --end-of-text split")


def _several(count: int, name: str) -> str:
    return f"{count:,} {name}{'' if count == 1 else 's'}"
