"""Fixtures for files of weights."""

import checkpoint_forms as forms
import pytest


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """A cache folder for one test, so that no kept copy is there. TensorFlow is imported without its messages."""
    forms.import_tensorflow()
    monkeypatch.setenv("GPT2_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def flat():
    """The parameters of a small random model, by flat name."""
    return forms.random_model()
