"""Fixtures for several commands. `main` and `run` are of gpt2-generate; files of other commands have their own."""

import commands
import pytest

from gpt2_jax.commands import generate


@pytest.fixture(scope="module")
def main():
    """The entry point. Its changes of JAX's config are undone."""
    with commands.config_of_jax_kept():
        yield generate.main


@pytest.fixture
def run(main, capfd):
    """Call the entry point in this process. Its output, also that of C++ code, is captured at the file descriptors."""
    return commands.caller(main, capfd)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The cache folder, which does not exist yet. Nothing can be downloaded into it."""
    monkeypatch.setenv("GPT2_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GPT2_JAX_BASE_URL", "http://127.0.0.1:9/none")
    return tmp_path / "cache"
