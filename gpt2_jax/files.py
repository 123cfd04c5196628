"""Where files are kept; how they are read and replaced in one step; locks.

A file or folder is on the disk before it takes its final name: all its files are flushed (fsync), then it is renamed,
then the folder that contains it is flushed. So a power cut or a kill leaves the old version or the new one, and the
old one is removed only when the new one is on the disk. Files that grow (a partial download, JSON lines) are not
flushed as they grow: their readers find out how much of them is valid.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ABANDONED = 24 * 3600  # seconds; no process writes under a temporary name for longer
LISTED = 5  # maximum number of names listed in a message
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # errors of file systems without locks


def cache_dir() -> Path:
    """Return the folder for downloads and copies: $GPT2_JAX_CACHE, else gpt2-jax in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("GPT2_JAX_CACHE"):
        return expanded(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "gpt2-jax"
    try:
        return Path.home() / ".cache" / "gpt2-jax"
    except RuntimeError as error:  # no HOME and an unknown user, as in some containers
        raise OSError("there is no home folder to keep files in: set GPT2_JAX_CACHE to a folder") from error


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
    """Yield a new folder to fill. At the end of the block it replaces `directory` in one step.

    After a kill at any moment, or an error, `directory` has its old contents or its complete new ones. After an error,
    folders above it that were made for it are removed too. If the system
    cannot exchange two names at once (Windows, some network file systems), there is a moment when the old contents are
    only under a hidden name in the same folder.

    Args:
      directory: the folder to write; it may exist.
      check: called just before an existing folder is replaced. If it raises, the folder is not replaced.
    """
    directory = directory.resolve()
    new = [parent for parent in directory.parents if not parent.exists()]
    temporary = beside(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()  # in the block, since Ctrl-C may come while the folder is made
        yield temporary
        if directory.exists():
            check()
        put_in_place(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if temporary.exists():  # threads of a failed library call may still write to it
            time.sleep(0.5)
            shutil.rmtree(temporary, ignore_errors=True)
        if not directory.exists():
            _remove_empty(new)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove these folders, the innermost first, up to the first that is not empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextlib.contextmanager
def replacing_file(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yield the name of a file to write. At the end of the block that file replaces `path` in one step.

    Args:
      path: the file to write; it may exist.
      temporary: the name to write under, in the same folder, which no other process uses; None makes a new one.
    """
    temporary = beside(path) if temporary is None else temporary
    try:
        yield temporary
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def put_in_place(new: Path, path: Path) -> None:
    """Flush a complete file or folder to the disk, and give it the name `path` in one step.

    An old file of that name is deleted. An old folder gets the name `new`.
    """
    flush(new)
    if new.is_dir() and path.exists():
        exchange(new, path)
    else:
        new.replace(path)
    _flush_one(path.parent)


def flush(path: Path) -> None:
    """Wait until a file, or a folder with all its contents, is on the disk."""
    if not path.is_dir():
        _flush_one(path)
        return
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in pool.map(_flush_one, [path, *path.rglob("*")]):
            pass


def _flush_one(path: Path) -> None:
    # Windows cannot open folders, and some network file systems cannot flush them.
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def beside(path: Path) -> Path:
    """Return a new hidden name in the same folder. Delete old ones there that killed processes left behind."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 32}"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > ABANDONED:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def exchange(new: Path, old: Path) -> None:
    """Exchange the names of two folders: in one system call if the system and the file system support it."""
    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if libc is not None and hasattr(libc, "renameat2"):  # Linux; AT_FDCWD is -100, RENAME_EXCHANGE 2
        done = libc.renameat2(-100, os.fsencode(new), -100, os.fsencode(old), 2) == 0
    elif libc is not None and sys.platform == "darwin":  # RENAME_SWAP is 2
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


def check_replaceable(
    folder: Path, what: str, others: Callable[[set[str]], Iterable[str]], overwrite: bool = True
) -> None:
    """Check that a folder may be written: it is absent, empty, or contains only what may be replaced.

    Args:
      folder: the folder to write.
      what: what the folder may contain, in words for the messages: "a saved model".
      others: takes the names in the folder, and returns those that do not belong to `what`.
      overwrite: whether `what` may be replaced.

    Raises:
      FileExistsError: the name belongs to a file, or the folder contains something that may not be replaced.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: choose another name")
    names = {path.name for path in folder.iterdir()}
    if names and not overwrite:
        raise FileExistsError(f"{folder} exists: choose another folder, or replace {what} in it with --overwrite")
    if names and (found := sorted(others(names))):
        listed = ", ".join(found[:LISTED]) + (f" and {len(found) - LISTED} more" if len(found) > LISTED else "")
        raise FileExistsError(f"{folder} contains files that are not part of {what} ({listed}): choose another folder")


@contextlib.contextmanager
def lock(path: Path, busy: Exception | None = None, waiting: str = "") -> Iterator[None]:
    """Keep other processes with the same lock out of a block. The lock ends with the process, however it ends.

    On a file system without locks, no process is kept out.

    Args:
      path: an empty file. It is created, and may remain afterwards.
      busy: the error to raise if another process holds the lock; None waits for that process.
      waiting: a line to print on standard error before waiting.

    Raises:
      OSError: the file cannot be created.
    """
    from filelock import FileLock, Timeout

    held = FileLock(path)
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        if busy is not None:
            raise busy from error
        if waiting and sys.stderr is not None:
            print(waiting, file=sys.stderr)
        held.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        held.release()


def read_text(path: Path) -> str:
    """Return the contents of a text file in UTF-8, without a byte order mark.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: it is not UTF-8 text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def read_json(path: Path) -> Any:
    """Return the contents of a JSON file.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: it is not UTF-8 text, or not JSON.
    """
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the contents of a JSON file that holds an object.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: it is not UTF-8 text, not JSON, or not an object.
    """
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, not {str(fields)[:40]!r}")
    return fields


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Return {name: sha256} of the files in a folder and its subfolders; names are relative to it ("d/0a1b").

    Args:
      folder: the folder.
      names: the files to hash; those that do not exist are skipped. None means all.
    """
    candidates = folder.rglob("*") if names is None else (folder / name for name in names)
    paths = [path for path in sorted(candidates) if path.is_file()]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # hashlib releases the GIL
        digests = pool.map(sha256_of, paths)
        return {path.relative_to(folder).as_posix(): found for path, found in zip(paths, digests, strict=True)}
