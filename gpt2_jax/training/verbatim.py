"""How much of a sample occurs verbatim in the training text: what an overfitted model has memorized."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from gpt2_jax.checks import whole_number

CHUNK = 2**22  # tokens of the text that are read at a time
BLOCK = 2**15  # tokens that are hashed at a time: they fit into the processor's cache
BASE = np.uint32(2654435761)  # odd, so every power of it is odd, and each token affects the hash modulo 2**32
TABLE_BITS = 20  # the table has 2**20 slots; it quickly excludes most runs of n tokens that are in no sample


class Tokens(Protocol):
    """A text as token ids, possibly larger than memory, as `token_files` opens it."""

    @property
    def n_tokens(self) -> int:
        """The number of tokens."""
        ...

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids from `start` on, int32 [count], and which of them count in the loss."""
        ...


@dataclasses.dataclass(frozen=True)
class Overlap:
    """How much of one sample occurs in the training text.

    Attributes:
      share: share of the sample's tokens that are in runs of at least `n` tokens which the text contains; 0 to 1.
      longest: number of tokens of the longest such run; 0 if there is none.
      text_position: index in the text of that run's first token, at its first occurrence; -1 if there is no run.
      n: the shortest run that counts, in tokens.
      n_sample: tokens of the sample.
      n_searched: tokens of the text that were searched, from its beginning.
      n_text: tokens of the text.
    """

    share: float
    longest: int
    text_position: int
    n: int
    n_sample: int
    n_searched: int
    n_text: int

    def __str__(self) -> str:
        where = "the training text"
        if self.n_searched < self.n_text:
            where = f"the first {self.n_searched:,} of the {self.n_text:,} tokens of the training text"
        said = f"{self.share:.0%} of the sample's {self.n_sample:,} tokens occur verbatim in {where}"
        if not self.longest:
            return f"{said}: no run of {self.n} or more"
        return f"{said}, in runs of {self.n} or more; the longest is {self.longest:,}, at token {self.text_position:,}"


def verbatim_share(sample: Sequence[int], tokens: Tokens, n: int = 8, at_most: int | None = None) -> Overlap:
    """Return the overlap of one sample; see `verbatim_shares`."""
    return verbatim_shares([sample], tokens, n, at_most)[0]


def verbatim_shares(
    samples: Sequence[Sequence[int]], tokens: Tokens, n: int = 8, at_most: int | None = None
) -> list[Overlap]:
    """Search a text once for all runs of at least n tokens that it shares with any of the samples.

    Every run of n tokens of the text is looked up by a hash. If a run of a sample has the same hash, the tokens are
    compared, so the result is exact. Memory does not grow with the length of the text.

    Args:
      samples: token ids of each sample. A sample with fewer than n tokens has a share of 0.
      tokens: the text.
      n: the shortest run that counts, 1 token or more. Any two texts have short runs in common.
      at_most: tokens of the text to search, from its beginning; None searches all. `n_searched` of the result says how
        many were searched.

    Returns:
      An Overlap for each sample.

    Raises:
      ValueError: n or at_most is not a positive whole number, or a sample is not a list of token ids.
    """
    n = whole_number("n", n, 1)
    at_most = at_most if at_most is None else whole_number("at_most", at_most, 1)
    rows = [_ids(sample) for sample in samples]
    n_searched = tokens.n_tokens if at_most is None else min(at_most, tokens.n_tokens)
    search = _Search(rows, n)
    # A run is at most as long as its sample. A window starts with so many tokens of the previous chunk that each run is
    # complete in one window.
    keep = max([n, *map(len, rows)]) - 1
    window = np.zeros(0, np.uint32)
    for start in range(0, n_searched if search.n_grams else 0, CHUNK):
        ids, _ = tokens.read(start, min(CHUNK, n_searched - start))
        before = window[max(len(window) - keep, 0) :]
        window = np.concatenate([before, np.asarray(ids).astype(np.uint32, copy=False)])
        search.add(window, start - len(before))
    return [search.overlap(i, n_searched, tokens.n_tokens) for i in range(len(rows))]


def _ids(sample: Sequence[int]) -> np.ndarray:
    """Return token ids as uint32, the dtype of the hash."""
    ids = np.asarray(sample)
    if ids.ndim != 1 or (ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 2**31)):
        raise ValueError(f"a sample must be a list of token ids, not {ids.dtype}{list(ids.shape)}")
    return ids.astype(np.uint32)


class _Search:
    """The runs of n tokens ("grams") of all samples, and which of them were found so far."""

    def __init__(self, samples: list[np.ndarray], n: int):
        self.samples, self.n = samples, n
        views = [np.lib.stride_tricks.sliding_window_view(ids, n) for ids in samples if len(ids) >= n]
        grams = np.unique(np.concatenate(views), axis=0) if views else np.zeros((0, n), np.uint32)
        hashes = _hashes(grams.reshape(-1), n)[::n]  # one for each row; those that span two rows are dropped
        order = np.argsort(hashes, kind="stable")
        self.grams, self.hashes, self.n_grams = grams[order], hashes[order], len(grams)
        self.table = np.zeros(2**TABLE_BITS, bool)
        self.table[_slots(self.hashes)] = True
        same = np.unique(self.hashes, return_counts=True)[1]
        self.most_alike = int(same.max(initial=0))  # largest number of grams with the same hash
        self.found = np.zeros(self.n_grams, bool)
        self.of_sample = [self._numbers(ids)[1] for ids in samples]  # the gram at each position of a sample
        self.longest = [0] * len(samples)
        self.text_position = [-1] * len(samples)

    def add(self, window: np.ndarray, position: int) -> None:
        """Search a part of the text; its first token has the index `position`."""
        places, numbers = self._numbers(window)
        self.found[numbers] = True
        for i, own in enumerate(self.of_sample):
            has = np.zeros(self.n_grams, bool)
            has[own] = True
            mine = has[numbers]
            if mine.any():
                self._lengthen(i, own, places[mine], numbers[mine], position)

    def _numbers(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions in `ids` where a gram of a sample begins, in order, and the number of that gram."""
        n = self.n
        places, numbers = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for first in range(0, len(ids) - n + 1, BLOCK):
            hashes = _hashes(ids[first : first + BLOCK + n - 1], n)
            (maybe,) = np.nonzero(self.table[_slots(hashes)])
            left = np.searchsorted(self.hashes, hashes[maybe])
            for i in range(self.most_alike):
                number = np.minimum(left + i, self.n_grams - 1)
                text = ids[first + maybe[:, None] + np.arange(n)]
                same = (self.grams[number] == text).all(axis=1) & (left + i == number)
                places.append(first + maybe[same])
                numbers.append(number[same])
        places, numbers = np.concatenate(places), np.concatenate(numbers)
        order = np.argsort(places, kind="stable")
        return places[order], numbers[order]

    def _lengthen(self, i: int, own: np.ndarray, places: np.ndarray, numbers: np.ndarray, position: int) -> None:
        """Look for a new longest run of sample i, among its grams found in the text."""
        ends = np.flatnonzero(np.diff(places) != 1) + 1  # a run can only continue over consecutive grams
        starts, ends = np.r_[0, ends], np.r_[ends, len(places)]
        # Most stretches are too short for a longer run, and no run is longer than the sample.
        most = np.minimum(ends - starts, len(own)) + self.n - 1
        for stretch in np.flatnonzero(most > self.longest[i]):
            if most[stretch] <= self.longest[i]:
                continue
            run = np.zeros(len(own) + 1, np.int64)  # consecutive grams that end at each position of the sample
            for k in range(starts[stretch], ends[stretch]):
                run[1:] = np.where(own == numbers[k], run[:-1] + 1, 0)
                longest = int(run.max()) + self.n - 1
                if longest > self.longest[i]:
                    self.longest[i] = longest
                    self.text_position[i] = position + int(places[k]) + self.n - longest

    def overlap(self, i: int, n_searched: int, n_text: int) -> Overlap:
        """Return the result for sample i."""
        ids, n = self.samples[i], self.n
        covered = np.zeros(len(ids) + 1, np.int64)
        (places,) = np.nonzero(self.found[self.of_sample[i]])
        np.add.at(covered, places, 1)
        np.add.at(covered, places + n, -1)
        share = float((np.cumsum(covered[:-1]) > 0).mean()) if len(ids) else 0.0
        return Overlap(share, self.longest[i], self.text_position[i], n, len(ids), n_searched, n_text)


def _hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """Return a uint32 hash of every n consecutive ids: the sum of `ids[i + j] * BASE**(n - 1 - j)` modulo `2**32`.

    Hashes of runs of 1, 2, 4, ... ids are computed first, each from two hashes of half the length.
    """
    if len(ids) < n:
        return np.zeros(0, np.uint32)
    whole, length = ids, 1  # hashes of runs of `length`, a power of two
    result, done, power = ids, 0, BASE
    rest = n
    while rest:
        if rest & 1:  # join the result so far and a run of `length`
            if not done:
                result = whole
            else:
                size = len(whole) - done
                result = result[:size] * power + whole[done:]
            done += length
        rest >>= 1
        if rest:
            whole = whole[:-length] * power + whole[length:]
            power, length = np.uint32(int(power) ** 2 % 2**32), 2 * length
    return result[: len(ids) - n + 1]


def _slots(hashes: np.ndarray) -> np.ndarray:
    """Return the slot of each hash in the table: the high bits of a product, which depend on all bits of the hash."""
    return (hashes * np.uint32(2246822519)) >> np.uint32(32 - TABLE_BITS)
