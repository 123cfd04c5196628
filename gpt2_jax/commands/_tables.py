"""Tables on standard output: as wide as the terminal, and plain, with nothing cut or wrapped, where there is none."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

UNBOUNDED = 10_000  # the width where no terminal sets one


def console() -> Console:
    """Return standard output as rich sees it."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise  # the error that is being handled: what a reader who leaves means, `call` decides

    terminal = sys.stdout.isatty()
    width = None if terminal else UNBOUNDED
    return Output(force_terminal=terminal, width=width, markup=False, highlight=False, emoji=False)


def plain_table(*columns: str, gap: int = 1) -> Table:
    """Return a plain table, 1 + gap spaces between columns; > before a name aligns to the right. No cell is cut."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, gap), show_edge=False, pad_edge=False)
    for name in columns:
        right = name.startswith(">")
        table.add_column(name.removeprefix(">"), justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table
