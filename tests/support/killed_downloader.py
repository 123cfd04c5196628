"""Fetches a release from a server. test_download_killed.py kills it."""

import http.client  # noqa: F401  a download needs these; imported once, not in each fork
import ssl  # noqa: F401
import sys
import urllib.request  # noqa: F401

import fake_release
import filelock  # noqa: F401
import forks
import rich.progress  # noqa: F401

from gpt2_jax.release import download


def work(say, directory, url):
    say()
    fake_release.fetch(directory, url, files=download.FILES)


if __name__ == "__main__":
    expectations = fake_release.expectations(fake_release.made_up(int(sys.argv[1])))
    download.expectations = lambda size: expectations
    forks.serve(work)
