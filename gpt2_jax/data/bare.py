"""Files of token ids without a manifest, as other programs write them: what their bytes are.

Read without care, almost any file gives valid ids: ids of four bytes become an id and a 0 in turn, and every pair of
letters is an id of GPT-2. So the first bytes, and a sample of all bytes, are compared with what other programs write.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

# llm.c (karpathy/llm.c, dev/data/data_common.py): 256 int32, which begin with one of these numbers, before the ids.
HEADER = 4 * 256  # bytes
GPT2, LLAMA3, QUESTIONS = 20240520, 20240801, 20240522
MAGICS = {
    b"PK\x03\x04": "a file of PyTorch, or another zip file",
    b"\x93NUMPY": "an array of NumPy (.npy)",
    b"\x1f\x8b": "compressed with gzip",
    b"LITPKDS": "packed by LitGPT",
    LLAMA3.to_bytes(4, "little"): "a file of llm.c with the ids of Llama 3",
    QUESTIONS.to_bytes(4, "little"): "a file of llm.c with questions",
}
META = "meta.pkl"  # nanoGPT: a vocabulary of characters

SAMPLE = 2**16  # bytes, from each of three places
FEWEST = 16  # ids: a shorter sample shows nothing
MANY = 4096  # ids: enough to compare distributions of bytes
BYTES = 256  # ids: those of single bytes; ordinary text soon has others


class Layout(NamedTuple):
    """Where the ids of a file are.

    Attributes:
      offset: bytes before the first id.
      n_tokens: number of ids.
    """

    offset: int
    n_tokens: int


def layout_of(path: Path, dtype: np.dtype, n_vocab: int) -> Layout:
    """Return where the ids of a file are: from the beginning, or after the header of llm.c's GPT-2 files.

    Args:
      path: the file.
      dtype: the dtype of the ids: uint16 or uint32.
      n_vocab: number of ids in the vocabulary.

    Raises:
      ValueError: the file is of another kind, or its size does not fit.

    Warns:
      UserWarning: a long file has only ids below 256, and the vocabulary has many more.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(12)
    for magic, what in MAGICS.items():
        if begin.startswith(magic):
            raise ValueError(f"{path} has no token ids of this vocabulary: it is {what}")
    offset = 0
    if begin.startswith(GPT2.to_bytes(4, "little")):
        offset = HEADER
        _check_header(path, np.frombuffer(begin, "<i4"), size, dtype)
    if (size - offset) % dtype.itemsize:
        raise ValueError(f"{path} has {size:,} bytes, which is not a whole number of {dtype.itemsize}-byte ids")
    if dtype.itemsize == 2:
        _check_sample(path, _sample(path, offset, size), n_vocab)
    return Layout(offset, (size - offset) // dtype.itemsize)


def check_vocabulary(path: Path) -> None:
    """Check that no file beside a file of ids says that they belong to another vocabulary.

    Raises:
      ValueError: there is such a file.
    """
    if path.with_name(META).is_file():
        raise ValueError(
            f"{path} has ids of another vocabulary, the characters in {META} beside it: prepare the text itself with "
            f"gpt2-prepare (if {META} does not belong to it, move it away)"
        )


def _check_header(path: Path, header: np.ndarray, size: int, dtype: np.dtype) -> None:
    """Check the header of a file with GPT-2's ids of llm.c: magic, version, number of ids."""
    version, n_tokens = (int(number) for number in header[1:3]) if len(header) == 3 else (0, 0)
    if version != 1:
        raise ValueError(f"{path} is a token file of llm.c in version {version}; this program reads version 1")
    if size != HEADER + 2 * n_tokens:
        raise ValueError(
            f"{path} has {size:,} bytes, but its header says {n_tokens:,} ids, which need {HEADER + 2 * n_tokens:,}"
        )
    if dtype.itemsize != 2:
        raise ValueError(f"{path} is a token file of llm.c with GPT-2's ids, but the vocabulary is larger than GPT-2's")


def _sample(path: Path, offset: int, size: int) -> np.ndarray:
    """Return ids from the beginning, the middle and the end of a file, as uint16 [pairs, 2]."""
    last = max(offset, size - SAMPLE)
    starts = sorted({offset + (start - offset) // 8 * 8 for start in (offset, (offset + last) // 2, last)})
    parts = [np.fromfile(path, "<u2", SAMPLE // 2, offset=start) for start in starts]
    return np.concatenate([part[: len(part) // 4 * 4] for part in parts]).reshape(-1, 2)


def _check_sample(path: Path, ids: np.ndarray, n_vocab: int) -> None:
    """Check that a sample of ids looks like ids of two bytes.

    The first halves of larger ids are 0, or at most 3 for vocabularies up to 262,144 ids. Text that alternates so has
    every second token among the first four of the vocabulary: GPT-2's are the characters ! to $.

    The two bytes of an id are distributed differently: the high ones are mostly small, the low ones have all values.
    """
    if len(ids) < FEWEST:
        return
    low, high = ids[:, 0], ids[:, 1]
    if high.max() <= 3 and len(np.unique(low)) > 4 * len(np.unique(high)):
        size = 8 if not high.any() and not low[1::2].any() else 4
        raise ValueError(
            f"{path} has ids of {size} bytes, but the ids of a vocabulary of {n_vocab:,} have 2 bytes: write them "
            f'with numpy as .astype("<u2").tofile(...)'
        )
    if ids.size < MANY:
        return
    counts = [np.bincount(part.astype(np.uint8).ravel(), minlength=BYTES) / ids.size for part in (ids & 0xFF, ids >> 8)]
    alike = np.abs(counts[0] - counts[1]).sum() / 2 < 0.2 and np.count_nonzero(counts[0]) > 8
    if alike and min(count[:128].sum() for count in counts) > 0.9:  # mostly ASCII, or ids of few characters
        raise ValueError(f"{path} has one byte for each character or id, and not ids of 2 bytes: it may be text")
    if ids.max() < BYTES and n_vocab > 4 * BYTES:
        warnings.warn(
            f"{path}: the ids are all below {BYTES}, in a vocabulary of {n_vocab:,}: they may be of another vocabulary",
            UserWarning,
            stacklevel=2,
        )
