"""Argument checks. Each returns the value as a plain Python value, or raises a ValueError of one sentence."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from typing import Any


def whole_number(name: str, value: Any, low: float = 0, high: float = math.inf) -> int:
    """Return a whole number in [low, high] as an int. Python, NumPy and JAX integers are accepted; bools are not.

    Raises:
      ValueError: "NAME must be a whole number, LOW or more, not VALUE".
    """
    try:
        number = None if _is_bool(value) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        raise ValueError(f"{name} must be a whole number, {_range(low, high)}, not {value!r}")
    return number


def real_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Return a finite number in [low, high] as a float. `open_low` and `open_high` exclude that end.

    Raises:
      ValueError: "NAME must be a number, LOW or more, not VALUE".
    """
    try:
        number = math.nan if _is_bool(value) or isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    above = low < number if open_low else low <= number
    below = number < high if open_high else number <= high
    if not (math.isfinite(number) and above and below):
        words = _range(low, high, open_low, open_high)
        raise ValueError(f"{name} must be {f'a number, {words}' if words else 'a finite number'}, not {value!r}")
    return number


def choice(name: str, value: Any, choices: Collection[str]) -> str:
    """Return `value`, which must be one of the strings in `choices`.

    Raises:
      ValueError: "NAME must be one of A, B, not VALUE".
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    return value


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) == "bool"


def _range(low: float, high: float, open_low: bool = False, open_high: bool = False) -> str:
    """Return a range in words: "1 or more", "from 0 to 5", "above 0 and at most 1"."""
    if math.isfinite(low) and math.isfinite(high) and not open_low and not open_high:
        return f"from {low} to {high}"
    lower = "" if low == -math.inf else f"above {low}" if open_low else f"{low} or more"
    upper = "" if high == math.inf else f"below {high}" if open_high else f"at most {high}"
    return " and ".join(part for part in (lower, upper) if part)
