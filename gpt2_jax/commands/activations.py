"""`gpt2-activations`: store the activations of a dataset in files."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import gpt2_jax
from gpt2_jax import progress
from gpt2_jax.commands import _command, _interrupts, _model
from gpt2_jax.files import expanded

if TYPE_CHECKING:
    import numpy as np

    from gpt2_jax import GPT2Config, Tokenizer


@dataclasses.dataclass
class Args:
    """Store the activations of a dataset. The folder's path goes to standard output, messages to standard error.

    The folder has one .npy file per activation and shard, [n_tokens, ...] without padding; the id, the document and the
    position of each token; and activations.json, which describes them. gpt2_jax.research.open_activations reads it.
    After a kill, the same command continues after the last whole shard.
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE", help_behavior_hint="")]
    """What to read, in order. A .txt file is one document. A .jsonl file has one document per line.
    A .csv file has one per row, and its first row names the columns. A .bin file has token ids.
    A folder means all such files in it, or both splits of gpt2-prepare. Standard input (-) is one document."""
    capture: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATTERN ...")]
    """Regular expressions: resid_post$ or h3/mlp/post$. Activations whose names match one are stored.
    gpt2_jax.research.activation_names lists them. attn/scores and attn/pattern cannot be stored."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """The folder to write."""
    model: _model.ModelOption = None
    dtype: _model.DtypeOption = None
    """Dtype of weights and matrix products. bfloat16 needs half the memory, but more time on a CPU."""
    store_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Dtype of the files. bfloat16 is stored as its bits, in uint16, because .npy has no bfloat16."""
    field: str = "text"
    """Name of the .jsonl field or .csv column that contains the text.
    If a .csv file has only one column, its name does not matter."""
    bos: bool = False
    """Put <|endoftext|> before each document."""
    limit: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Use only the first N documents, 1 or more."""
    max_tokens: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: the model's n_ctx)")] = (
        None
    )
    """Longer documents are read in windows of N tokens that follow one another, 1 to n_ctx.
    Each window is read alone, so its first tokens have little context."""
    skip_first: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Leave out the first N tokens of each window. The very first one has far larger activations than all others."""
    shard_megabytes: int = 256
    """Size of a shard, 1 or more. Two shards are in memory."""
    checksums: bool = False
    """Record the sha256 of each file."""
    mesh: _model.Mesh = dataclasses.field(default_factory=_model.Mesh)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    _command.call("gpt2-activations", Args, run, argv)


def run(args: Args) -> None:
    """Read the text, load the model, compute, write, print the folder."""
    _check(args)
    from gpt2_jax import research
    from gpt2_jax.research._harvest import check_capture

    tokenizer = gpt2_jax.load_tokenizer(_model.source(args.model))
    check_capture(gpt2_jax.load_config(_model.source(args.model)), args.capture)  # before the text is read
    documents, files = _documents(args, tokenizer)
    _model.keep_compiled()
    config, params = _model.load(args.model, args.dtype, args.mesh)
    _tell(f"model: {_model.title(args.model)}, {config.n_params:,} parameters, {config.compute_dtype}")
    folder = expanded(args.output)
    research.harvest(
        config,
        params,
        documents,
        folder,
        args.capture,
        store_dtype=args.store_dtype,
        max_tokens=args.max_tokens,
        skip_first=args.skip_first,
        shard_bytes=args.shard_megabytes * 10**6,
        checksums=args.checksums,
        about={"model": _model.title(args.model), "config": _described(config), "sources": files},
        tell=_tell,
        check=_interrupts.check,
    )
    print(folder)


def _check(args: Args) -> None:
    for name, value in (("limit", args.limit), ("shard-megabytes", args.shard_megabytes)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be 1 or more, not {value}")


def _tell(message: str) -> None:
    print(message, file=sys.stderr)


def _described(config: GPT2Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")}


def _documents(args: Args, tokenizer: Tokenizer) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """Return the ids of each document, and the name and size of each file.

    Raises:
      OSError: a file cannot be read.
      ValueError: a file is malformed, or there is no text.
    """
    import numpy as np

    from gpt2_jax.data.encoding import encode_documents
    from gpt2_jax.data.fields import Fields
    from gpt2_jax.data.finding import counted
    from gpt2_jax.data.sources import Sources
    from gpt2_jax.tokenizer import end_of_text

    before = [end_of_text(tokenizer, "--bos")] if args.bos else []
    eot = -1 if tokenizer.eot is None else tokenizer.eot  # without one, a .bin file is one document
    found = Sources(_without_folders(args.sources, tokenizer), Fields(args.field), tokenizer.n_vocab, eot)
    if found.left_out:
        _tell(f"left out: {counted(found.left_out)}")
    documents = []
    with progress.bars("bytes", "left") as bars:
        for ids in encode_documents(found.pieces(), tokenizer):
            documents.append(np.concatenate([np.asarray(before, ids.dtype), ids]))
            bars.update("encoding", found.n_read, found.n_bytes or None)
            if len(documents) == args.limit:
                break
    if not documents:
        raise ValueError(f"there is no text in {len(found.files)} files with {found.n_bytes:,} bytes in total")
    plural = "" if len(documents) == 1 else "s"
    _tell(f"text: {len(documents):,} document{plural}, {sum(map(len, documents)):,} tokens")
    files = [
        {"name": path.name if path else "standard input", "bytes": stat.st_size if stat else None}
        for path, stat in zip(found.files, found.stats, strict=True)
    ]
    return documents, files


def _without_folders(sources: Sequence[str], tokenizer: Tokenizer) -> list[str | Path]:
    """Return the sources, with the files of both splits instead of a folder of gpt2-prepare.

    Raises:
      ValueError: such a folder was prepared with another vocabulary, or is damaged.
    """
    from gpt2_jax.data.token_files import MANIFEST, open_prepared

    names: list[str | Path] = []
    for source in sources:
        if source != "-" and (expanded(source) / MANIFEST).is_file():
            prepared = open_prepared(source, tokenizer)
            names += [split.path for split in (prepared.train, prepared.val) if split]
        else:
            names.append(source)
    return names
