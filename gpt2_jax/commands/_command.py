"""What every command does: parse the arguments, run, and turn an error into one line and an exit status."""

from __future__ import annotations

import inspect
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

A = TypeVar("A")


def call(
    prog: str,
    args_type: type[A],
    run: Callable[[A], int | None],
    argv: Sequence[str] | None = None,
    *,
    start: Callable[[], A] | None = None,
    text: bool = False,
) -> None:
    """Parse a command's arguments and run it. If its exit status is not 0, the process ends with that status.

    ValueError and OSError give status 2, and their message goes to standard error as "PROG: MESSAGE". Ctrl-C gives 130.
    Otherwise the status is what `run` returns; None means 0.

    Args:
      prog: the command's name.
      args_type: the dataclass of its arguments; its docstring describes the command.
      run: does the work of the command.
      argv: the arguments; None means those of the process.
      start: returns the arguments that the options change; None means the defaults of `args_type`.
      text: True if standard output is text to read: a character that it cannot show becomes "?", and a closed pipe, as
        after `| head`, ends the command with status 0. False if it is file names, which are written unchanged.
    """
    args = None
    try:
        default: dict[str, Any] = {} if start is None else {"default": start()}
        args = tyro.cli(args_type, prog=prog, description=inspect.getdoc(args_type), args=argv, **default)
        if text and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        status = run(args)
        if sys.stdout is not None:  # None if it was closed: `gpt2-generate >&-`
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit:  # from the parser
        _drop_output()
        raise
    except (ValueError, OSError) as error:
        reader_left = isinstance(error, BrokenPipeError) and (text or args is None)  # --help is text, too
        status = 0 if reader_left else 2
        if status:
            report(prog, error)
        _drop_output()
    if status:
        sys.exit(status)


def report(prog: str, error: Exception) -> None:
    """Write an error to standard error, as one line."""
    print(f"{prog}: {error}", file=sys.stderr)


def _drop_output() -> None:
    """Discard output that standard output does not accept. The interpreter would fail on it again when it exits."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
