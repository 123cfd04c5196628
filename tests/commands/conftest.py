"""Fixtures for several commands."""

import pytest


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The cache folder, which does not exist yet. Nothing can be downloaded into it."""
    monkeypatch.setenv("GPT2_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GPT2_JAX_BASE_URL", "http://127.0.0.1:9/none")
    return tmp_path / "cache"
