"""Windows of tokens in batches. A batch is a function of (seed, step): resuming needs no saved state."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct

from gpt2_jax.checks import whole_number
from gpt2_jax.data.token_files import Tokens

PREFETCHED = 8  # batches that are read ahead
THREADS = 2
ENDLESS = 2**50  # rows: more than any run reads, and exact as a float, which Grain uses for lengths
Row = tuple[np.ndarray, np.ndarray]  # ids int32 [T + 1], counts float32 [T + 1]


@struct.dataclass
class Batch:
    """Windows of text, all [rows, T]. `train_step` takes them with one more axis in front, the micro-batches of a step.

    Attributes:
      tokens: int32 ids that the model reads.
      targets: int32 ids to predict: the tokens shifted left by one. For classification [rows]: the labels' numbers.
      weights: float32, 1 if a target counts in the loss, 0 if it is padding or masked. For classification [rows].
      lengths: int32 [rows], for classification: the real tokens of each row; else None.
      segments: int32, if a row holds several texts: the text of each token, 1 or more, 0 for padding; else None.
    """

    tokens: np.ndarray | jax.Array
    targets: np.ndarray | jax.Array
    weights: np.ndarray | jax.Array
    lengths: np.ndarray | jax.Array | None = None
    segments: np.ndarray | jax.Array | None = None


def batches(
    tokens: Tokens,
    n_tokens: int,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Generator[Batch, None, None]:
    """Yield training batches without end, from step `first_step` on. A late first step takes no longer to reach.

    Row r of step s is window number `s * batch_size + r` of a sequence of epochs. An epoch has the smallest number of
    windows that cover the text. They begin at even distances, from an offset, and come in random order. Offset and
    order are drawn again for each epoch. So an epoch reads most tokens once. Where windows overlap, a token is read
    twice, or three times in a text of three windows. The offset leaves out some tokens at both ends. Over many epochs,
    windows begin at every token equally often.

    Args:
      tokens: the text. If it is shorter than a window, each row is the whole text, padded with id 0 of weight 0.
      n_tokens: T, the tokens of a window; one more token is read for the last target.
      batch_size: windows of a step, over all processes.
      seed: the seed of order and offsets, in `[0, 2**32)`.
      first_step: the number of the first step.
      process_index: the index of this process. It gets `batch_size // process_count` rows of each batch, in the order
        of the processes.
      process_count: the number of processes that share a batch.

    Returns:
      An iterator of Batch, [batch_size // process_count, T], on the host. Threads read ahead until it is closed.

    Raises:
      ValueError: the text has fewer than two tokens, or the numbers do not fit together.

    Warns:
      UserWarning: the text is shorter than a window.
    """
    _check_text(tokens, n_tokens, batch_size)
    seed = whole_number("seed", seed, 0, 2**32 - 1)
    first_step = whole_number("first_step", first_step)
    if not 0 <= process_index < process_count or batch_size % process_count:
        raise ValueError(
            f"a batch of {batch_size} rows cannot be shared by {process_count} processes, of which this is number "
            f"{process_index}: process_count must divide batch_size, and process_index must be in [0, process_count)"
        )
    if tokens.n_tokens <= n_tokens:
        warnings.warn(
            f"{tokens.path} has {tokens.n_tokens:,} tokens, fewer than the {n_tokens + 1:,} of a window and its last "
            "target: every row is the whole text, padded",
            UserWarning,
            stacklevel=2,
        )
    epochs = _Epochs(tokens.n_tokens, n_tokens, seed)

    def read(number: int) -> Row:
        return _row(tokens, epochs.start(number), n_tokens)

    return read_ahead(read, _batch, batch_size, first_step, process_index, process_count)


def read_ahead(
    read: Callable[[int], Any],
    join: Callable[[Sequence[Any]], Batch],
    batch_size: int,
    first_step: int,
    process_index: int,
    process_count: int,
) -> Generator[Batch, None, None]:
    """Yield the batches of an endless sequence of rows: `read` returns a row by its number, `join` makes a batch."""
    import grain

    # Grain's own shuffle takes milliseconds per index for short data, and seed 1 repeats the later epochs of seed 0.
    rows = grain.MapDataset.range(ENDLESS).map(read).batch(batch_size // process_count, batch_fn=join)
    steps = rows[process_index::process_count][first_step:]
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=PREFETCHED)
    with contextlib.closing(iter(steps.to_iter_dataset(options))) as iterator:
        yield from iterator


def windows_per_epoch(n_text: int, n_tokens: int) -> int:
    """Return how many windows of T = `n_tokens` tokens an epoch of a text of `n_text` tokens has, in `batches`."""
    return max(-(-(n_text - 1) // n_tokens), 1)


class Orders:
    """The order of the rows in each epoch, and some numbers more per epoch, drawn only from (seed, epoch)."""

    def __init__(self, n_rows: int, seed: int, n_more: int = 0):
        """Take the rows of an epoch, the seed, and how many numbers more an epoch draws."""
        self.n_rows, self.seed, self.n_more = n_rows, seed, n_more
        self._lock = threading.Lock()  # reading threads reach a new epoch at the same time
        self._drawn = functools.lru_cache(maxsize=2)(self._draw)

    def row(self, number: int) -> tuple[int, list[int]]:
        """Return the row that has a number in the sequence of epochs, and what its epoch has drawn more."""
        epoch, place = divmod(number, self.n_rows)
        with self._lock:
            more, order = self._drawn(epoch)
        return int(order[place]), more

    def _draw(self, epoch: int) -> tuple[list[int], np.ndarray]:
        # A bit generator gives the same raw numbers in all versions of NumPy; its distributions do not.
        raw = np.random.Philox(key=[self.seed, epoch]).random_raw(self.n_more + self.n_rows)
        return raw[: self.n_more].tolist(), np.argsort(raw[self.n_more :], kind="stable")


class _Epochs:
    """Where windows begin in each epoch: by an order and an offset per epoch."""

    def __init__(self, n_text: int, n_tokens: int, seed: int):
        self.n_starts = max(n_text - n_tokens, 1)
        self.n_windows = windows_per_epoch(n_text, n_tokens)
        self._orders = Orders(self.n_windows, seed, n_more=1)

    def start(self, number: int) -> int:
        """Return the index of the first token of window `number` in the sequence of epochs."""
        window, (drawn,) = self._orders.row(number)
        return (window * self.n_starts + drawn % self.n_starts) // self.n_windows


def windows(tokens: Tokens, n_tokens: int, batch_size: int, at_most: int = 0) -> Iterator[Batch]:
    """Yield validation batches: consecutive windows from the beginning of the text; window i begins at token `i * T`.

    Only full windows are used. If the text has none, it is one padded window. Missing rows of the last batch have
    weight 0.

    Args:
      tokens: the text.
      n_tokens: T, the tokens of a window; one more token is read for the last target. The next window begins with it.
      batch_size: rows of a batch.
      at_most: maximum number of windows; 0 is all.

    Returns:
      An iterator of Batch, [batch_size, T], on the host.

    Raises:
      ValueError: the text has fewer than two tokens, or a number is not valid.
    """
    _check_text(tokens, n_tokens, batch_size)
    at_most = whole_number("at_most", at_most)
    n_windows = max((tokens.n_tokens - 1) // n_tokens, 1)
    n_windows = min(n_windows, at_most) if at_most else n_windows
    return _consecutive(tokens, n_tokens, batch_size, n_windows)


def _consecutive(tokens: Tokens, n_tokens: int, batch_size: int, n_windows: int) -> Iterator[Batch]:
    nothing = np.zeros(n_tokens + 1, np.int32), np.zeros(n_tokens + 1, np.float32)
    for first in range(0, n_windows, batch_size):
        numbers = range(first, min(first + batch_size, n_windows))
        rows = [_row(tokens, number * n_tokens, n_tokens) for number in numbers]
        yield _batch(rows + [nothing] * (batch_size - len(rows)))


def _check_text(tokens: Tokens, n_tokens: int, batch_size: int) -> None:
    whole_number("n_tokens", n_tokens, 1)
    whole_number("batch_size", batch_size, 1)
    if tokens.n_tokens < 2:
        raise ValueError(f"{tokens.path} has {tokens.n_tokens} tokens: there is nothing to predict")


def _row(tokens: Tokens, start: int, n_tokens: int) -> Row:
    """Read the window that begins at a token, and pad it at the end of the text."""
    count = min(n_tokens + 1, tokens.n_tokens - start)
    ids, counts = tokens.read(start, count)
    if count == n_tokens + 1:
        return ids, counts
    missing = (0, n_tokens + 1 - count)
    return np.pad(ids, missing), np.pad(counts, missing)


def _batch(rows: Sequence[Row]) -> Batch:
    ids, counts = (np.stack(part) for part in zip(*rows, strict=True))
    return Batch(tokens=ids[:, :-1], targets=ids[:, 1:], weights=counts[:, 1:])
