"""Packing: several texts in one window, with as little padding as possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Part(NamedTuple):
    """A part of an example, which stands in a window.

    Attributes:
      example: the number of the example.
      start: its first token in the example.
      n_tokens: how many of its tokens are read; the last one is only a target.
    """

    example: int
    start: int
    n_tokens: int


def parts_of(lengths: np.ndarray, size: int, split: bool) -> list[Part]:
    """Return the parts of all examples. A part has at most `size` inputs, and one more token for the last target.

    Args:
      lengths: int [n], tokens of each example. Examples with fewer than two tokens have nothing to predict.
      size: tokens of a window.
      split: divide longer examples into several parts, of which each begins with the last target of the one before.
        False keeps only their first part.
    """
    found = []
    for example, length in enumerate(lengths.tolist()):
        starts = range(0, length - 1, size) if split else range(0, min(length - 1, 1))
        found += [Part(example, start, min(size + 1, length - start)) for start in starts]
    return found


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the numbers of the items in each bin, by best-fit decreasing (Johnson 1974).

    The items are taken from the largest to the smallest. Each goes into the fullest bin that has room for it. Equal
    input gives equal bins. It takes about a second for a million items.

    Args:
      sizes: the size of each item, 1 to `capacity`.
      capacity: the size of a bin.
    """
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # the bins that have so much room
    occupied = 0  # bit r is set if by_room[r] is not empty
    for item in np.argsort(-np.asarray(sizes, np.int64), kind="stable").tolist():
        size = sizes[item]
        fitting = occupied >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                occupied ^= 1 << room
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(item)
        if room > size:
            by_room[room - size].append(number)
            occupied |= 1 << (room - size)
    return bins
