"""How much of a sample stands word for word in the training text: what a model that overfits has learnt by heart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from gpt2_jax.checks import whole_number

CHUNK = 2**22  # tokens of the text that are read at a time
BLOCK = 2**15  # tokens that are hashed at a time: few enough for the processor's cache
BASE = np.uint32(2654435761)  # odd, as is every power of it: no token is lost from the hash modulo 2**32
TABLE_BITS = 20  # of the table that says at once of nearly every run of n tokens that no sample has it


class Tokens(Protocol):
    """A text as token ids, longer than memory perhaps: what `token_files` opens."""

    @property
    def n_tokens(self) -> int:
        """How many there are."""
        ...

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids from `start` on, int32 [count], and which of them the loss counts."""
        ...


@dataclasses.dataclass(frozen=True)
class Overlap:
    """What of one sample stands in the training text.

    Attributes:
      share: of the sample's tokens, those in runs of at least `n` tokens that occur in the text; 0 to 1.
      longest: tokens of the longest such run; 0 where there is none.
      text_position: of the first token of that run in the text, where it occurs first; -1 where there is none.
      n: tokens from which on a run counts.
      n_sample: tokens of the sample.
      n_searched: tokens of the text that were searched, from its beginning on.
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
        said = f"{self.share:.0%} of the sample's {self.n_sample:,} tokens stand verbatim in {where}"
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

    Every run of n tokens of the text is looked up by a hash; where one of a sample has the same hash, the tokens
    themselves are compared. So the result is exact. Memory is that of a chunk of the text, and not of its length.

    Args:
      samples: token ids of each. One with fewer than n tokens has a share of 0.
      tokens: the text.
      n: tokens from which on a run counts, 1 or more: short runs are in any two texts.
      at_most: tokens of the text to search, from its beginning; None searches all. The result says how many it were.

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
    # A run is no longer than its sample: with so much of the chunk before, it lies whole in one of the two.
    keep = max([n, *map(len, rows)]) - 1
    window = np.zeros(0, np.uint32)
    for start in range(0, n_searched if search.n_grams else 0, CHUNK):
        ids, _ = tokens.read(start, min(CHUNK, n_searched - start))
        before = window[max(len(window) - keep, 0) :]
        window = np.concatenate([before, np.asarray(ids).astype(np.uint32, copy=False)])
        search.add(window, start - len(before))
    return [search.overlap(i, n_searched, tokens.n_tokens) for i in range(len(rows))]


def _ids(sample: Sequence[int]) -> np.ndarray:
    """Return token ids as uint32, in which the hash is computed."""
    ids = np.asarray(sample)
    if ids.ndim != 1 or (ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 2**31)):
        raise ValueError(f"a sample must be a list of token ids, not {ids.dtype}{list(ids.shape)}")
    return ids.astype(np.uint32)


class _Search:
    """The runs of n tokens ("grams") of all samples, and what of them was found so far."""

    def __init__(self, samples: list[np.ndarray], n: int):
        self.samples, self.n = samples, n
        views = [np.lib.stride_tricks.sliding_window_view(ids, n) for ids in samples if len(ids) >= n]
        grams = np.unique(np.concatenate(views), axis=0) if views else np.zeros((0, n), np.uint32)
        hashes = _hashes(grams.reshape(-1), n)[::n]  # of each row, not of what spans two rows
        order = np.argsort(hashes, kind="stable")
        self.grams, self.hashes, self.n_grams = grams[order], hashes[order], len(grams)
        self.table = np.zeros(2**TABLE_BITS, bool)
        self.table[_slots(self.hashes)] = True
        same = np.unique(self.hashes, return_counts=True)[1]
        self.most_alike = int(same.max(initial=0))  # grams of one hash
        self.found = np.zeros(self.n_grams, bool)
        self.of_sample = [self._numbers(ids)[1] for ids in samples]  # of each place of a sample, its gram
        self.longest = [0] * len(samples)
        self.text_position = [-1] * len(samples)

    def add(self, window: np.ndarray, position: int) -> None:
        """Search a part of the text, whose first token is number `position`."""
        places, numbers = self._numbers(window)
        self.found[numbers] = True
        for i, own in enumerate(self.of_sample):
            has = np.zeros(self.n_grams, bool)
            has[own] = True
            mine = has[numbers]
            if mine.any():
                self._lengthen(i, own, places[mine], numbers[mine], position)

    def _numbers(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the places in `ids` where a gram of a sample begins, in order, and which gram it is."""
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
        """Look for a run of sample i that is longer than the longest so far, among its grams found in the text."""
        ends = np.flatnonzero(np.diff(places) != 1) + 1  # where grams follow one another, a run can go on
        starts, ends = np.r_[0, ends], np.r_[ends, len(places)]
        # Most stretches are too short to hold a longer run, and none is longer than the sample.
        most = np.minimum(ends - starts, len(own)) + self.n - 1
        for stretch in np.flatnonzero(most > self.longest[i]):
            if most[stretch] <= self.longest[i]:
                continue
            run = np.zeros(len(own) + 1, np.int64)  # grams in a row that end at each place of the sample
            for k in range(starts[stretch], ends[stretch]):
                run[1:] = np.where(own == numbers[k], run[:-1] + 1, 0)
                longest = int(run.max()) + self.n - 1
                if longest > self.longest[i]:
                    self.longest[i] = longest
                    self.text_position[i] = position + int(places[k]) + self.n - longest

    def overlap(self, i: int, n_searched: int, n_text: int) -> Overlap:
        """Return what was found of sample i."""
        ids, n = self.samples[i], self.n
        covered = np.zeros(len(ids) + 1, np.int64)
        (places,) = np.nonzero(self.found[self.of_sample[i]])
        np.add.at(covered, places, 1)
        np.add.at(covered, places + n, -1)
        share = float((np.cumsum(covered[:-1]) > 0).mean()) if len(ids) else 0.0
        return Overlap(share, self.longest[i], self.text_position[i], n, len(ids), n_searched, n_text)


def _hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """Return a hash, uint32, of every n ids in a row: sum of ids[i + j] * BASE**(n - 1 - j) modulo 2**32.

    Computed of runs of 1, 2, 4 ... ids, each from two of half the length.
    """
    if len(ids) < n:
        return np.zeros(0, np.uint32)
    whole, length = ids, 1  # hashes of runs of `length`, a power of two
    result, done, power = ids, 0, BASE
    rest = n
    while rest:
        if rest & 1:  # put what is done so far before a run of `length`
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
    """Return the place of each hash in the table: the high bits of a product, which all bits of the hash decide."""
    return (hashes * np.uint32(2246822519)) >> np.uint32(32 - TABLE_BITS)
