"""Where the prompts of `gpt2-generate` come from: options, files and standard input."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpt2_jax.commands import _command
from gpt2_jax.files import expanded


def read_prompts(prompts: Sequence[str], files: Sequence[Path]) -> Iterator[str]:
    """Yield the prompts, then the files' texts. Without any: standard input if it has a text, else "".

    Raises:
      ValueError, OSError: a prompt or a file is not UTF-8 text, or a file cannot be read.
    """
    yield from _command.check_text("--prompt", prompts)
    for path in files:
        if descriptor_of(path) == 0:
            yield _decode(sys.stdin.buffer.read(), "standard input")
        else:
            yield _decode(expanded(path).read_bytes(), str(path))
    if not prompts and not files:
        yield _decode(sys.stdin.buffer.read(), "standard input") if _stdin_has_text() else ""


def descriptor_of(path: str | os.PathLike) -> int | None:
    """Return the number of an open file that a path names: 0 for /dev/stdin and -, 1 for /dev/stdout; else None.

    Sockets, which Node gives its child processes, cannot be opened under these names.
    """
    name = str(path)
    if found := re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", name):
        return int(found[1])
    return {"-": 0, "/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}.get(name)


def _decode(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}") from error
    return text.removesuffix("\n").removesuffix("\r")


def _stdin_has_text() -> bool:
    """Return whether standard input is a pipe, a socket or a file. A terminal and /dev/null have no prompt."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # no standard input
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)
