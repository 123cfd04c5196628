"""Several transfers at once, and their progress bars."""

from __future__ import annotations

import collections
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from gpt2_jax.release.transfer import Report, Stopped

GRACE = 1.0  # seconds for threads that are writing when the others have stopped


def in_threads(tasks: Sequence[Callable[[], None]], jobs: int, stop: threading.Event) -> None:
    """Run the tasks, `jobs` at once; the first error stops them all and is raised, as Ctrl-C is."""
    waiting, errors = collections.deque(tasks), []

    def work() -> None:
        with contextlib.suppress(IndexError, Stopped):
            while not stop.is_set():
                task = waiting.popleft()
                try:
                    task()
                except Stopped:
                    raise
                except BaseException as error:
                    errors.append(error)
                    stop.set()

    # Daemons, as one that waits for a server must not keep the process alive; it writes nothing once `stop` is set.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(jobs, len(tasks)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not stop.is_set():
                thread.join(0.1)
    finally:
        stop.set()
        deadline = time.monotonic() + GRACE
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
    if errors:
        raise errors[0]


@contextlib.contextmanager
def bars(show: bool | None, title: str) -> Iterator[Report]:
    """Yield what a transfer reports to: a bar a file on standard error; None shows them where that is a terminal."""
    if show is None:
        show = sys.stderr is not None and sys.stderr.isatty()
    if not show:
        yield lambda name, here, total: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(10),  # with the longest name a line of 80 columns
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    tasks: dict[str, progress.TaskID] = {}
    with progress.Progress(*columns, console=Console(stderr=True)) as shown:
        shown.print(title)

        def report(name: str, here: int, total: int | None) -> None:
            if name not in tasks:  # what was there before is no part of the rate
                tasks[name] = shown.add_task(name, total=total, completed=here)
            shown.update(tasks[name], completed=here, total=total)

        yield report
