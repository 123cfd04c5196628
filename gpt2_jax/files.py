"""Where files are kept, and how a folder is replaced in one step."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import glob
import hashlib
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ABANDONED = 24 * 3600  # seconds after which nobody can still be writing under a temporary name


def cache_dir() -> Path:
    """Return the folder for downloads and copies: $GPT2_JAX_CACHE, else gpt2-jax in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("GPT2_JAX_CACHE"):
        return expanded(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "gpt2-jax"
    try:
        return Path.home() / ".cache" / "gpt2-jax"
    except RuntimeError as error:  # no HOME and no such user, as in some containers
        raise OSError("there is no home folder to keep files in: name a folder in GPT2_JAX_CACHE") from error


def expanded(path: str | os.PathLike) -> Path:
    """Return a path with `~` replaced by the home folder.

    Raises:
      ValueError: there is no such home folder.

    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from error


@contextlib.contextmanager
def replacing(directory: Path, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Give a new folder to fill, which takes the name and place of `directory` in one step at the end of the block.

    Killed at any moment, or on any error, `directory` is as it was or as it should become. Where the system cannot
    exchange two names at once (Windows, some network file systems) there is a moment when only a hidden name beside it
    holds what it was.

    Args:
      directory: a folder that is there or not.
      check: called just before an existing folder is replaced; what it raises stops that.

    """
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(directory)
    temporary.mkdir()
    try:
        yield temporary
        if directory.exists():
            check()
            exchange(temporary, directory)
        else:
            temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if temporary.exists():  # threads of a library that failed may still have been writing there
            time.sleep(0.5)
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Give the name of a file to write, which takes the name of `path` in one step at the end of the block."""
    temporary = beside(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def beside(path: Path) -> Path:
    """Return a new hidden name in the same folder, and clear those that killed processes left there long ago."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 32}"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > ABANDONED:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def exchange(new: Path, old: Path) -> None:
    """Let two folders exchange their names: in one system call where the system and the file system have it."""
    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if hasattr(libc, "renameat2"):  # Linux; AT_FDCWD is -100, RENAME_EXCHANGE 2
        done = libc.renameat2(-100, os.fsencode(new), -100, os.fsencode(old), 2) == 0
    elif sys.platform == "darwin":  # RENAME_SWAP is 2
        done = libc.renamex_np(os.fsencode(new), os.fsencode(old), 2) == 0
    else:
        done = False
    if not done:
        aside = beside(old)
        old.rename(aside)
        try:
            new.rename(old)
        except BaseException:
            aside.rename(old)
            raise
        aside.rename(new)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Return the sha256 of files in a folder and those below it by their names from there ("d/0a1b").

    Args:
      folder: which.
      names: of the files; those that are not there are left out. None is all.

    """
    candidates = folder.rglob("*") if names is None else (folder / name for name in names)
    paths = [path for path in sorted(candidates) if path.is_file()]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # hashlib lets other threads run
        digests = pool.map(sha256_of, paths)
        return {path.relative_to(folder).as_posix(): found for path, found in zip(paths, digests, strict=True)}
