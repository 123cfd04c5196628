"""The released weights as they are used: `release` brings the files, TensorFlow checks every tensor of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gpt2_jax.checkpoints import tensorflow
from gpt2_jax.checkpoints.integrity import DamagedError
from gpt2_jax.files import expanded
from gpt2_jax.release import download

T = TypeVar("T")


def fetch_verified(
    size: str,
    directory: str | os.PathLike | None = None,
    files: Sequence[str] = download.FILES,
    base_urls: Sequence[str] | None = None,
    **how: Any,
) -> Path:
    """Fetch a released size and read every tensor of it; damaged weights are fetched once more.

    Args:
      size, directory, files, base_urls, how: as `gpt2_jax.release.download.fetch` takes them.

    Raises:
      as `gpt2_jax.release.download.fetch_verified`; ValueError also for a folder whose name TensorFlow cannot read.
    """
    if (known := download.size_of(size)) is not None:  # no damage, and better told before the download than after it
        tensorflow.check_path(download.directory_of(known, directory))
    return download.fetch_verified(size, verify, directory, files, base_urls, **how)


def verify(directory: str | os.PathLike) -> None:
    """Read every tensor of a directory's checkpoint: TensorFlow checks the index and the checksum of each.

    Raises:
      FileNotFoundError: a file is not there.
      ValueError: a file is damaged, or the tensors are not those that hparams.json describes.
    """
    _, leaves = tensorflow.read(expanded(directory))
    for _ in leaves:
        pass


def use_release(size: str, directory: Path | None, use: Callable[[Path], T]) -> T:
    """Fetch what is absent of a released size and use it; weights that turn out damaged are fetched once more."""
    directory = download.fetch(size, directory)
    try:
        return use(directory)
    except DamagedError:
        return use(fetch_verified(size, directory))
