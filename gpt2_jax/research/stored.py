"""Activations on disk: what `gpt2_jax.research.harvest` writes, and the reader of it.

A folder holds `activations.json`, which describes it, and shards: `shard-00000`, `shard-00001`, and so on. A shard has
one .npy file per activation, with its name: `shard-00000/h3/resid_post.npy`, [n, ...]. There is no padding: each row is
one token. The rows are in the order of the documents. Three more files say which token a row belongs to:

- tokens.npy: int32 [n], the token's id.
- document.npy: int32 [n], the number of its document.
- position.npy: int32 [n], its position in the document. The model saw it at position % max_tokens.

.npy has no bfloat16. Its bits are stored as uint16: `numpy.load(path).view(ml_dtypes.bfloat16)`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gpt2_jax import files
from gpt2_jax.checks import real_number, whole_number

MANIFEST = "activations.json"
DIGESTS = "sha256.json"  # in a shard
VERSION = 1
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
INDEX = ("tokens", "document", "position")
INDEX_DTYPE = np.dtype(np.int32)
BLOCK = 64  # rows that are read together by `batches`
POOL_BYTES = 2**28


def shard_name(number: int) -> str:
    """Return the name of a shard's folder."""
    return f"shard-{number:05d}"


def as_stored(dtype: np.dtype) -> np.dtype:
    """Return the dtype of the .npy files for values of this dtype."""
    return np.dtype(np.uint16) if dtype == DTYPES["bfloat16"] else dtype


@dataclasses.dataclass(frozen=True)
class Rows:
    """One activation of all tokens, in the shards of a folder. Rows are read when they are indexed.

    `rows[5]`, `rows[10:20]`, `rows[[3, 1, 7]]` and `rows[mask]` return arrays in memory; `numpy.asarray(rows)` returns
    everything.

    Attributes:
      paths: the .npy file in each shard.
      counts: the rows of each.
      row_shape: the shape of one row, such as (768,).
      dtype: the dtype of the values.
    """

    paths: tuple[Path, ...]
    counts: tuple[int, ...]
    row_shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all rows together."""
        return (len(self), *self.row_shape)

    def __len__(self) -> int:
        return sum(self.counts)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._range(start, stop) if step == 1 else self._at(np.arange(start, stop, step))
        index_R = np.asarray(index)
        if index_R.dtype == bool and index_R.shape == (len(self),):
            index_R = np.flatnonzero(index_R)
        if not index_R.size:
            index_R = index_R.astype(np.int64)
        if isinstance(index, tuple) or not np.issubdtype(index_R.dtype, np.integer) or index_R.ndim > 1:
            raise IndexError(f"rows are indexed by a number, a slice, a list of numbers or a mask, not {index!r}")
        rows = self._at(index_R.reshape(-1))
        return rows[0] if index_R.ndim == 0 else rows

    def shard(self, number: int) -> np.ndarray:
        """Return the rows of one shard, memory-mapped and read-only.

        Raises:
          ValueError: the file is damaged.
        """
        path = self.paths[number]
        try:
            rows = np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        expected = (self.counts[number], *self.row_shape), as_stored(self.dtype)
        if (rows.shape, rows.dtype) != expected:
            raise ValueError(f"{path} is damaged: it has {rows.dtype}{rows.shape}, and not {expected[1]}{expected[0]}")
        return rows.view(self.dtype)

    def _range(self, start: int, stop: int) -> np.ndarray:
        parts, first = [np.zeros((0, *self.row_shape), self.dtype)], 0
        for number, count in enumerate(self.counts):
            if start < first + count and first < stop:
                parts.append(np.asarray(self.shard(number)[max(start - first, 0) : stop - first]))
            first += count
        return np.concatenate(parts)

    def _at(self, index_R: np.ndarray) -> np.ndarray:
        if index_R.size and not (-len(self) <= index_R.min() and index_R.max() < len(self)):
            raise IndexError(f"rows {index_R.min()} to {index_R.max()} are not all among the {len(self):,} rows")
        index_R = np.where(index_R < 0, index_R + len(self), index_R)
        end_S = np.cumsum(self.counts)
        shard_R = np.searchsorted(end_S, index_R, side="right")
        rows = np.empty((len(index_R), *self.row_shape), self.dtype)
        for number in np.unique(shard_R):
            here = shard_R == number
            rows[here] = self.shard(number)[index_R[here] - (end_S[number] - self.counts[number])]
        return rows


@dataclasses.dataclass(frozen=True)
class StoredActivations:
    """A folder of activations: `stored["h3/resid_post"]` is one of them as `Rows`, [n_tokens, ...].

    Attributes:
      folder: the folder.
      manifest: the content of activations.json. "activations" holds {name: {"axes", "shape", "dtype"}} of one row;
        "shards" the rows of each shard; "params" the model's `fingerprint`, which does not depend on its format.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the activations, in the order of computation."""
        return tuple(self.manifest["activations"])

    def __len__(self) -> int:
        """Return the number of tokens."""
        return sum(self.manifest["shards"])

    def __contains__(self, name: str) -> bool:
        return name in self.names or name in INDEX

    def __getitem__(self, name: str) -> Rows:
        if name not in self:
            raise KeyError(f"{self.folder} has no {name!r}; it has {', '.join((*self.names, *INDEX))}")
        one = self.manifest["activations"].get(name)
        shape, dtype = ((), INDEX_DTYPE) if one is None else (tuple(one["shape"]), DTYPES[one["dtype"]])
        counts = tuple(self.manifest["shards"])
        return Rows(
            tuple(self.folder / shard_name(i) / f"{name}.npy" for i in range(len(counts))), counts, shape, dtype
        )

    def batches(
        self, names: str | Sequence[str], size: int, seed: int, epoch: int = 0, pool_bytes: float = POOL_BYTES
    ) -> Iterator[Any]:
        """Return one epoch of shuffled batches: each token once. The last batch may be smaller.

        The shuffle: all rows are cut into blocks of 64 that follow one another. The blocks are put in a random order
        and read into a pool of about `pool_bytes`, and the rows of a pool are put in a random order. So a batch has
        rows from all over the data. If everything fits into one pool, every order of the rows is equally likely.
        Otherwise two tokens of one block are always in the same pool. The order depends only on the number of rows,
        the bytes of a row, `pool_bytes`, the seed and the epoch.

        Args:
          names: a name gives arrays [size, ...]; a list of names gives dicts of them, with the same tokens in each.
          size: rows of a batch, 1 or more.
          seed: 0 or more.
          epoch: another number gives another order.
          pool_bytes: bytes in memory.

        Raises:
          KeyError: a name is not in the folder.
          ValueError: a number is out of range, or a file is damaged.
        """
        rows = {name: self[name] for name in ([names] if isinstance(names, str) else names)}
        size = whole_number("size", size, 1)
        seed, epoch = whole_number("seed", seed, 0), whole_number("epoch", epoch, 0)
        row_bytes = sum(one.dtype.itemsize * int(np.prod(one.row_shape)) for one in rows.values())
        n_blocks = max(1, int(real_number("pool_bytes", pool_bytes, 0)) // max(1, row_bytes * BLOCK))
        batches = self._shuffled(rows, size, np.random.default_rng([seed, epoch]), n_blocks)
        return (batch[names] for batch in batches) if isinstance(names, str) else batches

    def _shuffled(
        self, rows: dict[str, Rows], size: int, rng: np.random.Generator, n_blocks: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yield the batches. What is left of a pool comes first in the next one."""
        block_K = rng.permutation(-(-len(self) // BLOCK))
        kept = {name: one[:0] for name, one in rows.items()}
        for first in range(0, len(block_K), n_blocks):
            row_R = (np.sort(block_K[first : first + n_blocks])[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)
            row_R = row_R[row_R < len(self)]
            order_R = rng.permutation(len(row_R))
            pool = {name: one[row_R] for name, one in rows.items()}
            while True:
                n_more = size - len(next(iter(kept.values())))
                kept = {name: np.concatenate([kept[name], pool[name][order_R[:n_more]]]) for name in pool}
                order_R = order_R[n_more:]
                if len(next(iter(kept.values()))) < size:
                    break
                yield kept
                kept = {name: values[:0] for name, values in kept.items()}
            del pool  # before the next one is read
        if len(next(iter(kept.values()))):
            yield kept

    def check(self) -> None:
        """Compare every file with the sha256 that was recorded when it was written. It reads every byte.

        Raises:
          ValueError: a file differs, or no sha256 was recorded.
        """
        for number in range(len(self.manifest["shards"])):
            shard = self.folder / shard_name(number)
            if not (shard / DIGESTS).is_file():
                raise ValueError(f"{self.folder} was written without checksums: there is nothing to compare with")
            recorded = files.read_object(shard / DIGESTS)
            for name, digest in files.hash_files(shard, recorded).items():
                if recorded[name] != digest:
                    raise ValueError(f"{shard / name} has changed: its sha256 is {digest}, not {recorded[name]}")


def open_activations(folder: str | os.PathLike) -> StoredActivations:
    """Open a folder that `harvest` or `gpt2-activations` wrote. Nothing is read until it is asked for.

    Raises:
      FileNotFoundError: there is no such folder, or it has no activations.
      ValueError: its description is damaged or of another version, or shards are missing.
    """
    path = files.expanded(folder)
    if not (path / MANIFEST).is_file():
        raise FileNotFoundError(f"{path} has no {MANIFEST}: it was not written by gpt2-activations")
    manifest = read_manifest(path)
    missing = [i for i in range(len(manifest["shards"])) if not (path / shard_name(i)).is_dir()]
    if missing:
        n_shards = len(manifest["shards"])
        raise ValueError(
            f"{path} is not complete: it has {n_shards - len(missing)} of {n_shards} shards; repeat the command that "
            "began it to continue"
        )
    return StoredActivations(path, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the content of activations.json.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged, or of another version.
    """
    path = folder / MANIFEST
    manifest = files.read_object(path)
    if "gpt2_jax_activations" not in manifest:
        raise ValueError(f"{path} does not describe activations")
    if manifest["gpt2_jax_activations"] != VERSION:
        raise ValueError(f"{path} has version {manifest['gpt2_jax_activations']}; this program reads version {VERSION}")
    shards, activations = manifest.get("shards"), manifest.get("activations")
    complete = isinstance(shards, list) and all(type(n) is int and n > 0 for n in shards)
    if not complete or not isinstance(activations, dict) or not all(map(_is_described, activations.values())):
        raise ValueError(f"{path} is damaged")
    return manifest


def _is_described(one: Any) -> bool:
    return isinstance(one, dict) and one.get("dtype") in DTYPES and isinstance(one.get("shape"), list)
