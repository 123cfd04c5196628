"""The interactive mode of `gpt2-generate`: prompts from the terminal, with a history."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gpt2_jax.commands import _command, _interrupts
from gpt2_jax.files import cache_dir

if TYPE_CHECKING:
    from gpt2_jax.commands._speaker import Model

QUOTES = '"""'
GREETING = (
    f"Type a prompt. A prompt of several lines begins and ends with {QUOTES}.\n"
    "Ctrl-C stops a sample, Ctrl-D ends the program."
)


def converse(model: Model, seed: int, echo: bool) -> None:
    """Read prompts and print a completion of each, until the input ends. Each prompt draws with the next seed."""
    _ = model.weights  # before the first prompt
    with _history():
        print(GREETING, file=sys.stderr)
        while True:
            try:
                text = read_prompt()
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt as stop:
                _go_on(stop, "\nCtrl-D ends the program.")
                continue
            try:
                print_stream(model, text, seed, echo)
            except KeyboardInterrupt as stop:
                _go_on(stop, "[stopped]")
            except ValueError as error:  # for example, a prompt that does not fit
                _command.report("gpt2-generate", error)
            seed = (seed + 1) % 2**32


def read_prompt() -> str:
    """Read a prompt: a line, or the lines between two `\"\"\"`. The end of the input ends a prompt too.

    Raises:
      EOFError: there is no prompt any more.
    """
    shown = sys.stdin.isatty()
    line = input("> " if shown else "")
    if not line.startswith(QUOTES):
        return line
    lines = [line.removeprefix(QUOTES)]
    with contextlib.suppress(EOFError):
        while not lines[-1].endswith(QUOTES):
            lines.append(input(". " if shown else ""))
    return "\n".join(lines).removesuffix(QUOTES)


def print_stream(model: Model, text: str, seed: int, echo: bool) -> None:
    """Print the completion of one text while it is generated. If `echo` is True, print the text itself first."""
    pieces = model.stream(text, seed)
    try:
        print(text if echo else "", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
            _interrupts.check()
    finally:
        pieces.close()
        print(flush=True)


def _go_on(stop: KeyboardInterrupt, message: str) -> None:
    """Continue after a Ctrl-C. Another signal ends the program."""
    if getattr(stop, "signal", signal.SIGINT) != signal.SIGINT:
        raise stop
    _interrupts.forget()
    print(message, file=sys.stderr)


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Let the arrow keys recall earlier prompts, also those of earlier runs."""
    try:
        import readline
    except ImportError:  # Windows has its own history
        yield
        return
    path = cache_dir() / "history"
    with contextlib.suppress(OSError):  # no history yet
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(1000)
        with contextlib.suppress(OSError):  # the folder cannot be written: the history is not saved
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
