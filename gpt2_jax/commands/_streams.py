"""Standard input, output and error that are closed, or that nobody reads any more."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator


class _Messages(io.RawIOBase):
    """Standard error. A message that it does not accept is dropped: it must not end the work."""

    def __init__(self, number: int = 2):
        self._number = number

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def write(self, data) -> int:
        with contextlib.suppress(OSError):
            return os.write(self._number, data)
        return len(data)


def prepare() -> None:
    """Prepare the streams of this process, before any file is opened.

    A closed one (`2>&-`) gets /dev/null in its place. Otherwise the next file that is opened takes its number, and
    messages of C++ code go into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if isinstance(sys.stderr, io.TextIOWrapper) and os.name == "posix":  # a console of Windows takes no bytes
        sys.stderr.flush()
        sys.stderr = _messages(2, sys.stderr.encoding)


def _messages(number: int, encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(_Messages(number)), encoding, "backslashreplace", line_buffering=True)


def divert(file: int) -> None:
    """Let what C++ code writes to standard output and error go into an open file. What Python writes does not."""
    out, err = os.dup(1), os.dup(2)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        if stream is not None:
            stream.flush()
        os.dup2(file, number)
    if isinstance(sys.stdout, io.TextIOWrapper):
        how = {"line_buffering": sys.stdout.line_buffering or sys.stdout.write_through, "newline": "\n"}
        raw = io.BufferedWriter(io.FileIO(out, "w"))
        sys.stdout = sys.__stdout__ = io.TextIOWrapper(raw, sys.stdout.encoding, sys.stdout.errors, **how)
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = sys.__stderr__ = _messages(err, sys.stderr.encoding)


@contextlib.contextmanager
def present() -> Iterator[None]:
    """Discard what is written to a standard output or error that is closed, while the block runs.

    Without this, `print(..., file=sys.stderr)` writes to standard output if standard error is closed.
    """
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nothing:  # noqa: PTH123
        sys.stdout, sys.stderr = (nothing if stream is None else stream for stream in before)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
