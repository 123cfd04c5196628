"""Turn text into a folder of token ids. It is tokenized and split once; every training run reads the result."""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gpt2_jax import files, progress
from gpt2_jax.checks import choice, real_number, whole_number
from gpt2_jax.data import parts
from gpt2_jax.data.encoding import PREPARED, Encoded, check_is_started, encode_all, workers_for
from gpt2_jax.data.fields import Fields
from gpt2_jax.data.sources import Sources
from gpt2_jax.data.splitting import BLOCK, divide, separate
from gpt2_jax.data.token_files import FILES, MANIFEST, SPLITS, VERSION, Prepared, id_dtype, open_prepared
from gpt2_jax.processes import Share
from gpt2_jax.tokenizer import Tokenizer, fingerprint
from gpt2_jax.tokenizer import end_of_text as end_of_text_id


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
    encoding: str = "utf-8",
    end_of_text: Literal["text", "split"] = "text",
    skip_bad_rows: bool = False,
    n_workers: int = 0,
    overwrite: bool = False,
    shown: bool | None = None,
    share: Share | None = None,
) -> Prepared:
    """Tokenize text, and write it to a new folder as train.bin and val.bin with a manifest, tokens.json.

    Each document is followed by the id `tokenizer.eot`. By default the characters `<|endoftext|>` inside a text stay
    ordinary text. A single document has no `tokenizer.eot` after it, unless it is a pair. Documents without text are
    left out.

    The result depends only on the text, its order, the tokenizer, and the settings for fields and split. The folder
    appears in one step. If the process is killed before that, the folder does not exist, or is unchanged.

    Args:
      sources: files and folders to read, in order. A .txt or .md file is one document. A .jsonl or .ndjson file has one
        document per line, in a field of an object; a .json file has an array of such objects. A .csv or .tsv file has
        one document per row, in a column that the first line names (a single column may have any name). A .csv file
        may use ; or tabs instead of commas, if its first line does. A .parquet file has one document per row; it needs
        pyarrow. All of these except .parquet may be compressed with gzip: .jsonl.gz. A .bin file has token ids, with
        the end-of-text id between documents. A folder means all such files in it, sorted by name; links are followed,
        and the manifest counts the other files. "-" is standard input, one document.
      folder: the folder to write.
      tokenizer: encodes the text.
      field: the field of JSON objects, or the column of tables, that contains the text.
      prompt_field: the field of prompts. With completion_field, it replaces `field`. Prompt and completion are encoded
        separately, so a completion begins at a token boundary. Only the completion and the end-of-text id after it
        count in the loss; train.mask.bin and val.mask.bin record this.
      completion_field: the field of completions.
      val_fraction: share of the text for validation, in [0, 1).
      split: "documents" puts each document into validation with probability val_fraction, drawn from (seed, document
        number). "tail" trains on the first `int(n * (1 - val_fraction))` of all n tokens, computed exactly, and
        validates on the rest; pairs are not cut. "auto" is "documents", unless that leaves one side without a document,
        or with less than half or more than twice its share of the tokens. Then it is "tail".
      seed: the seed of the draws.
      encoding: the encoding of the text, as Python names it, for example "cp1252". It is not used for .parquet and .bin
        files. A file that is not in UTF-8 is not divided over several processes.
      end_of_text: what the characters `<|endoftext|>` in a text are: "text", or "split": the end of a document, as in
        corpora that separate documents so. The ids are then those of tiktoken with this special token allowed, except
        that documents without text are left out. Not for prompts and completions.
      skip_bad_rows: leave out and count lines that are not JSON, records without the field or with another value than
        a string in it, and rows with too few or too many columns. Otherwise the first one is an error.
      n_workers: number of processes on this machine that encode; 0 uses one per core if there is enough text, else one.
      overwrite: replace the folder, if it contains only prepared text.
      shown: show a progress bar on standard error; None shows it only on a terminal.
      share: this process's share, if several connected processes call this with the same arguments and see the same
        files. They divide the text, and write the files that one process writes. Finished parts are kept in the folder
        NAME.parts, and resumed with, until the result is complete. Both together take twice the space of the result.

    Raises:
      FileNotFoundError: a source does not exist.
      FileExistsError: the folder is not empty, and may not be replaced.
      ValueError: a source is malformed, there is no text, or too little for this split; the message says where. Or the
        vocabulary has no end-of-text token.
      OSError: files cannot be read or written, or an encoding process died.
      PeerError: another process of `share` failed; an OSError.
    """
    share = share or Share()
    with share.telling():
        choice("split", split, ("auto", "documents", "tail"))
        choice("end_of_text", end_of_text, ("text", "split"))
        number = real_number("val_fraction", val_fraction, 0, 1, open_high=True)
        val_fraction = val_fraction if isinstance(val_fraction, int) else number  # an integer 0 stays 0 in the manifest
        settings = {"split": split, "val_fraction": val_fraction, "seed": whole_number("seed", seed, 0, 2**32 - 1)}
        n_workers = whole_number("n_workers", n_workers, 0, 1024)
        fields = Fields(field, prompt_field, completion_field)
        target = files.expanded(folder)
        check = functools.partial(check_replaceable, target, overwrite)
        check()
        found = Sources(
            sources, fields, tokenizer.n_vocab, end_of_text_id(tokenizer, PREPARED),
            encoding=encoding, splits=end_of_text == "split", skips=skip_bad_rows,
        )  # fmt: skip

        def write(encoded: Generator[Encoded, None, None], title: str = "joining") -> None:
            with files.replacing(target, check) as temporary, contextlib.closing(encoded):
                _write(temporary, found, tokenizer, encoded, settings, title, shown)

        n_workers = n_workers or workers_for(found.n_bytes // share.count)
        if n_workers > 1:
            check_is_started()
        if share.count > 1 or parts.folder_of(target).exists():
            parts.prepare_share(target, found, tokenizer, share, n_workers, shown, write)
        else:
            write(encode_all(found.pieces(), tokenizer, n_workers), "encoding")
        return open_prepared(target, tokenizer)


def _write(
    folder: Path,
    found: Sources,
    tokenizer: Tokenizer,
    encoded: Iterator[Encoded],
    settings: dict[str, Any],
    title: str,
    shown: bool | None,
) -> None:
    """Write the files of a prepared folder.

    Args:
      folder: an empty folder.
      found: the text.
      tokenizer: the vocabulary of the ids.
      encoded: the ids of the text, in order.
      settings: "split", "val_fraction" and "seed", as in `prepare`.
      title: the title of the progress bar.
      shown: as in `prepare`.
    """
    written = _write_all(folder, found, encoded, id_dtype(tokenizer.n_vocab).itemsize, title, shown)
    division = divide(np.frombuffer(written.ends, np.int64), **settings, whole=written.masked)
    sizes = {".bin": id_dtype(tokenizer.n_vocab).itemsize} | ({".mask.bin": 1} if written.masked else {})
    separate(folder, division, sizes)
    manifest = {
        "gpt2_jax_tokens": VERSION,
        "dtype": id_dtype(tokenizer.n_vocab).name,
        "n_vocab": tokenizer.n_vocab,
        "eot": tokenizer.eot,
        "tokenizer_sha256": fingerprint(tokenizer),
        "split": division.split,
        "val_fraction": settings["val_fraction"],
        "seed": settings["seed"],
        "files": len(found.files),
        "file_types": _sorted(collections.Counter(form.suffix or "standard input" for form in found.forms)),
        "left_out": _sorted(found.left_out),
        "encoding": found.encoding,
        "delimiters": _sorted(found.tally.delimiters),
        "empty_documents": found.tally.n_empty,
        "skipped_rows": found.tally.n_skipped,
        "first_skipped_row": found.skipped(),
        "end_of_text": "split" if found.splits else "text",
        "characters": written.n_characters,
        "bytes": written.n_bytes,
        "end_of_text_as_text": written.n_markers,
        **{name: _counts(folder, name, tokenizer, division.documents[name]) for name in SPLITS},
        "sha256": {path.name: files.sha256_of(path) for path in sorted(folder.iterdir())},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def check_replaceable(folder: Path, overwrite: bool) -> None:
    """Check that this folder may be written.

    Raises:
      FileExistsError: the folder is not empty, and `overwrite` is False or it contains more than prepared text.
    """
    files.check_replaceable(
        folder, "prepared text", lambda names: names - FILES or (set() if MANIFEST in names else names), overwrite
    )


# ---- all tokens in one file


@dataclasses.dataclass
class _Written:
    """All tokens, in the file that becomes train.bin.

    Attributes:
      folder: the folder of the file.
      ends: the end of each document, in tokens. Only this grows with the number of documents: eight bytes each.
      masked: whether a file of masks is written too.
    """

    folder: Path
    masked: bool
    ends: array.array = dataclasses.field(default_factory=lambda: array.array("q"))
    n_tokens: int = 0
    n_characters: int = 0
    n_bytes: int = 0
    n_markers: int = 0


def _write_all(
    folder: Path, found: Sources, encoded: Iterator[Encoded], itemsize: int, title: str, shown: bool | None
) -> _Written:
    written = _Written(folder, found.fields.pairs)
    with contextlib.ExitStack() as stack:
        out = stack.enter_context((folder / "train.bin").open("wb"))
        mask = stack.enter_context((folder / "train.mask.bin").open("wb")) if written.masked else None
        bars = stack.enter_context(progress.bars("bytes", "left", shown=shown))
        for part in encoded:
            out.write(part.ids.tobytes())
            if mask:
                mask.write(part.counts.tobytes())
            written.ends.frombytes((part.ends + written.n_tokens).tobytes())
            written.n_tokens += len(part.ids)
            written.n_characters += part.n_characters
            written.n_bytes += part.n_bytes
            written.n_markers += part.n_markers
            bars.update(title, found.n_read, found.n_bytes or None)
        if not written.n_tokens:
            raise ValueError(f"there is no text in {len(found.files)} files with {found.n_bytes:,} bytes in total")
        if len(written.ends) == 1 and not written.masked:
            written.n_tokens -= 1
            written.ends[0] -= 1
            out.truncate(written.n_tokens * itemsize)
    return written


# ---- the manifest


def _sorted(numbers: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(numbers.items()))


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
