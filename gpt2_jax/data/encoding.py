"""Encodes pieces of text to token ids, in this process or in several; the ids and their order are the same."""

from __future__ import annotations

import collections
import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext
from typing import Any, NamedTuple

import numpy as np

from gpt2_jax.data.reading import BLOCK
from gpt2_jax.data.sources import Piece
from gpt2_jax.data.token_files import id_dtype
from gpt2_jax.tokenizer import END_OF_TEXT, Tokenizer, end_of_text

WORTHWHILE = 32 * BLOCK  # bytes of text; with less, starting other processes takes longer than it saves
MOST_WORKERS = 16  # one process reads for all of them
DIED = "died, perhaps because memory ran out: use fewer workers"
UNSTARTED = 'cannot be started: put the code of your program under `if __name__ == "__main__":`'
PREPARED = "text that is prepared for training"  # what needs an end-of-text token
Pipe = Any  # multiprocessing's Connection, on Windows its PipeConnection


class Encoded(NamedTuple):
    """The ids of some documents, each with its end-of-text id.

    Attributes:
      ids: the ids of all documents, one after another.
      counts: uint8 for each id, 1 if it is a target of the loss.
      ends: the positions in `ids` where documents end.
      n_characters: characters of the text.
      n_bytes: bytes of the text as UTF-8.
      n_markers: how often the characters `<|endoftext|>` occur in the text.
    """

    ids: np.ndarray
    counts: np.ndarray
    ends: np.ndarray
    n_characters: int
    n_bytes: int
    n_markers: int


def workers_for(n_bytes: int) -> int:
    """Return how many workers to use for n_bytes of text: one per core if that saves time, else one."""
    if n_bytes < WORTHWHILE:
        return 1
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(n_cores, MOST_WORKERS)


def check_is_started() -> None:
    """Check that this process may start others: not while it imports the program of the process that started it.

    Raises:
      OSError: it does. Then nothing should be written: the process that started it will end it at any moment.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing itself asks
        raise OSError(f"a process that encodes text {UNSTARTED}")


def encode_all(pieces: Iterable[Piece], tokenizer: Tokenizer, n_workers: int) -> Generator[Encoded, None, None]:
    """Yield the ids of all pieces, in order, some at a time. Memory does not grow with the number of pieces.

    Raises:
      OSError: another process died, or could not be started.
    """
    return encode_groups(groups_of(pieces), tokenizer, n_workers)


def encode_groups(
    groups: Iterable[list[Piece]], tokenizer: Tokenizer, n_workers: int
) -> Generator[Encoded, None, None]:
    """Yield the ids of each group, in order.

    Raises:
      OSError: another process died, or could not be started.
    """
    if n_workers == 1:
        for group in groups:
            yield encode_group(tokenizer, group)
        return
    # Spawn instead of fork: jax runs threads, and a forked process with threads may hang.
    context = multiprocessing.get_context("spawn")
    waiting = collections.deque()
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_worker(context, tokenizer)) for _ in range(n_workers)]
        for worker in workers:
            _receive(worker, UNSTARTED)
        for worker, group in zip(itertools.cycle(workers), groups):
            if len(waiting) == n_workers:  # this worker has worked the longest
                yield _receive(waiting.popleft())
            _send(worker, group)
            waiting.append(worker)
        while waiting:
            yield _receive(waiting.popleft())


@contextlib.contextmanager
def _worker(context: SpawnContext, tokenizer: Tokenizer) -> Iterator[Pipe]:
    """Start a process that encodes, and yield a pipe to it. Each process has its own pipe, which ends when it dies.

    The processes of a pool share one pipe. A pool waits forever if a process dies in the middle of an answer.
    """
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, tokenizer), daemon=True)
    try:
        with _without_ctrl_c():
            process.start()
        theirs.close()
        yield ours
    finally:
        ours.close()
        if process.pid is not None:
            process.terminate()
            process.join()


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Start processes that ignore Ctrl-C from their first moment on. Here, signals take effect after the block.

    A handler that raised in the block would leave a process that is half started, and reports it.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # it unblocks Ctrl-C when it starts
    with _handlers_later():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a new process has the same mask
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _handlers_later() -> Iterator[None]:
    """Call the handlers of Ctrl-C and SIGTERM after the block. A mask does not delay them: other threads get them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)  # the last one may repeat an earlier one
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in came[:1]:
        handlers[number](number, None)


def _work(pipe: Pipe, tokenizer: Tokenizer) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends this one
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        pipe.send(None)
        while True:
            pipe.send(encode_group(tokenizer, pipe.recv()))


def _send(worker: Pipe, group: list[Piece]) -> None:
    try:
        worker.send(group)
    except OSError as error:
        raise OSError(f"a process that encodes text {DIED}") from error


def _receive(worker: Pipe, trouble: str = DIED) -> Encoded:
    try:
        return worker.recv()
    except (EOFError, OSError) as error:
        raise OSError(f"a process that encodes text {trouble}") from error


def encode_group(tokenizer: Tokenizer, pieces: list[Piece]) -> Encoded:
    """Encode some pieces. The characters `<|endoftext|>` inside a text stay ordinary text.

    Raises:
      ValueError: a piece ends a document, and the vocabulary has no end-of-text token.
    """
    dtype = id_dtype(tokenizer.n_vocab)
    ids, counts, ends = [np.zeros(0, dtype)], [np.zeros(0, np.uint8)], []  # there may be no pieces
    n_ids = n_characters = n_bytes = n_markers = 0
    for piece in pieces:
        part = piece.text
        if isinstance(part, str):
            n_characters += len(part)
            n_bytes += len(part.encode(errors="surrogatepass"))
            n_markers += part.count(END_OF_TEXT)
            part = tokenizer.encode(part)
        ids.append(np.asarray(part, dtype))
        if piece.ends:
            ids.append(np.asarray([end_of_text(tokenizer, PREPARED)], dtype))
        counts.append(np.full(len(part) + piece.ends, piece.counts, np.uint8))
        n_ids += len(part) + piece.ends
        if piece.ends:
            ends.append(n_ids)
    joined = np.concatenate(ids), np.concatenate(counts)
    return Encoded(*joined, np.asarray(ends, np.int64), n_characters, n_bytes, n_markers)


def encode_documents(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield the ids of each document, without an end-of-text id after it. A document without ids is left out.

    The characters `<|endoftext|>` inside a text stay ordinary text.
    """
    dtype, parts = id_dtype(tokenizer.n_vocab), []
    for piece in pieces:
        ids = tokenizer.encode(piece.text) if isinstance(piece.text, str) else piece.text
        parts.append(np.asarray(ids, dtype))
        if piece.ends:
            document, parts = np.concatenate(parts), []
            if len(document):
                yield document


def groups_of(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Collect pieces into groups that are large enough to send to another process."""
    group, size = [], 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.text) + 64  # an empty piece has a size too
        if size >= BLOCK:
            yield group
            group, size = [], 0
    if group:
        yield group
