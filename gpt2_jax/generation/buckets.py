"""Sizes that programs are compiled for. Lengths and numbers of rows are rounded up to one of a few sizes."""

from __future__ import annotations

SMALLEST_LENGTH = 32


def bucket_length(n: int) -> int:
    """Round a number of tokens up: 32, 48, 64, 96, 128, 192, ..."""
    return max(SMALLEST_LENGTH, _round_up(n))


def bucket_rows(n: int) -> int:
    """Round a number of rows up: 1, 2, 4, 8, 12, 16, 24, 32, ..."""
    return _round_up(n) if n > 8 else 1 << (n - 1).bit_length()


def power_of_two(n: int) -> int:
    """Return the largest power of two that is at most n. n must be 1 or more."""
    return 1 << (n.bit_length() - 1)


def _round_up(n: int) -> int:
    """Return the smallest power of two, or three quarters of one, that is at least n."""
    power = 1 << max(n - 1, 1).bit_length()
    return power * 3 // 4 if n <= power * 3 // 4 else power
