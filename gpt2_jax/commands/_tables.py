"""Tables on standard output: as wide as the terminal. Without a terminal they are plain; nothing is cut or wrapped."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

UNBOUNDED = 10_000  # the width without a terminal


def console() -> Console:
    """Return a rich console for standard output."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise  # the BrokenPipeError that is being handled: `call` decides the exit status

    terminal = sys.stdout.isatty()
    width = None if terminal else UNBOUNDED
    return Output(force_terminal=terminal, width=width, markup=False, highlight=False, emoji=False)


def plain_table(*columns: str, gap: int = 1) -> Table:
    """Return a plain table with 1 + gap spaces between columns. The prefix > aligns a column right. No cell is cut."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, gap), show_edge=False, pad_edge=False)
    for name in columns:
        right = name.startswith(">")
        table.add_column(name.removeprefix(">"), justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table


def binary_size(n_bytes: int) -> str:
    """Return a size in MiB or GiB, such as 474.7 MiB or 1.85 GiB."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"
