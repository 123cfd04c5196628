"""Where files are kept, reading them, replacing them in one step, and locks.

Whatever takes a name in one step is on the disk before it does: every file of it is flushed (fsync), then it is
renamed, then the folder that holds the name is flushed. So a power cut, like a kill, leaves the old or the new, and
nothing that is removed afterwards is gone before the new is there. Files that grow (a download's part, JSON lines) are
not flushed as they grow: what reads them finds out how far they are good.
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

ABANDONED = 24 * 3600  # seconds after which nobody can still be writing under a temporary name
LISTED = 5  # names that a message lists
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # of file systems that know no locks


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
        put_in_place(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if temporary.exists():  # threads of a library that failed may still have been writing there
            time.sleep(0.5)
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def replacing_file(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Give the name of a file to write, which takes the name of `path` in one step at the end of the block.

    Args:
      path: a file that is there or not.
      temporary: the name to write under, in the same folder, where nobody else writes; None is a new one.
    """
    temporary = beside(path) if temporary is None else temporary
    try:
        yield temporary
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def put_in_place(new: Path, path: Path) -> None:
    """Let a file or folder that is whole take a name in one step, once it is on the disk.

    A file that had the name is gone then; a folder that had it has the name `new`.
    """
    flush(new)
    if new.is_dir() and path.exists():
        exchange(new, path)
    else:
        new.replace(path)
    _flush_one(path.parent)


def flush(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk."""
    if not path.is_dir():
        _flush_one(path)
        return
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in pool.map(_flush_one, [path, *path.rglob("*")]):
            pass


def _flush_one(path: Path) -> None:
    # Windows opens no folders, and some network file systems flush none.
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
    """Check that a folder may be written: it is absent or empty, or holds what may be replaced and nothing else.

    Args:
      folder: the one to write.
      what: a name for what it may hold, for the messages: "a saved model".
      others: returns those of the names in the folder that do not belong to such a thing.
      overwrite: whether such a thing may be replaced.

    Raises:
      FileExistsError: the name is a file's, or the folder holds something that may not be replaced.
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
        raise FileExistsError(f"{folder} holds other things than {what} ({listed}), which stay: choose another folder")


@contextlib.contextmanager
def lock(path: Path, busy: Exception | None = None, waiting: str = "") -> Iterator[None]:
    """Keep other processes out of a block with the same lock; the lock ends with the process, however it ends.

    On a file system that knows no locks nobody is kept out.

    Args:
      path: an empty file, which is made; it may stay behind.
      busy: is raised where another process holds the lock; None waits for it.
      waiting: a line for standard error before it waits.

    Raises:
      OSError: the file cannot be made.
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
      FileNotFoundError: the file is not there.
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
      FileNotFoundError: the file is not there.
      ValueError: it is not UTF-8 text, or not JSON.
    """
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


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
