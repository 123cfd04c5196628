"""The progress bar. It shows the progress of long tasks on standard error, if that is a terminal.

    with progress.bars("count", "left") as bars:  # the columns after the title and the bar
        for i, batch in enumerate(batches):
            bars.update("scoring", i, len(batches))  # a new title starts a new line
            bars.say("a line above the bars")

    for batch in progress.tracked("scoring")(batches):  # the same for the elements of a list
        ...

If nothing is shown, the methods of `bars` do nothing, and its `shown` is False. Nothing is written to standard output.
rich is imported only when a bar is shown.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar, cast

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

Unit = Literal["bytes", "count", "percent", "speed", "left", "text"]
T = TypeVar("T")

LARGE = 10**9  # bytes; reading fewer takes too little time for a bar
WIDTH = 40  # terminal columns of a bar
NARROWEST = 10  # terminal columns; a narrower bar is left out


class Bars:
    """Bars on standard error, one below another. With `progress=None` there are none."""

    def __init__(self, progress: Progress | None):
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    @property
    def shown(self) -> bool:
        """Whether bars are shown."""
        return self._progress is not None

    @property
    def width(self) -> int:
        """Terminal columns; 0 if nothing is shown."""
        return 0 if self._progress is None else self._progress.console.width

    def update(self, title: str, done: int, total: int | None = None, text: str = "") -> None:
        """Show the progress of a task. The first call for a title adds its bar, which starts at `done`.

        Args:
          title: title of the bar.
          done: how much is done, in the unit of the columns.
          total: how much there is to do; None means unknown, or unchanged.
          text: content of the column "text".
        """
        if self._progress is None:
            return
        if title not in self._tasks:  # earlier work does not count in the speed
            self._tasks[title] = self._progress.add_task(title, total=total, completed=done, text=text)
        self._progress.update(self._tasks[title], total=total, completed=done, text=text)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Unread:
    """A stream that discards what it does not accept, as after its terminal was closed: a bar must not end the work."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


@contextlib.contextmanager
def bars(
    *columns: Unit,
    shown: bool | None = None,
    titled: bool = True,
    width: int = WIDTH,
    room: int = 0,
    stay: bool = False,
    period: float = 30,
) -> Iterator[Bars]:
    """Show bars while the block runs.

    Args:
      columns: what follows the bar, in order: "bytes" (done and total), "count" (n/total), "percent", "speed" (bytes
        per second), "left" (remaining time), "text" (free text, cut at the end of the line).
      shown: True always shows the bars, False never; None shows them if standard error is a terminal.
      titled: write the title before each bar.
      width: terminal columns of a bar.
      room: terminal columns that the rest of the line needs. The bar gets narrower, and is left out below NARROWEST.
      stay: leave the bars on the screen at the end.
      period: seconds over which the speed is averaged, for "speed" and "left".
    """
    if shown is None:
        shown = sys.stderr is not None and sys.stderr.isatty()
    if not shown or sys.stderr is None:
        yield Bars(None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(file=cast("IO[str]", _Unread(sys.stderr)))
    width = min(width, console.width - room)
    parts: list[ProgressColumn] = [TextColumn("{task.description}", markup=False)] if titled else []
    parts += [BarColumn(bar_width=width)] if width >= NARROWEST else []
    parts += [_column(name) for name in columns]
    how = {"transient": not stay, "refresh_per_second": 4, "speed_estimate_period": period}
    with Progress(*parts, console=console, redirect_stdout=False, **how) as progress:
        yield Bars(progress)


def _column(name: Unit) -> ProgressColumn:
    from rich import progress
    from rich.table import Column

    if name == "text":
        one_line = Column(no_wrap=True, overflow="ellipsis")
        return progress.TextColumn("{task.fields[text]}", markup=False, table_column=one_line)
    columns = {
        "bytes": progress.DownloadColumn,
        "count": progress.MofNCompleteColumn,
        "percent": progress.TaskProgressColumn,
        "speed": progress.TransferSpeedColumn,
        "left": progress.TimeRemainingColumn,
    }
    return columns[name]()


def tracked(title: str, shown: bool | None = None) -> Callable[[Sequence[T]], Iterable[T]]:
    """Return a function that yields the elements of a list and shows how many are done. `shown` is as in `bars`."""

    def track(items: Sequence[T]) -> Iterator[T]:
        with bars("percent", "left", shown=shown) as lines:
            for done, item in enumerate(items):
                lines.update(title, done, len(items))
                yield item
            lines.update(title, len(items), len(items))

    return track


def reading(leaves: Iterable[tuple[str, Any]], title: str, n_bytes: int) -> Generator[tuple[str, Any], None, None]:
    """Yield the (name, array) pairs of a model as they are read. Show a bar if the model has LARGE bytes or more."""
    done = 0
    with bars("bytes", "left", shown=None if n_bytes >= LARGE else False) as lines:
        lines.update(title, done, n_bytes)
        for name, array in leaves:
            done += array.nbytes
            lines.update(title, done, n_bytes)
            yield name, array
            del array  # before the next one is read
