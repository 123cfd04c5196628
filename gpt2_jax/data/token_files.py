"""Token ids on disk, read one window at a time: a prepared folder, or the bare files of nanoGPT and llm.c.

A prepared folder contains train.bin and val.bin: the ids one after another, as little-endian uint16 (uint32 if the
vocabulary has more than 65,535 ids). This is nanoGPT's layout. If some tokens are not targets, it also contains
train.mask.bin and val.mask.bin: one byte per token, 1 if it counts in the loss. The manifest is tokens.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any, cast

import numpy as np

from gpt2_jax.data.bare import check_vocabulary, layout_of
from gpt2_jax.files import expanded, read_json, sha256_of
from gpt2_jax.tokenizer import Tokenizer, fingerprint

MANIFEST = "tokens.json"
SPLITS = ("train", "val")
FILES = {MANIFEST, *(f"{split}{end}" for split in SPLITS for end in (".bin", ".mask.bin"))}
VERSION = 1
BLOCK = 2**20  # bytes read at a time
CHEAP = 10**9  # bytes: smaller folders are hashed each time they are opened, in up to a second


def id_dtype(n_vocab: int) -> np.dtype:
    """Return the dtype that stores the ids of a vocabulary: little-endian uint16, or uint32 above 65,535 ids."""
    return np.dtype("<u2" if n_vocab <= 0xFFFF else "<u4")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The ids of one split. No file is kept open or mapped: a long-lived memory map keeps all pages that it has read.

    Attributes:
      path: the file of ids.
      n_tokens: the number of ids.
      n_vocab: every id is below this.
      mask_path: the file that says which tokens count in the loss; None if all do.
      n_rows: rows of the model that reads the ids; None if they are not known. An id without a row is refused.
      offset: bytes before the first id.
    """

    path: Path
    n_tokens: int
    n_vocab: int
    mask_path: Path | None = None
    n_rows: int | None = None
    offset: int = 0

    def within(self, n_rows: int) -> Tokens:
        """Return the same ids for a model with this many rows. An id without a row is refused when it is read."""
        return dataclasses.replace(self, n_rows=n_rows)

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids int32 [count] from token `start` on, and counts float32 [count], 1 where a token is a target.

        Raises:
          ValueError: the range is outside the file, or an id is outside the vocabulary.
          OSError: the file cannot be read, or has become shorter.
        """
        if not 0 <= start <= start + count <= self.n_tokens:
            raise ValueError(f"{self.path} has {self.n_tokens:,} tokens: cannot read {count:,} from token {start:,} on")
        ids = _read(self.path, id_dtype(self.n_vocab), start, count, self.offset)
        self._check(ids, start)
        if self.mask_path is None:
            return ids.astype(np.int32), np.ones(count, np.float32)
        return ids.astype(np.int32), _read(self.mask_path, np.dtype(np.uint8), start, count).astype(np.float32)

    def digest(self) -> str:
        """Return the sha256 of the file of ids, in hexadecimal, and check every id: about one second per GB.

        Raises:
          ValueError: an id is outside the vocabulary, or has no row in the model.
        """
        dtype, digest, start = id_dtype(self.n_vocab), hashlib.sha256(), 0
        with self.path.open("rb") as file:
            digest.update(file.read(self.offset))
            while data := file.read(BLOCK):
                digest.update(data)
                ids = np.frombuffer(data, dtype, len(data) // dtype.itemsize)
                self._check(ids, start)
                start += len(ids)
        return digest.hexdigest()

    def _check(self, ids: np.ndarray, start: int) -> None:
        """Check the ids from token `start` on."""
        largest = int(ids.max(initial=0))
        if largest >= self.n_vocab:
            at = int(np.argmax(ids >= self.n_vocab))
            raise ValueError(
                f"{self.path}: token {start + at:,} is the id {ids[at]}, outside the vocabulary of {self.n_vocab:,} "
                "ids: it was written with another tokenizer, or another dtype"
            )
        if self.n_rows is not None and largest >= self.n_rows:
            raise ValueError(
                f"{self.path} has the id {largest}, but the model has only {self.n_rows:,} rows: resize its "
                "embedding, or prepare the text without this added token"
            )


def _read(path: Path, dtype: np.dtype, start: int, count: int, offset: int = 0) -> np.ndarray:
    values = np.fromfile(path, dtype, count, offset=offset + start * dtype.itemsize)
    if len(values) != count:
        raise OSError(f"{path} has become shorter: {start + len(values):,} tokens are left")
    return values


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Text as token ids, in two splits.

    Attributes:
      train: the tokens for training.
      val: the tokens for validation; None if there are none.
      manifest: the content of tokens.json; None if there is no such file.
    """

    train: Tokens
    val: Tokens | None
    manifest: dict[str, Any] | None

    def within(self, n_rows: int) -> Prepared:
        """Return the same text for a model with this many rows. An id without a row is refused when it is read."""
        train, val = (split and split.within(n_rows) for split in (self.train, self.val))
        return Prepared(cast("Tokens", train), val, self.manifest)

    def digests(self) -> dict[str, str]:
        """Return {file name: sha256} of all files, and check every id: about one second per GB.

        Raises:
          ValueError: an id is outside the vocabulary, or has no row in the model.
        """
        digests = {}
        for split in filter(None, (self.train, self.val)):
            digests[split.path.name] = split.digest()
            if split.mask_path:
                digests[split.mask_path.name] = sha256_of(split.mask_path)
        return digests

    def check(self) -> None:
        """Compare every file with the sha256 in the manifest, if there is one.

        Raises:
          ValueError: a file differs.
        """
        if not (expected := {} if self.manifest is None else self.manifest["sha256"]):
            return
        for split in filter(None, (self.train, self.val)):
            for path in filter(None, (split.path, split.mask_path)):
                if (digest := sha256_of(path)) != expected.get(path.name):
                    raise ValueError(
                        f"{path} has changed: its sha256 is {digest}, but {MANIFEST} says {expected.get(path.name)}; "
                        "prepare the folder again"
                    )


def is_prepared(path: str | os.PathLike) -> bool:
    """Return whether this path is for `open_prepared`, not for `prepare`: a folder with train.bin, or a .bin file."""
    path = expanded(path)
    return (path / "train.bin").is_file() or (path.suffix == ".bin" and path.is_file())


def open_prepared(path: str | os.PathLike, tokenizer: Tokenizer | None = None, n_vocab: int = 0) -> Prepared:
    """Open a folder that `prepare` wrote, a folder with nanoGPT's train.bin and val.bin, or one .bin file to train on.

    A .bin file has ids from its first byte on, as uint16 (uint32 if the vocabulary has more than 65,535 ids), or after
    the header of llm.c. The file sizes are compared with the manifest. Below 1 GB, the sha256 of each file is compared
    too. Without a manifest, a sample of the bytes is compared with other formats, and each id is compared with the
    vocabulary when it is read. `fit` compares all ids before the first step.

    Args:
      path: the folder or file.
      tokenizer: the tokenizer that the ids must belong to.
      n_vocab: the number of ids in the vocabulary, for files without a manifest if no tokenizer is given.

    Raises:
      FileNotFoundError: there is no such folder or file, or it has no tokens.
      ValueError: the folder was prepared with another vocabulary, files and manifest do not match, a file has another
        format, nanoGPT's meta.pkl is beside it and a tokenizer is given, or the number of ids is not known.
    """
    path = expanded(path)
    if path.is_dir() and not (path / "train.bin").is_file():
        raise FileNotFoundError(f"{path} has no train.bin: prepare the folder with gpt2-prepare")
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if (path / MANIFEST).is_file():
        return _open_with_manifest(path, tokenizer, n_vocab)
    n_vocab = tokenizer.n_vocab if tokenizer else n_vocab
    if n_vocab < 1:
        raise ValueError(f"{path} has no {MANIFEST} with the number of ids: pass the tokenizer")
    if tokenizer:
        check_vocabulary(path / "train.bin" if path.is_dir() else path)
    if not path.is_dir():
        return Prepared(_bare(path, n_vocab), None, None)
    val = _bare(path / "val.bin", n_vocab) if (path / "val.bin").is_file() else None
    return Prepared(_bare(path / "train.bin", n_vocab), val if val and val.n_tokens else None, None)


def _open_with_manifest(folder: Path, tokenizer: Tokenizer | None, n_vocab: int) -> Prepared:
    manifest = _read_manifest(folder / MANIFEST)
    own = manifest["n_vocab"]
    if tokenizer and manifest["tokenizer_sha256"] != fingerprint(tokenizer):
        raise ValueError(
            f"{folder} was prepared with a different vocabulary ({own:,} ids, this one has {tokenizer.n_vocab:,}): "
            "prepare the text again with the vocabulary of the model"
        )
    if n_vocab and n_vocab < own:
        raise ValueError(f"{folder} was prepared with a vocabulary of {own:,} ids, but the model has {n_vocab:,}")
    splits = {split: _split(folder, split, manifest) for split in SPLITS}
    prepared = Prepared(splits["train"], splits["val"] if splits["val"].n_tokens else None, manifest)
    if sum(size for split in SPLITS for size in _sizes(folder, split, manifest).values()) < CHEAP:
        prepared.check()
    return prepared


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = read_json(path)
    if not isinstance(manifest, dict) or "gpt2_jax_tokens" not in manifest:
        raise ValueError(f"{path} is not the manifest of prepared text")
    if manifest["gpt2_jax_tokens"] != VERSION:
        raise ValueError(f"{path} has version {manifest['gpt2_jax_tokens']}; this program reads version {VERSION}")
    n_vocab, known = manifest.get("n_vocab"), {"dtype", "eot", "tokenizer_sha256", "sha256", *SPLITS}
    complete = known <= manifest.keys() and isinstance(manifest["sha256"], dict)
    complete = complete and all(type(_tokens(manifest[split])) is int for split in SPLITS)
    if type(n_vocab) is not int or n_vocab < 1 or not complete:
        raise ValueError(f"{path} is damaged: prepare the folder again")
    return manifest


def _tokens(counts: Any) -> Any:
    return counts.get("tokens") if isinstance(counts, dict) else None


def _sizes(folder: Path, split: str, manifest: dict[str, Any]) -> dict[Path, int]:
    """Return {file: expected bytes} of a split."""
    n_tokens, mask = manifest[split]["tokens"], f"{split}.mask.bin"
    sizes = {folder / f"{split}.bin": n_tokens * id_dtype(manifest["n_vocab"]).itemsize}
    return sizes | ({folder / mask: n_tokens} if mask in manifest["sha256"] else {})


def _split(folder: Path, split: str, manifest: dict[str, Any]) -> Tokens:
    sizes = _sizes(folder, split, manifest)
    for path, size in sizes.items():
        if not path.is_file() or path.stat().st_size != size:
            found = f"{path.stat().st_size:,}" if path.is_file() else "no"
            raise ValueError(f"{path} has {found} bytes, but {MANIFEST} says {size:,}: prepare the folder again")
    mask = folder / f"{split}.mask.bin"
    n_tokens, n_vocab = manifest[split]["tokens"], manifest["n_vocab"]
    return Tokens(folder / f"{split}.bin", n_tokens, n_vocab, mask if mask in sizes else None)


def _bare(path: Path, n_vocab: int) -> Tokens:
    layout = layout_of(path, id_dtype(n_vocab), n_vocab)
    return Tokens(path, layout.n_tokens, n_vocab, offset=layout.offset)
