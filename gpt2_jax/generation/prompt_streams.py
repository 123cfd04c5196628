"""Completes prompts from a stream, or into one, such as a pipe: a batch at a time, as they come. Nothing is resumed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

from gpt2_jax.checks import whole_number
from gpt2_jax.generation.prompt_lines import Complete, Prompt, Reader, completed


def complete_stream(
    lines: Iterable[list[bytes]],
    output: BinaryIO,
    complete: Complete,
    reader: Reader,
    batch_size: int,
    fields: Sequence[str] = ("samples",),
) -> int:
    """Complete prompts in the order in which they come, and write a line for each as soon as its batch is done.

    Input and output lines are those of `complete_file`. Prompts before a bad line are completed before its error is
    raised.

    Args:
      lines: lists of lines. The lines of one list are there at the same time and are completed together.
      output: takes the output lines.
      complete: completes a batch.
      reader: reads the lines.
      batch_size: most prompts per call of `complete`, 1 or more.
      fields: the names of all fields that `complete` may return.

    Returns:
      The number of output lines.

    Raises:
      ValueError: as `Reader.read`, or batch_size is not a whole number, 1 or more.
    """
    batch_size, n_done = whole_number("batch_size", batch_size, 1), 0
    for some in lines:
        for batch in _batches(reader.read(some), batch_size):
            output.write(completed(batch, n_done, complete, fields))
            output.flush()
            n_done += len(batch)
    return n_done


def _batches(prompts: Iterator[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Yield the prompts in batches. If reading fails, yield those before the error first."""
    batch, error = [], None
    while error is None:
        try:
            batch.append(next(prompts))
        except (StopIteration, ValueError) as end:
            error = end
        if batch and (error is not None or len(batch) == size):
            yield batch
            batch = []
    if isinstance(error, ValueError):
        raise error


def lines_as_they_come(descriptor: int) -> Iterator[list[bytes]]:
    """Yield the lines of a pipe, a socket or a file in the lists in which they arrive. Wait only if there is none.

    Args:
      descriptor: its file descriptor.
    """
    rest: list[bytes] = []
    while data := os.read(descriptor, 2**16):
        *lines, last = data.split(b"\n")
        if lines:
            yield [b"".join([*rest, lines[0]]), *lines[1:]]
            rest = []
        rest.append(last)
    if any(rest):
        yield [b"".join(rest)]
