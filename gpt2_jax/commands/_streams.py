"""Standard input, output and error that are closed, or that nobody reads any more."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator


class _Messages(io.RawIOBase):
    """Standard error. A message that it does not accept is dropped: it must not end the work."""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2

    def isatty(self) -> bool:
        return os.isatty(2)

    def write(self, data) -> int:
        with contextlib.suppress(OSError):
            return os.write(2, data)
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
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(_Messages()), sys.stderr.encoding, "backslashreplace", line_buffering=True
        )


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
