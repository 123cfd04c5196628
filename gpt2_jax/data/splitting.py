"""Decides which documents or tokens are for validation, and moves them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

BLOCK = 2**23  # bytes copied at a time


class Division(NamedTuple):
    """Which tokens are for training, and which for validation.

    Attributes:
      split: how the text is divided: "documents" or "tail".
      documents: {side: number of documents}; a document that is cut counts for the side where it begins.
      stops: where runs of tokens end, in order; each run begins where the one before ends.
      for_val: for each run, whether it is for validation.
    """

    split: str
    documents: dict[str, int]
    stops: np.ndarray
    for_val: np.ndarray


def divide(ends: np.ndarray, val_fraction: float, split: str, seed: int, whole: bool = False) -> Division:
    """Decide what is for validation, as described in `prepare`.

    Args:
      ends: the end of each document, in tokens.
      val_fraction: share of the text for validation, in [0, 1).
      split: "auto", "documents" or "tail".
      seed: the seed of the draws.
      whole: let the tail begin where a document does: the nearest beginning.

    Raises:
      ValueError: one side would be empty.
    """
    n = int(ends[-1])
    n_train = int(n * (1 - Decimal(repr(val_fraction))))  # exact: binary floats would round 0.9 and 1 - 0.1
    if split != "tail":
        drawn = np.fromiter((_draw(seed, i) < val_fraction for i in range(len(ends))), bool, len(ends))
        n_val = int(np.diff(ends, prepend=0)[drawn].sum())
        if split == "documents" and val_fraction and not 0 < n_val < n:
            raise ValueError(
                f"the random split puts none of the {len(ends):,} documents into "
                f"{'training' if n_val else 'validation'}: use the tail split, or another seed"
            )
        fair = (n - n_train) / 2 <= n_val <= (n - n_train) * 2 and n - n_val >= n_train / 2
        if split == "documents" or not val_fraction or (fair and 0 < n_val < n):
            return _by_documents(ends, drawn)
    if val_fraction and min(n - n_train, n_train) < 2:
        raise ValueError(f"{n:,} tokens are too few to keep {val_fraction:g} for validation: set val_fraction to 0")
    if whole and val_fraction and len(ends) > 1:
        n_train = int(ends[:-1][np.argmin(np.abs(ends[:-1] - n_train))])
    n_begin = int((np.concatenate([[0], ends[:-1]]) < n_train).sum())
    documents = {"train": n_begin, "val": len(ends) - n_begin}
    return Division("tail", documents, np.array([n_train, n]), np.array([False, True]))


def _draw(seed: int, index: int) -> float:
    """Return a number in [0, 1) that depends only on these arguments, on any machine and in any version."""
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _by_documents(ends: np.ndarray, drawn: np.ndarray) -> Division:
    last = np.append(drawn[1:] != drawn[:-1], True)  # whether the next document goes to the other side
    n_val = int(drawn.sum())
    return Division("documents", {"train": len(ends) - n_val, "val": n_val}, ends[last], drawn[last])


def separate(folder: Path, division: Division, sizes: Mapping[str, int]) -> None:
    """Move the validation tokens out of the train files into the val files, and close the gaps.

    Args:
      folder: the folder of the files.
      division: which tokens to move.
      sizes: {end of the file names: bytes of a token}.
    """
    for end, size in sizes.items():
        with (folder / f"train{end}").open("r+b") as train, (folder / f"val{end}").open("wb") as val:
            start = kept = 0
            for stop, for_val in zip(division.stops, division.for_val, strict=True):
                stop = int(stop) * size
                if for_val:
                    _copy(train, start, stop, val, val.tell())
                else:
                    _copy(train, start, stop, train, kept)
                    kept += stop - start
                start = stop
            train.truncate(kept)


def _copy(source: BinaryIO, start: int, stop: int, dest: BinaryIO, to: int) -> None:
    """Copy bytes to the offset `to`. Within one file, `to` must not be after `start`."""
    if source is dest and start == to:
        return
    for at in range(start, stop, BLOCK):
        source.seek(at)
        data = source.read(min(BLOCK, stop - at))
        dest.seek(to + at - start)
        dest.write(data)
