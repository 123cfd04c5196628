"""Fixtures of the comparisons with torch."""

import pytest

REASON = "needs the `parity` extra: pip install -e '.[parity]'"


@pytest.fixture(scope="module")
def torch():
    """Return torch, or skip: both packages come with the `parity` extra."""
    pytest.importorskip("transformers", reason=REASON)
    return pytest.importorskip("torch", reason=REASON)
