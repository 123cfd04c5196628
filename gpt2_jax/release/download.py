"""Fetch the files of a released GPT-2 size: those of its seven files that are missing or wrong.

Each file comes from the first mirror that has the right one. It is written as `NAME.part`, and renamed when it is
complete and its content is right. So a network failure or a kill never leaves a wrong file under the final name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gpt2_jax.checks import real_number, whole_number
from gpt2_jax.config import SIZES
from gpt2_jax.files import cache_dir, expanded, lock, put_in_place
from gpt2_jax.progress import bars
from gpt2_jax.release.known import DATA, FILES, INDEX, MIRRORS, Expected, base_addresses, expectations, size_of
from gpt2_jax.release.parallel import in_threads
from gpt2_jax.release.transfer import Failed, Refused, Report, disk_error, length, no_room, transfer

__all__ = ["FILES", "MIRRORS", "Expected", "expectations", "fetch", "fetch_verified", "size_of"]

LOCK = ".download.lock"
LONGEST = 10**6  # seconds: the highest timeout and backoff
BAR = 10  # columns of the terminal; a line with the longest name has 80
_WAY_OUT = "give another address with --base-url or GPT2_JAX_BASE_URL, or put the files there yourself"


def fetch(
    size: str,
    directory: str | os.PathLike | None = None,
    files: Sequence[str] = FILES,
    base_urls: Sequence[str] | None = None,
    *,
    progress: bool | None = None,
    timeout: float = 30.0,
    attempts: int = 5,
    backoff: float = 1.0,
    jobs: int = 4,
) -> Path:
    """Fetch the files of a size that are missing or wrong. If all files are right, the network is not used.

    A file is right if it has the exact size (where that is known) and the expected content: the SHA-256 of the two
    vocabulary files, the numbers in hparams.json, the line in `checkpoint`, the last bytes of the index. Tensors are
    not checked here; `fetch_verified` checks them. Only one process at a time fetches into a directory. A second
    process prints that it waits, and then finds the files there.

    Args:
      size: a released size under any of its names ("124M", "117M", "gpt2", …).
      directory: where the files go. None: `models/SIZE` in the cache folder.
      files: the files to fetch, from FILES.
      base_urls: addresses to try in turn, as `{base}/{size}/{file}`. None: $GPT2_JAX_BASE_URL (separated by commas),
        else MIRRORS.
      progress: show progress bars on standard error. None: only if it is a terminal.
      timeout: an attempt fails after this many seconds without an answer or without another byte.
      attempts: the number of consecutive attempts at one address that may bring no new bytes. After an attempt that
        brought new bytes, there is always another one.
      backoff: seconds to wait before the second attempt, doubled each time. If the server asks for a longer wait
        (Retry-After), that is used. No wait is longer than 60 seconds.
      jobs: the number of files to fetch at once.

    Raises:
      ValueError: an unknown size or file, an address that is not http(s), or a number out of range.
      ConnectionError: no address gave the complete file. The message says what happened at each address.
      OSError: an address answered with something other than the file, the disk is full (see `errno`), or a file cannot
        be written.
    """
    plan = _plan(size, directory, files, base_urls, timeout=timeout, attempts=attempts, backoff=backoff, jobs=jobs)
    if plan.missing():
        with _locked(plan.directory):
            _bring(plan, progress)
    return plan.directory


def fetch_verified(
    size: str,
    verify: Callable[[Path], None],
    directory: str | os.PathLike | None = None,
    files: Sequence[str] = FILES,
    base_urls: Sequence[str] | None = None,
    *,
    progress: bool | None = None,
    **patience: Any,
) -> Path:
    """Fetch as `fetch` does, then call `verify`. Damaged weights are fetched once more, from the next mirror first.

    Args:
      size, directory, files, base_urls, progress, patience: as in `fetch`.
      verify: reads the weights in a directory. It raises ValueError or FileNotFoundError if they are damaged.

    Raises:
      ValueError, ConnectionError, OSError: as in `fetch`. ValueError also if the weights are damaged a second time;
        they are then removed.
    """
    plan = _plan(size, directory, files, base_urls, **patience)
    fetch(size, plan.directory, files, plan.bases, progress=progress, **patience)
    with contextlib.suppress(ValueError, FileNotFoundError):
        verify(plan.directory)
        return plan.directory
    with _locked(plan.directory):
        _bring(plan, progress)  # another process may have repaired the files by now
        if _damage(plan.directory, verify):
            _remove_weights(plan)
            _bring(dataclasses.replace(plan, files=(INDEX, DATA), bases=plan.bases[1:] + plan.bases[:1]), progress)
            if damage := _damage(plan.directory, verify):
                _remove_weights(plan)
                raise ValueError(f"{damage}; fetched twice, from {', '.join(plan.bases)}, and removed: {_WAY_OUT}")
    return plan.directory


def directory_of(size: str, directory: str | os.PathLike | None = None) -> Path:
    """Return where the files of a size go: `directory`, or `models/SIZE` in the cache folder if it is None."""
    return cache_dir() / "models" / size if directory is None else expanded(directory)


def _damage(directory: Path, verify: Callable[[Path], None]) -> str | None:
    """Return the message of `verify` if the weights are damaged, else None."""
    try:
        verify(directory)
    except ValueError as error:
        return str(error)
    return None


def _remove_weights(plan: _Plan) -> None:
    for name in (INDEX, DATA):
        (plan.directory / name).unlink(missing_ok=True)
        plan.part(name).unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What to fetch, from where, to where, and how often to try."""

    size: str
    directory: Path
    files: tuple[str, ...]
    bases: tuple[str, ...]
    expected: dict[str, Expected]
    jobs: int
    patience: dict[str, Any]

    def missing(self) -> list[str]:
        """Return the files that are missing or wrong, the largest first, because it takes longest."""
        wrong = [name for name in self.files if self.expected[name].wrong(self.directory / name)]
        return sorted(wrong, key=lambda name: -(self.expected[name].size or 0))

    def part(self, name: str) -> Path:
        """Return the path of a file that is not complete yet."""
        return self.directory / f"{name}.part"


def _plan(
    size: str,
    directory: str | os.PathLike | None,
    files: Sequence[str],
    base_urls: Sequence[str] | None,
    *,
    timeout: float = 30.0,
    attempts: int = 5,
    backoff: float = 1.0,
    jobs: int = 4,
) -> _Plan:
    """Check every argument and return the plan."""
    if (known := size_of(size)) is None:
        raise ValueError(f"no released GPT-2 is called {size!r}: the sizes are {', '.join(SIZES)}")
    if unknown := [name for name in files if name not in FILES]:
        raise ValueError(f"{unknown[0]!r} is not a file of the release: the files are {', '.join(FILES)}")
    patience = {
        "timeout": real_number("timeout", timeout, 0, LONGEST, open_low=True),
        "attempts": whole_number("attempts", attempts, 1),
        "backoff": real_number("backoff", backoff, 0, LONGEST),
    }
    jobs = whole_number("jobs", jobs, 1)
    directory = directory_of(known, directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is not a directory: files cannot be put there")
    return _Plan(
        known, directory, tuple(dict.fromkeys(files)), base_addresses(base_urls), expectations(known), jobs, patience
    )


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Create the directory and lock it. If another process is fetching into it, print a message and wait."""
    waiting = f"gpt2-jax: another process is fetching into {directory}: waiting for it"
    with contextlib.ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(directory / LOCK, waiting=waiting))
        except OSError as error:
            raise disk_error(error, directory) from error
        yield


def _bring(plan: _Plan, progress: bool | None) -> None:
    """Fetch the missing files, several at once. The caller holds the lock."""
    missing = plan.missing()
    needed = sum(max((plan.expected[name].size or 0) - length(plan.part(name)), 0) for name in missing)
    if needed > (free := shutil.disk_usage(plan.directory).free):
        raise no_room(f"{plan.directory} has no room for GPT-2 {plan.size}: {needed:,} bytes are needed, {free:,} free")
    stop = threading.Event()
    with bars("bytes", "speed", "left", shown=progress, width=BAR, stay=True) as lines:
        lines.say(f"GPT-2 {plan.size}, into {plan.directory}")
        tasks = [functools.partial(_fetch_file, plan, name, stop, lines.update) for name in missing]
        in_threads(tasks, plan.jobs, stop)


def _fetch_file(plan: _Plan, name: str, stop: threading.Event, report: Report) -> None:
    """Fetch one file from the first address that has the right one."""
    failures: list[tuple[str, Exception]] = []
    for base in plan.bases:
        url = f"{base}/{plan.size}/{name}"
        try:
            return _fetch_from(url, plan, name, stop, report)
        except (Failed, Refused) as failure:
            failures.append((url, failure))
    kind = ConnectionError if all(isinstance(failure, Failed) for _, failure in failures) else OSError
    details = "; ".join(f"{url}: {failure}" for url, failure in failures)
    raise kind(f"cannot fetch {name} of GPT-2 {plan.size} ({details}): try again later, {_WAY_OUT} ({plan.directory})")


def _fetch_from(url: str, plan: _Plan, name: str, stop: threading.Event, report: Report) -> None:
    """Fetch one file from one address, check it, and rename it."""
    part, expected = plan.part(name), plan.expected[name]
    elsewhere = length(part) > 0  # then the old part may be what is wrong
    while True:
        transfer(url, part, expected.size, **plan.patience, stop=stop, report=report)
        if (wrong := expected.wrong(part)) is None:
            return _put_in_place(part, plan.directory / name)
        part.unlink()
        if not elsewhere:
            raise Refused(f"gave a wrong file: {wrong}")
        elsewhere = False


def _put_in_place(part: Path, path: Path) -> None:
    try:
        put_in_place(part, path)
    except OSError as error:
        raise disk_error(error, path) from error
