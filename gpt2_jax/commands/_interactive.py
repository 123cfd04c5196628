"""The interactive mode of `gpt2-generate`: prompts from the terminal, with a history."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
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


def converse(model: Model, seed: int, reply: Callable[[str, int], object], greeting: str = GREETING) -> None:
    """Read prompts and print a reply to each, until the input ends. Each prompt draws with the next seed.

    Args:
      model: the model.
      seed: the seed of the first prompt.
      reply: takes a prompt and its seed, and prints the reply.
      greeting: is printed first.
    """
    _ = model.weights  # before the first prompt
    with _history():
        print(greeting, file=sys.stderr)
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
                reply(text, seed)
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


def print_stream(model: Model, ids: Sequence[int], seed: int, before: str = "") -> str:
    """Print the completion of a prompt while it is generated, and return it. `before` is printed before it."""
    pieces, text = model.stream(ids, seed), []
    try:
        print(before, end="", flush=True)
        for piece in pieces:
            text.append(piece)
            print(piece, end="", flush=True)
            _interrupts.check()
    finally:
        pieces.close()
        print(flush=True)
    return "".join(text)


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
