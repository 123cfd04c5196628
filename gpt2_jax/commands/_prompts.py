"""Where the prompts of `gpt2-generate` come from."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpt2_jax.files import expanded


def read(prompts: Sequence[str], files: Sequence[Path]) -> Iterator[str]:
    """Yield the prompts given, then the files' texts; without any, standard input if it is a pipe or a file, or "".

    Raises:
      ValueError, OSError: a file that is not UTF-8 text, or cannot be read.

    """
    yield from prompts
    for path in files:
        if str(path) == "-":
            yield _decode(sys.stdin.buffer.read(), "standard input")
        else:
            yield _decode(expanded(path).read_bytes(), str(path))
    if not prompts and not files:
        yield _decode(sys.stdin.buffer.read(), "standard input") if _stdin_has_text() else ""


def _decode(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}") from error
    return text.removesuffix("\n").removesuffix("\r")


def _stdin_has_text() -> bool:
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # there is no standard input
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
