"""Batches of examples: one in a row, padded, or several packed into it. A batch is a function of (seed, step)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from gpt2_jax.checks import whole_number
from gpt2_jax.data.batching import Batch, Orders, read_ahead
from gpt2_jax.data.examples import Examples, PreparedExamples
from gpt2_jax.data.packing import Part, pack, parts_of
from gpt2_jax.data.token_files import Prepared, Tokens

BLOCK = 2**22  # tokens that are searched at a time


class Rows(Protocol):
    """The rows of an epoch. A row is a Batch without the axis of the rows.

    Attributes:
      n_inputs: tokens that are read in an epoch, without padding.
      n_cut: examples of which a part is left out, because they are longer than a window.
      n_skipped: examples that are left out, because no target is left in the part that fits.
    """

    n_inputs: int
    n_cut: int
    n_skipped: int

    def __len__(self) -> int: ...

    def read(self, number: int) -> Batch:
        """Return a row."""
        ...


class LabelledRows:
    """One text with its label in each row: tokens [T], padded at the end; targets [], the label's number."""

    def __init__(self, examples: Examples, n_tokens: int, label_weights: np.ndarray | None = None):
        """Take the examples, T, and the weight of each label in the loss (None: 1 for all)."""
        if examples.labels is None:
            raise ValueError(f"{examples.path} has no labels")
        self.examples, self.labels, self.n_tokens = examples, examples.labels, n_tokens
        self.label_weights = np.ones(int(self.labels.max()) + 1) if label_weights is None else label_weights
        self.n_inputs = int(np.minimum(examples.lengths, n_tokens).sum())
        self.n_cut, self.n_skipped = int((examples.lengths > n_tokens).sum()), 0

    def __len__(self) -> int:
        return len(self.examples)

    def read(self, number: int) -> Batch:
        """Return a row."""
        ids, _ = self.examples.read(number, 0, self.n_tokens)
        label = self.labels[number]
        return Batch(
            tokens=_padded(ids, self.n_tokens),
            targets=np.array(label, np.int32),
            weights=np.array(self.label_weights[label], np.float32),
            lengths=np.array(max(len(ids), 1), np.int32),
        )


class PaddedRows:
    """One example in each row, padded at the end. Longer examples lose their end.

    Attributes:
      sizes: int64 [rows], the tokens of each row.
    """

    def __init__(self, examples: Examples, n_tokens: int):
        """Take the examples, and T."""
        self.examples, self.n_tokens = examples, n_tokens
        self.numbers = np.flatnonzero(examples.n_targets(n_tokens + 1))
        lengths = examples.lengths[self.numbers]
        self.sizes = np.minimum(lengths - 1, n_tokens)
        self.n_inputs, self.n_cut = int(self.sizes.sum()), int((lengths > n_tokens + 1).sum())
        self.n_skipped = len(examples) - len(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, number: int) -> Batch:
        """Return a row."""
        ids, counts = self.examples.read(int(self.numbers[number]), 0, self.n_tokens + 1)
        arrays = (ids[:-1], ids[1:], counts[1:])
        tokens, targets, weights = (_padded(array, self.n_tokens) for array in arrays)
        return Batch(tokens, targets, weights)


class PackedRows:
    """Several examples in each row, by `pack`; `segments` [T] says which is which: 1, 2, ..., and 0 for padding.

    Attributes:
      sizes: int64 [parts], the tokens of each example, or of each part of a divided one.
    """

    def __init__(self, examples: Examples, n_tokens: int, split: bool = False):
        """Take the examples, T, and whether longer examples are divided (else they lose their end)."""
        self.examples, self.n_tokens = examples, n_tokens
        kept = examples.n_targets(n_tokens + 1) > 0
        self.parts = [part for part in parts_of(examples.lengths, n_tokens, split) if split or kept[part.example]]
        self.sizes = np.array([part.n_tokens - 1 for part in self.parts], np.int64)
        self.bins = pack(self.sizes.tolist(), n_tokens)
        self.n_inputs = int(self.sizes.sum())
        self.n_cut = 0 if split else int((examples.lengths[kept] > n_tokens + 1).sum())
        self.n_skipped = int((~kept).sum())

    def __len__(self) -> int:
        return len(self.bins)

    def read(self, number: int) -> Batch:
        """Return a row."""
        parts: list[Part] = [self.parts[i] for i in self.bins[number]]
        found = [self.examples.read(*part) for part in parts]
        sizes = [part.n_tokens - 1 for part in parts]
        tokens = np.concatenate([ids[:-1] for ids, _ in found])
        targets = np.concatenate([ids[1:] for ids, _ in found])
        weights = np.concatenate([counts[1:] for _, counts in found])
        segments = np.repeat(np.arange(1, len(parts) + 1, dtype=np.int32), sizes)
        padded = (_padded(array, self.n_tokens) for array in (tokens, targets, weights, segments))
        row = dict(zip(("tokens", "targets", "weights", "segments"), padded, strict=True))
        return Batch(**row)


@functools.lru_cache(maxsize=8)  # it reads the whole text
def documents_of(tokens: Tokens, eot: int | None) -> Examples:
    """Return the documents of a text as examples. Each ends with the id `eot`; None is one document."""
    ends = []
    for start in range(0, tokens.n_tokens if eot is not None else 0, BLOCK):
        ids, _ = tokens.read(start, min(BLOCK, tokens.n_tokens - start))
        ends.append(start + 1 + np.flatnonzero(ids == eot))
    found = np.concatenate([*ends, np.zeros(0, np.int64)])
    if not len(found) or found[-1] < tokens.n_tokens:
        found = np.append(found, tokens.n_tokens)
    return Examples(tokens, found.astype(np.int64))


def pairs_of(data: Prepared) -> PreparedExamples:
    """Return the pairs of a folder that gpt2-prepare wrote from prompts and completions, as examples."""
    manifest = data.manifest or {}

    def split(tokens: Tokens | None) -> Any:
        files = () if tokens is None else tuple(path for path in (tokens.path, tokens.mask_path) if path)
        return tokens and dataclasses.replace(documents_of(tokens, manifest.get("eot")), files=files)

    return PreparedExamples(split(data.train), split(data.val), None, manifest | {"labels": []})


def padding_share(rows: Rows, n_tokens: int) -> float:
    """Return the share of padding in the rows of an epoch."""
    return 1 - rows.n_inputs / max(len(rows) * n_tokens, 1)


def padding_shares(rows: PaddedRows | PackedRows) -> tuple[float, float]:
    """Return the share of padding with one example, or one part of it, in each row; and the share with packed rows."""
    n_packed = len(rows) if isinstance(rows, PackedRows) else len(pack(rows.sizes.tolist(), rows.n_tokens))
    alone, packed = (1 - rows.n_inputs / max(n * rows.n_tokens, 1) for n in (len(rows.sizes), n_packed))
    return alone, packed


def example_batches(
    rows: Rows, batch_size: int, seed: int, first_step: int = 0, process_index: int = 0, process_count: int = 1
) -> Generator[Batch, None, None]:
    """Yield training batches without end, from step `first_step` on. A late first step takes no longer to reach.

    Row r of step s is row number `s * batch_size + r` of a sequence of epochs. An epoch has each row once, in an order
    that is drawn from (seed, epoch).

    Args:
      rows: the rows of an epoch.
      batch_size: rows of a step, over all processes.
      seed: the seed of the order, in `[0, 2**32)`.
      first_step: the number of the first step.
      process_index: as in `gpt2_jax.data.batches`.
      process_count: as in `gpt2_jax.data.batches`.

    Raises:
      ValueError: there are no rows, or a number is not valid.
    """
    if not len(rows):
        raise ValueError("there are no examples to train on")
    orders = Orders(len(rows), whole_number("seed", seed, 0, 2**32 - 1))

    def read(number: int) -> Batch:
        return rows.read(orders.row(number)[0])

    return read_ahead(read, _stacked, batch_size, whole_number("first_step", first_step), process_index, process_count)


def example_windows(rows: Rows, batch_size: int, at_most: int = 0) -> Iterator[Batch]:
    """Yield validation batches: all rows in order, or the first `at_most` if that is not 0.

    Missing rows of the last batch are padding, with weight 0.
    """
    n_rows = min(len(rows), at_most) if at_most else len(rows)
    for first in range(0, n_rows, batch_size):
        found = [rows.read(number) for number in range(first, min(first + batch_size, n_rows))]
        nothing = jax.tree.map(np.zeros_like, found[0])
        if nothing.lengths is not None:
            nothing = dataclasses.replace(nothing, lengths=np.array(1, np.int32))
        yield _stacked(found + [nothing] * (batch_size - len(found)))


def _stacked(rows: Sequence[Batch]) -> Batch:
    return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    return np.pad(array, (0, size - len(array)))
