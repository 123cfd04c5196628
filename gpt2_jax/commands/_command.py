"""What every command does around its own work: parse the arguments, run, turn an error into a line and a status."""

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
    """Parse a command's arguments and run it; the process ends where its exit status is not 0.

    The status is 2 for ValueError and OSError, whose sentence goes to standard error as "PROG: SENTENCE", 130 for
    Ctrl-C, and otherwise what `run` returns.

    Args:
      prog: the command's name.
      args_type: the dataclass of its arguments, whose docstring describes the command.
      run: the command.
      argv: the arguments; None is those of the process.
      start: gives the arguments that the options change; None is the defaults of `args_type`.
      text: standard output is for reading: a character that it cannot show becomes "?", and a reader who leaves, as
        `| head` does, ends the command with status 0. False is for the names of files, which are written as they are.
    """
    args = None
    try:
        default: dict[str, Any] = {} if start is None else {"default": start()}
        args = tyro.cli(args_type, prog=prog, description=inspect.getdoc(args_type), args=argv, **default)
        if text and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        status = run(args)
        if sys.stdout is not None:  # None where it was closed: `gpt2-generate >&-`
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit:  # the parser's
        _drop_output()
        raise
    except (ValueError, OSError) as error:
        reader_left = isinstance(error, BrokenPipeError) and (text or args is None)  # --help is for reading too
        status = 0 if reader_left else 2
        if status:
            report(prog, error)
        _drop_output()
    if status:
        sys.exit(status)


def report(prog: str, error: Exception) -> None:
    """Write an error to standard error, in one line."""
    print(f"{prog}: {error}", file=sys.stderr)


def _drop_output() -> None:
    """Let go of what standard output does not take, at which the interpreter would fail once more when it ends."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
