"""The released weights: `gpt2_jax.release` fetches the files, and TensorFlow checks every tensor in them."""

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
    """Fetch a released size and read every tensor. Damaged weights are fetched once more.

    Args:
      size, directory, files, base_urls, how: as in `gpt2_jax.release.download.fetch`.

    Raises:
      ValueError, OSError: as in `gpt2_jax.release.download.fetch_verified`. ValueError also if TensorFlow cannot read
        the folder because of its name.
    """
    if (known := download.size_of(size)) is not None:  # the path is checked before the download
        tensorflow.check_path(download.directory_of(known, directory))
    return download.fetch_verified(size, verify, directory, files, base_urls, **how)


def verify(directory: str | os.PathLike) -> None:
    """Read every tensor of a directory's checkpoint. TensorFlow checks the index and the checksum of each tensor.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, or the tensors do not match hparams.json.
    """
    _, leaves = tensorflow.read(expanded(directory))
    for _ in leaves:
        pass


def use_release(size: str, directory: Path | None, use: Callable[[Path], T]) -> T:
    """Fetch the missing files of a released size and call `use`. If the weights are damaged, fetch them once more."""
    directory = download.fetch(size, directory)
    try:
        return use(directory)
    except DamagedError:
        return use(fetch_verified(size, directory))
