"""`gpt2-generate` in front of a terminal: text as it comes, and a conversation."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gpt2_jax.commands import _command
from gpt2_jax.files import cache_dir

if TYPE_CHECKING:
    from gpt2_jax.commands._speaker import Model


def print_stream(model: Model, text: str, seed: int, echo: bool) -> None:
    """Print the completion of one text as it comes, after the text itself where `echo` is set."""
    pieces = model.stream(text, seed)
    try:
        print(text if echo else "", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        pieces.close()
        print(flush=True)


def converse(model: Model, seed: int, echo: bool) -> None:
    """Read prompts and speak until the end of the input; each text draws with the next seed."""
    _ = model.weights  # before the first prompt
    with _history():
        print("Type a prompt; Ctrl-C stops a sample, Ctrl-D ends.", file=sys.stderr)
        while True:
            try:
                text = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                print("\nCtrl-D ends.", file=sys.stderr)
                continue
            try:
                print_stream(model, text, seed, echo)
            except KeyboardInterrupt:
                print("[stopped]", file=sys.stderr)
            except ValueError as error:  # a prompt that does not fit, say
                _command.report("gpt2-generate", error)
            seed = (seed + 1) % 2**32


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Let the arrow keys bring back earlier prompts, those of earlier runs too."""
    try:
        import readline
    except ImportError:  # Windows has its own history
        yield
        return
    path = cache_dir() / "history"
    with contextlib.suppress(OSError):  # there is none yet
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(1000)
        with contextlib.suppress(OSError):  # a folder that cannot be written: no history next time, and nothing else
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
