"""Servers with a small release, which the downloader treats as OpenAI's."""

import fake_release
import misbehaving_server as server_that
import pytest

from gpt2_jax.release import download

RELEASE = fake_release.made_up()


@pytest.fixture
def small_release(monkeypatch):
    fake_release.use(monkeypatch, RELEASE)


@pytest.fixture
def unknown_sizes(monkeypatch):
    monkeypatch.setattr(download, "expectations", lambda size: fake_release.expectations(RELEASE, sizes=False))


@pytest.fixture
def server(small_release):
    with server_that.Server(fake_release.served(RELEASE)) as running:
        yield running


@pytest.fixture
def mirror(small_release):
    with server_that.Server(fake_release.served(RELEASE)) as running:
        yield running
