"""Token ids on disk: a prepared folder, or nanoGPT's bare files; read a window at a time.

A prepared folder holds train.bin and val.bin: the ids one after another, little-endian uint16 (uint32 where the
vocabulary has more than 65,535 ids), the layout of nanoGPT; where some tokens are no targets, train.mask.bin and
val.mask.bin: a byte a token, 1 where it counts in the loss; and tokens.json, the manifest, which `prepare` describes.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.files import expanded, read_json, sha256_of
from gpt2_jax.tokenizer import Tokenizer, fingerprint

MANIFEST = "tokens.json"
SPLITS = ("train", "val")
FILES = {MANIFEST, *(f"{split}{end}" for split in SPLITS for end in (".bin", ".mask.bin"))}
VERSION = 1
CHEAP = 10**9  # bytes: that much is hashed in a second, each time a folder is opened


def id_dtype(n_vocab: int) -> np.dtype:
    """Return what ids of a vocabulary are stored as: little-endian uint16, or uint32 above 65,535 ids."""
    return np.dtype("<u2" if n_vocab <= 0xFFFF else "<u4")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The ids of one split. It holds no open file, and no map of one: a map that lives long keeps all it ever read.

    Attributes:
      path: the file of ids.
      n_tokens: how many there are.
      n_vocab: every id is below this.
      mask_path: the file that says which tokens count, None if all do.
    """

    path: Path
    n_tokens: int
    n_vocab: int
    mask_path: Path | None = None

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids int32 [count] from token `start` on, and counts float32 [count], 1 where a token is a target.

        Raises:
          ValueError: there are not so many tokens, or an id is outside the vocabulary.
          OSError: the file cannot be read, or has become shorter.
        """
        if not 0 <= start <= start + count <= self.n_tokens:
            raise ValueError(f"{self.path} has {self.n_tokens:,} tokens: there are no {count:,} from {start:,} on")
        ids = _read(self.path, id_dtype(self.n_vocab), start, count)
        if count and int(ids.max()) >= self.n_vocab:
            at = start + int(np.argmax(ids >= self.n_vocab))
            raise ValueError(
                f"{self.path}: token {at:,} is the id {ids[at - start]}, outside the vocabulary of {self.n_vocab:,} "
                "ids: it was written with another tokenizer, or another dtype"
            )
        if self.mask_path is None:
            return ids.astype(np.int32), np.ones(count, np.float32)
        return ids.astype(np.int32), _read(self.mask_path, np.dtype(np.uint8), start, count).astype(np.float32)


def _read(path: Path, dtype: np.dtype, start: int, count: int) -> np.ndarray:
    values = np.fromfile(path, dtype, count, offset=start * dtype.itemsize)
    if len(values) != count:
        raise OSError(f"{path} has become shorter: {start + len(values):,} tokens are left")
    return values


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Text as token ids, in two splits.

    Attributes:
      train: to train on.
      val: to validate on; None where there is nothing.
      manifest: what tokens.json says; None for files that came without.
    """

    train: Tokens
    val: Tokens | None
    manifest: dict[str, Any] | None

    def digests(self) -> dict[str, str]:
        """Return the sha256 of each file by its name, read from the disk: about a second for each GB."""
        files = [path for split in (self.train, self.val) if split for path in (split.path, split.mask_path) if path]
        return {path.name: sha256_of(path) for path in files}

    def check(self) -> None:
        """Compare every file with the sha256 in the manifest, if there is one.

        Raises:
          ValueError: one differs.
        """
        expected = {} if self.manifest is None else self.manifest["sha256"]
        for name, digest in self.digests().items():
            if expected and digest != expected.get(name):
                raise ValueError(
                    f"{self.train.path.with_name(name)} is not what was written there: its sha256 is {digest}, and "
                    f"{expected.get(name)} in {MANIFEST}: prepare the folder again"
                )


def is_prepared(path: str | os.PathLike) -> bool:
    """Say whether `open_prepared` takes this, and not `prepare`: a folder with train.bin, or a .bin file."""
    path = expanded(path)
    return (path / "train.bin").is_file() or (path.suffix == ".bin" and path.is_file())


def open_prepared(path: str | os.PathLike, tokenizer: Tokenizer | None = None, n_vocab: int = 0) -> Prepared:
    """Open a folder that `prepare` wrote, a folder with nanoGPT's train.bin and val.bin, or one .bin file to train on.

    The sizes of the files are compared with the manifest, and below 1 GB their sha256 too. Ids of files without a
    manifest are compared with the vocabulary as they are read.

    Args:
      path: the folder or file.
      tokenizer: what the ids are to be of.
      n_vocab: the number of ids, for files without a manifest where no tokenizer is given.

    Raises:
      FileNotFoundError: there is no such folder or file, or it holds no tokens.
      ValueError: it was prepared with another vocabulary, files and manifest do not fit together, or nothing says
        how many ids there are.
    """
    path = expanded(path)
    if path.is_dir() and not (path / "train.bin").is_file():
        raise FileNotFoundError(f"{path} holds no train.bin: prepare it with gpt2-prepare")
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if (path / MANIFEST).is_file():
        return _open_with_manifest(path, tokenizer, n_vocab)
    n_vocab = tokenizer.n_vocab if tokenizer else n_vocab
    if n_vocab < 1:
        raise ValueError(f"{path} has no {MANIFEST}, which says how many ids there are: pass the tokenizer")
    if not path.is_dir():
        return Prepared(_bare(path, n_vocab), None, None)
    val = _bare(path / "val.bin", n_vocab) if (path / "val.bin").is_file() else None
    return Prepared(_bare(path / "train.bin", n_vocab), val if val and val.n_tokens else None, None)


def _open_with_manifest(folder: Path, tokenizer: Tokenizer | None, n_vocab: int) -> Prepared:
    manifest = _read_manifest(folder / MANIFEST)
    own = manifest["n_vocab"]
    if tokenizer and manifest["tokenizer_sha256"] != fingerprint(tokenizer):
        raise ValueError(
            f"{folder} was prepared with another vocabulary, of {own:,} ids, than this one of {tokenizer.n_vocab:,}: "
            "prepare the text again with the vocabulary of the model to train"
        )
    if n_vocab and n_vocab < own:
        raise ValueError(f"{folder} was prepared with a vocabulary of {own:,} ids; the model has {n_vocab:,}")
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
        raise ValueError(f"{path} is of version {manifest['gpt2_jax_tokens']}; this program reads {VERSION}")
    n_vocab, known = manifest.get("n_vocab"), {"dtype", "eot", "tokenizer_sha256", "sha256", *SPLITS}
    complete = known <= manifest.keys() and isinstance(manifest["sha256"], dict)
    complete = complete and all(type(_tokens(manifest[split])) is int for split in SPLITS)
    if type(n_vocab) is not int or n_vocab < 1 or not complete:
        raise ValueError(f"{path} is damaged: prepare the folder again")
    return manifest


def _tokens(counts: Any) -> Any:
    return counts.get("tokens") if isinstance(counts, dict) else None


def _sizes(folder: Path, split: str, manifest: dict[str, Any]) -> dict[Path, int]:
    """Return the bytes that each file of a split shall have."""
    n_tokens, mask = manifest[split]["tokens"], f"{split}.mask.bin"
    sizes = {folder / f"{split}.bin": n_tokens * id_dtype(manifest["n_vocab"]).itemsize}
    return sizes | ({folder / mask: n_tokens} if mask in manifest["sha256"] else {})


def _split(folder: Path, split: str, manifest: dict[str, Any]) -> Tokens:
    sizes = _sizes(folder, split, manifest)
    for path, size in sizes.items():
        if not path.is_file() or path.stat().st_size != size:
            found = f"{path.stat().st_size:,}" if path.is_file() else "no"
            raise ValueError(f"{path} has {found} bytes; by {MANIFEST} it has {size:,}: prepare the folder again")
    mask = folder / f"{split}.mask.bin"
    n_tokens, n_vocab = manifest[split]["tokens"], manifest["n_vocab"]
    return Tokens(folder / f"{split}.bin", n_tokens, n_vocab, mask if mask in sizes else None)


def _bare(path: Path, n_vocab: int) -> Tokens:
    size, itemsize = path.stat().st_size, id_dtype(n_vocab).itemsize
    if size % itemsize:
        raise ValueError(f"{path} has {size:,} bytes, which are no whole number of {itemsize}-byte ids")
    return Tokens(path, size // itemsize, n_vocab)
