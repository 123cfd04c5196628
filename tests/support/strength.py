"""How many cases a test runs: by default those that check a change within minutes, with `pytest --full` all."""

from typing import TypeVar

import pytest

T = TypeVar("T")
FULL = False  # set by conftest.py before any test is imported

# What --full runs with XLA's optimizations: folders, and files that compare with a slow reference or depend on XLA.
OPTIMIZED = {"core", "parity", "test_released_sizes"}
OPTIMIZED |= {"test_generate", "test_generation_batches", "test_non_finite", "test_scoring"}
OPTIMIZED |= {"test_research_edits", "test_research_edits_programs", "test_training_loss", "test_training_step"}


def campaign(quick: T, full: T) -> T:
    """Return the first by default, and the second with --full: the number of kills, calls or examples, or the cases.

    The small campaign must also fail if the tested property is broken.
    """
    return full if FULL else quick


def full_only(what: str) -> pytest.MarkDecorator:
    """Return a mark for a test that only --full runs. `what` names the test that checks the property by default."""
    return pytest.mark.skipif(not FULL, reason=f"--full alone: by default {what}")
