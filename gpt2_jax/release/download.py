"""The released GPT-2: fetch what is absent or wrong of a size's seven files, from the first mirror that has them right.

A file is written as `NAME.part` and renamed once it is whole and its content is right: under its own name it is right
or absent, whatever the network does and whenever the process is killed.
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
LONGEST = 10**6  # seconds to wait
BAR = 10  # columns of the terminal: with the longest name a line of 80
_WAY_OUT = "name another address with --base-url or GPT2_JAX_BASE_URL, or put the files there by hand"


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
    """Fetch those of a size's files that are absent or wrong; with all there and right, nothing touches the network.

    Right means: the exact size where it is known, the vocabulary by SHA-256, hparams.json by its numbers, the pointer
    by its line, the index by its last bytes. The tensors are what `verify` looks at. One process at a time fetches into
    a directory: a second one says that it waits, and then finds the files there.

    Args:
      size: a released size under any of its names ("124M", "117M", "gpt2", …).
      directory: where the files go; None: `models/SIZE` in the cache folder.
      files: which of FILES.
      base_urls: tried in turn, as `{base}/{size}/{file}`; None: $GPT2_JAX_BASE_URL (separated by commas), else MIRRORS.
      progress: bars on standard error; None: where that is a terminal.
      timeout: seconds without an answer, or without another byte of it, after which an attempt has failed.
      attempts: at one address, how many in a row may bring nothing new; one that does is always followed up.
      backoff: seconds before the second of them, doubled each time; a server's Retry-After counts where it is longer.
      jobs: how many files at once.

    Raises:
      ValueError: an unknown size or file, an address that is not http(s), or a number out of range.
      ConnectionError: no address could be read from to the end; the message says what happened at each.
      OSError: an address answered with something else than the file; or the disk is full (`errno` says so) or cannot
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
    """Fetch as `fetch` does, with its arguments, then `verify`; damaged weights are fetched once more.

    The second time, the next mirror is asked first.

    Args:
      size, directory, files, base_urls, progress, patience: as `fetch`.
      verify: reads the weights in a directory; raises ValueError or FileNotFoundError where they are damaged.

    Raises:
      ValueError, ConnectionError, OSError: as `fetch`; ValueError too when the weights came damaged again, and then
        they have been removed.
    """
    plan = _plan(size, directory, files, base_urls, **patience)
    fetch(size, plan.directory, files, plan.bases, progress=progress, **patience)
    with contextlib.suppress(ValueError, FileNotFoundError):
        verify(plan.directory)
        return plan.directory
    with _locked(plan.directory):
        _bring(plan, progress)  # another process may have been at it, and may have mended it by now
        if _damage(plan.directory, verify):
            _remove_weights(plan)
            _bring(dataclasses.replace(plan, files=(INDEX, DATA), bases=plan.bases[1:] + plan.bases[:1]), progress)
            if damage := _damage(plan.directory, verify):
                _remove_weights(plan)
                raise ValueError(f"{damage}; twice, from {', '.join(plan.bases)}: removed, {_WAY_OUT}")
    return plan.directory


def directory_of(size: str, directory: str | os.PathLike | None = None) -> Path:
    """Return where the files of a size go: into `directory`, or `models/SIZE` in the cache folder."""
    return cache_dir() / "models" / size if directory is None else expanded(directory)


def _damage(directory: Path, verify: Callable[[Path], None]) -> str | None:
    """Return what `verify` says is damaged, None when nothing is."""
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
    """What to fetch, from where, to where, and how patiently."""

    size: str
    directory: Path
    files: tuple[str, ...]
    bases: tuple[str, ...]
    expected: dict[str, Expected]
    jobs: int
    patience: dict[str, Any]

    def missing(self) -> list[str]:
        """Return the files that are absent or wrong, the largest first: it takes longest."""
        wrong = [name for name in self.files if self.expected[name].wrong(self.directory / name)]
        return sorted(wrong, key=lambda name: -(self.expected[name].size or 0))

    def part(self, name: str) -> Path:
        """Return where a file is while it is not whole."""
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
    """Check every argument."""
    if (known := size_of(size)) is None:
        raise ValueError(f"no released GPT-2 is called {size!r}: the sizes are {', '.join(SIZES)}")
    if unknown := [name for name in files if name not in FILES]:
        raise ValueError(f"{unknown[0]!r} is no file of the release: those are {', '.join(FILES)}")
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
    """Make the directory and keep other processes from fetching into it; wait, and say so, while one does."""
    waiting = f"gpt2-jax: another process is fetching into {directory}: waiting for it"
    with contextlib.ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(directory / LOCK, waiting=waiting))
        except OSError as error:
            raise disk_error(error, directory) from error
        yield


def _bring(plan: _Plan, progress: bool | None) -> None:
    """Fetch what is missing, several files at once. The caller holds the lock."""
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
    """Fetch one file from the first address that has it right."""
    failures: list[tuple[str, Exception]] = []
    for base in plan.bases:
        url = f"{base}/{plan.size}/{name}"
        try:
            return _fetch_from(url, plan, name, stop, report)
        except (Failed, Refused) as failure:
            failures.append((url, failure))
    kind = ConnectionError if all(isinstance(failure, Failed) for _, failure in failures) else OSError
    told = "; ".join(f"{url}: {failure}" for url, failure in failures)
    raise kind(f"cannot fetch {name} of GPT-2 {plan.size} ({told}): try again later, {_WAY_OUT} ({plan.directory})")


def _fetch_from(url: str, plan: _Plan, name: str, stop: threading.Event, report: Report) -> None:
    """Fetch one file from one address, look at what came, and give it its name."""
    part, expected = plan.part(name), plan.expected[name]
    elsewhere = length(part) > 0  # then what is wrong with the whole may be what was there before
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
