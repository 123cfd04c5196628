"""Fixtures of the tests of training."""

import pytest
import tiny_runs


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Cache the programs of a module's runs."""
    with tiny_runs.compiled_once(tmp_path_factory.mktemp("compiled")):
        yield
