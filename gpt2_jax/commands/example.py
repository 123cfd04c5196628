"""How the scripts in `examples/` run: as the commands do, with one line for an error."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from gpt2_jax.commands import _command


def run(main: Callable[..., None]) -> None:
    """Call an example's `main` with the arguments of the process. An error of the user gives one line and status 2."""
    _command.call(Path(inspect.getfile(main)).name, cast(Any, main), lambda _: None, text=True)
