"""A progress bar for reading a model that takes a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2_jax.config import GPT2Config

LARGE = 10**9  # bytes: below, a bar would be gone before it is read


def shown(leaves: Iterator[tuple[str, Any]], config: GPT2Config, directory: Path) -> Iterator[tuple[str, Any]]:
    """Yield the leaves, with a bar on standard error if that is a terminal and the model is large."""
    if config.param_bytes < LARGE or not sys.stderr.isatty():
        yield from leaves
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"reading {directory.name}", total=config.param_bytes)
        for name, array in leaves:
            bar.advance(task, array.nbytes)
            yield name, array
