"""What every command does: parse the arguments, run, and turn an error into one line and an exit status."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import tyro

from gpt2_jax.commands import _interrupts, _processes, _streams

A = TypeVar("A")
NAMES = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()  # these can write every file name


def call(
    prog: str,
    args_type: type[A],
    run: Callable[[A], int | None],
    argv: Sequence[str] | None = None,
    *,
    start: Callable[[], A] | None = None,
    text: bool = False,
    again: str = _processes.AGAIN,
) -> None:
    """Parse a command's arguments and run it. If its exit status is not 0, the process ends with that status.

    ValueError, OSError and too little memory give status 2. Their message goes to standard error as "PROG: MESSAGE".
    Ctrl-C gives 130, and SIGTERM 143. Otherwise the status is what `run` returns; None means 0. What is written to a
    closed standard output or error (`>&-`) is discarded. A UserWarning is one line, "PROG: warning: MESSAGE".

    If the arguments have a field `processes` that asks for several processes, `run` is called in a child that is
    connected to the others. Only the child of process 0 writes what `run` prints.

    Args:
      prog: the command's name.
      args_type: the dataclass of its arguments; its docstring describes the command.
      run: does the work of the command.
      argv: the arguments; None means those of the process.
      start: returns the arguments that the options change; None means the defaults of `args_type`.
      text: True if standard output is text to read: a character that it cannot show becomes "?", and a closed pipe, as
        after `| head`, ends the command with status 0. False if it is file names, which are written unchanged.
      again: what to do if another one of several processes has ended.
    """

    def run_here(args: A) -> int | None:
        return _run(prog, run, args, again)

    with _streams.present(), _warnings_in_a_line(prog):
        try:
            status = _status(prog, args_type, run_here, argv, start, text)
        except Exception:
            if not _processes.is_connected():
                raise
            traceback.print_exc()
            status = 1
        if _processes.is_connected():
            _processes.abandon(status or 0)
    if status:
        sys.exit(status)


@contextlib.contextmanager
def _warnings_in_a_line(prog: str) -> Iterator[None]:
    """Write warnings to users without the place in the code."""
    before = warnings.formatwarning

    def line(message: Any, category: type[Warning], *where: Any) -> str:
        return f"{prog}: warning: {message}\n" if category is UserWarning else before(message, category, *where)

    warnings.formatwarning = line
    try:
        yield
    finally:
        warnings.formatwarning = before


def _run(prog: str, run: Callable[[A], int | None], args: A, again: str) -> int | None:
    """Run the command: in this process, as the parent of a child, or as the child."""
    processes: _processes.Processes | None = getattr(args, "processes", None)
    if processes is None or not processes.several():
        return run(args)
    if _processes.is_child():
        return _processes.work(processes, lambda: run(args))
    _processes.check_restart()
    from gpt2_jax.commands import _supervisor

    return _supervisor.supervise(prog, processes, again)


def _status(
    prog: str,
    args_type: type[A],
    run: Callable[[A], int | None],
    argv: Sequence[str] | None,
    start: Callable[[], A] | None,
    text: bool,
) -> int | None:
    """Run the command, report its error, and return its exit status."""
    args = None
    try:
        default: dict[str, Any] = {} if start is None else {"default": start()}
        args = tyro.cli(args_type, prog=prog, description=inspect.getdoc(args_type), args=argv, **default)
        if isinstance(sys.stdout, io.TextIOWrapper):
            encoding, errors = (None, "replace") if text else NAMES
            sys.stdout.reconfigure(encoding=encoding, errors=errors)
        _interrupts.check()
        status = run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as stop:
        return 128 + getattr(stop, "signal", signal.SIGINT)
    except SystemExit:  # from the parser
        _drop_output()
        raise
    except Exception as error:
        _interrupts.check()  # an error after a signal is a consequence of it
        if _processes.peer_ended(error):
            return _processes.TEMPFAIL
        reader_left = isinstance(error, BrokenPipeError) and (text or args is None)  # --help is text, too
        message = "" if reader_left else _message(error)
        if message is None:
            raise
        if message:
            report(_processes.named(prog), message)
        _drop_output()
        return 0 if reader_left else _processes.TEMPFAIL if isinstance(error, _processes.Unconnected) else 2


def _message(error: Exception) -> str | None:
    """Return the sentence for a user's error, or None for an error in our code."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in text):
        if text.startswith("not enough memory"):  # from our library: it says what to do
            return text
        detail = f" ({text[:200]})" if text else ""
        return f"not enough memory: use a smaller model, smaller batches or shorter texts{detail}"
    return str(error) if isinstance(error, ValueError | OSError) else None


def check_text(option: str, texts: Sequence[str]) -> Sequence[str]:
    """Return the texts of an option. Python keeps bytes of the command line that are not UTF-8 as lone surrogates.

    Raises:
      ValueError: a text has such bytes.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            data = text.encode(errors="surrogateescape" if "\udc80" <= text[error.start] <= "\udcff" else "replace")
            raise ValueError(f"{option} is not UTF-8 text: {data!r:.80}") from error
    return texts


def report(prog: str, error: Exception | str) -> None:
    """Write an error to standard error, as one line."""
    print(f"{prog}: {error}", file=sys.stderr)


def print_result(text: object) -> None:
    """Print a result whose work is done. If nobody reads standard output any more, nothing is lost."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _drop_output()


def _drop_output() -> None:
    """Discard output that standard output does not accept. The interpreter would fail on it again when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
