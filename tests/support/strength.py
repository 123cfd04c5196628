"""How much a test tries: by default what protects a change within minutes, and with `pytest --full` all of it."""

from typing import TypeVar

import pytest

T = TypeVar("T")
FULL = False  # set by conftest.py before any test is imported


def campaign(quick: T, full: T) -> T:
    """Return the first by default, and the second with --full: how many kills, calls or examples, or which cases.

    The small campaign must fail, too, where what it is about is broken.
    """
    return full if FULL else quick


def full_only(what: str) -> pytest.MarkDecorator:
    """Return a mark for a test that only --full runs; `what` names the test that holds the property by default."""
    return pytest.mark.skipif(not FULL, reason=f"--full alone: by default {what}")
