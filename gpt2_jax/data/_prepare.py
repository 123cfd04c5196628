"""Text to a folder of token ids: tokenised once, split once, and then read by every training run."""

from __future__ import annotations

import array
import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gpt2_jax import files, progress
from gpt2_jax.checks import choice, real_number, whole_number
from gpt2_jax.data.encoding import encode_all, processes_for
from gpt2_jax.data.sources import Fields, Sources
from gpt2_jax.data.splitting import BLOCK, divide, separate
from gpt2_jax.data.token_files import FILES, MANIFEST, SPLITS, VERSION, Prepared, id_dtype, open_prepared
from gpt2_jax.tokenizer import Tokenizer, fingerprint


def prepare(
    sources: Sequence[str | os.PathLike],
    folder: str | os.PathLike,
    tokenizer: Tokenizer,
    *,
    field: str = "text",
    prompt_field: str = "",
    completion_field: str = "",
    val_fraction: float = 0.1,
    split: Literal["auto", "documents", "tail"] = "auto",
    seed: int = 0,
    n_processes: int = 0,
    overwrite: bool = False,
    shown: bool | None = None,
) -> Prepared:
    """Tokenise text, and write it as train.bin and val.bin with a manifest, tokens.json, into a new folder.

    After each document stands the id `tokenizer.eot`; the characters <|endoftext|> in a text stay text. Where there is
    one document alone it has none after it: there is nothing to part it from. Documents without text are left out.

    What is written depends on the text, its order, the tokenizer and the settings that say which text and how to split
    it, and on nothing else. The folder appears in one step; killed before, there is none, or what there was.

    Args:
      sources: in order: .txt files, a document each; .jsonl, one a line, in a field of an object; .csv, one a row, in a
        column, which the first line names (a lone column may have any name); .bin, ids already, with the
        end-of-text between documents; folders, all such files in them, by name; "-", standard input, one document.
      folder: what to write.
      tokenizer: whose ids to write.
      field: of a .jsonl file's objects, and the column of a .csv file, that holds the text.
      prompt_field: with the next instead of `field`: pairs, encoded each by itself, so that a completion begins a
        token; it is the completion and the end-of-text after it that count in the loss, and train.mask.bin and
        val.mask.bin say so.
      completion_field: see there.
      val_fraction: share for validation, in [0, 1).
      split: "documents" puts each document into validation with that probability, drawn from (seed, its number).
        "tail" takes the last tokens: int(n * (1 - val_fraction)) of all n train, computed without rounding. "auto" is
        documents, but the tail where that would leave either side without a document, or with less than half or more
        than twice the tokens that are its share.
      seed: of the draws.
      n_processes: that encode; 0 is one for each core where there is enough text, else one.
      overwrite: replace the folder, if it holds prepared text and nothing else.
      shown: show a progress bar on standard error; None shows it where that is a terminal.

    Raises:
      FileNotFoundError: a source is not there.
      FileExistsError: the folder holds something.
      ValueError: a source is malformed, there is no text, or too little to split as wanted; the message says where.
      OSError: files cannot be read or written, or a process died.
    """
    choice("split", split, ("auto", "documents", "tail"))
    number = real_number("val_fraction", val_fraction, 0, 1, open_high=True)
    val_fraction = val_fraction if isinstance(val_fraction, int) else number  # the manifest says 0 where 0 is given
    seed = whole_number("seed", seed, 0, 2**32 - 1)
    n_processes = whole_number("n_processes", n_processes, 0, 1024)
    fields = Fields(field, prompt_field, completion_field)
    target = files.expanded(folder)
    check = functools.partial(check_replaceable, target, overwrite)
    check()
    found = Sources(sources, fields, tokenizer.n_vocab, tokenizer.eot)
    with files.replacing(target, check) as temporary:
        written = _write_all(temporary, found, tokenizer, n_processes or processes_for(found.n_bytes), shown)
        division = divide(np.frombuffer(written.ends, np.int64), val_fraction, split, seed)
        sizes = {".bin": id_dtype(tokenizer.n_vocab).itemsize} | ({".mask.bin": 1} if fields.pairs else {})
        separate(temporary, division, sizes)
        manifest = {
            "gpt2_jax_tokens": VERSION,
            "dtype": id_dtype(tokenizer.n_vocab).name,
            "n_vocab": tokenizer.n_vocab,
            "eot": tokenizer.eot,
            "tokenizer_sha256": fingerprint(tokenizer),
            "split": division.split,
            "val_fraction": val_fraction,
            "seed": seed,
            "files": len(found.files),
            "empty_documents": found.n_empty,
            "characters": written.n_characters,
            "bytes": written.n_bytes,
            "end_of_text_as_text": written.n_markers,
            **{name: _counts(temporary, name, tokenizer, division.documents[name]) for name in SPLITS},
            "sha256": {path.name: files.sha256_of(path) for path in sorted(temporary.iterdir())},
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return open_prepared(target, tokenizer)


def check_replaceable(folder: Path, overwrite: bool) -> None:
    """Check that this folder may be written.

    Raises:
      FileExistsError: there is one that is not empty, and it is not to be replaced, or holds more than prepared text.
    """
    files.check_replaceable(
        folder, "prepared text", lambda names: names - FILES or (set() if MANIFEST in names else names), overwrite
    )


# ---- all tokens in one file


@dataclasses.dataclass
class _Written:
    """All tokens, in the file that becomes train.bin.

    Attributes:
      folder: where they are.
      ends: where each document ends, in tokens; eight bytes a document are all that grows with their number.
      masked: whether there is a file of masks too.
    """

    folder: Path
    masked: bool
    ends: array.array = dataclasses.field(default_factory=lambda: array.array("q"))
    n_tokens: int = 0
    n_characters: int = 0
    n_bytes: int = 0
    n_markers: int = 0


def _write_all(folder: Path, found: Sources, tokenizer: Tokenizer, n_processes: int, shown: bool | None) -> _Written:
    written = _Written(folder, found.fields.pairs)
    with contextlib.ExitStack() as stack:
        out = stack.enter_context((folder / "train.bin").open("wb"))
        mask = stack.enter_context((folder / "train.mask.bin").open("wb")) if written.masked else None
        bars = stack.enter_context(progress.bars("bytes", "left", shown=shown))
        encoded = stack.enter_context(contextlib.closing(encode_all(found.pieces(), tokenizer, n_processes)))
        for part in encoded:
            out.write(part.ids.tobytes())
            if mask:
                mask.write(part.counts.tobytes())
            written.ends.frombytes((part.ends + written.n_tokens).tobytes())
            written.n_tokens += len(part.ids)
            written.n_characters += part.n_characters
            written.n_bytes += part.n_bytes
            written.n_markers += part.n_markers
            bars.update("encoding", found.n_read, found.n_bytes or None)
        if not written.n_tokens:
            raise ValueError(f"there is no text in {len(found.files)} files, of {found.n_bytes:,} bytes together")
        if len(written.ends) == 1 and not written.masked:
            written.n_tokens -= 1
            written.ends[0] -= 1
            out.truncate(written.n_tokens * id_dtype(tokenizer.n_vocab).itemsize)
    return written


# ---- the manifest


def _counts(folder: Path, name: str, tokenizer: Tokenizer, n_documents: int) -> dict[str, int]:
    size = (folder / f"{name}.bin").stat().st_size
    counts = {"tokens": size // id_dtype(tokenizer.n_vocab).itemsize, "documents": n_documents}
    mask = folder / f"{name}.mask.bin"
    if mask.is_file():
        with mask.open("rb") as file:
            counts["targets"] = sum(int(np.count_nonzero(np.frombuffer(part, np.uint8))) for part in _parts(file))
    return counts


def _parts(file: Any) -> Iterator[bytes]:
    while data := file.read(BLOCK):
        yield data
