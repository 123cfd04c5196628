"""Prepares text in several processes, and resumes after a kill of some or all of them.

The files are divided into units of 8 to 256 MiB, at offsets that depend only on their sizes. Each process encodes some
units that follow one another. It writes a file for each unit, in one step, to a folder beside the result, NAME.parts.
When all units are there, process 0 puts them together, and removes the folder. What is there already is not encoded
again, whatever the number of processes was.

A process reads its own units, and of a text a block before them. Only .txt, .md, .jsonl, .csv, .tsv and .bin files in
UTF-8 are divided. Every other file is in one unit, as a whole. A .csv file is read from its beginning, since a
line break may be inside a field. A core of an AMD EPYC reads 146 MB of .csv a second, and encodes 11 MB. So with one
large .csv file, more than about 13 workers in total save little time: divide it into several files.

The folder records the vocabulary, the fields, and the name, size and time of modification of each source. The content
of the sources is not compared, because they may be larger than what can be read twice.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Container, Generator, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gpt2_jax import files, progress
from gpt2_jax.data import reading
from gpt2_jax.data.encoding import Encoded, encode_groups, groups_of
from gpt2_jax.data.reading import END
from gpt2_jax.data.sources import Piece, Range, Sources, Tally
from gpt2_jax.processes import Share
from gpt2_jax.tokenizer import Tokenizer, fingerprint

VERSION = 2
UNITS = 4096  # with more text, units are larger
BLOCKS = 8, 256  # of the smallest and the largest unit
WAIT = 0.5  # seconds between two looks at the files of the others
HEADER = "parts.json"
DIFFERENCES = {
    "sources": "source files with other names, sizes or times",
    "fields": "other fields",
    "settings": "other settings",
    "tokenizer": "another vocabulary",
    "division": "another version of this program",
}


def folder_of(target: Path) -> Path:
    """Return the folder of the parts of a result."""
    target = target.resolve()
    return target.with_name(f"{target.name}.parts")


def prepare_share(
    target: Path,
    found: Sources,
    tokenizer: Tokenizer,
    share: Share,
    n_workers: int,
    shown: bool | None,
    write: Callable[[Generator[Encoded, None, None]], None],
) -> None:
    """Encode this process's share of the text, and wait until process 0 has written the result.

    Args:
      target: the folder of the result.
      found: the text.
      tokenizer: encodes the text.
      share: this process's share.
      n_workers: number of processes on this machine that encode.
      shown: whether process 0 shows a progress bar of the whole.
      write: writes the result from all ids, in order. Process 0 calls it.

    Raises:
      ValueError: the parts of other work are there, the processes do not have the same text and settings, or a source
        cannot be divided or is malformed.
      PeerError: another process failed.
    """
    if None in found.files:
        raise ValueError(
            "only one process has standard input: name files, which all processes can read"
            if share.count > 1
            else f"{folder_of(target)} has parts of other text: delete it to start again"
        )
    work = _Parts(target, found, tokenizer)
    for header in share.gather(lambda: work.header):
        if other := _difference(header, work.header):
            raise ValueError(f"a process has {other}: all processes need the same files and the same command")
    done = share.gather(lambda: work.begin() if share.index == 0 else [])[0]
    left = sorted(set(range(len(work.sizes))) - set(done))
    mine = left[len(left) * share.index // share.count : len(left) * (share.index + 1) // share.count]
    with progress.bars("bytes", "left", shown=shown if share.index == 0 else False) as bars:

        def update() -> None:
            if bars.shown:
                bars.update("encoding", sum(work.sizes[unit] for unit in work.done()), found.n_bytes)

        update()
        for _ in work.encode(mine, n_workers, share.check):
            update()
        while share.index == 0 and len(work.done()) < len(work.sizes):
            share.check()
            time.sleep(WAIT)
            update()
    if share.index == 0:
        write(work.encoded())
        work.remove()
    share.gather(lambda: None)


def divided(sizes: Sequence[int], whole: Container[int] = ()) -> list[Range]:
    """Divide files of these sizes into ranges, in units of about the same number of bytes.

    Args:
      sizes: bytes of each file.
      whole: the numbers of files that cannot be divided.
    """
    block = reading.BLOCK
    most = block * min(max(math.ceil(sum(sizes) / (UNITS * block)), BLOCKS[0]), BLOCKS[1])
    ranges, unit, room = [], 0, most
    for file, size in enumerate(sizes):
        start = 0
        if room < 0 or (file in whole and room < min(size, most)):  # room < 0: after a file larger than a unit
            unit, room = unit + 1, most
        while start < END:
            stop = END if file in whole or size - start <= room else start + room // block * block
            if start < stop:
                ranges.append(Range(file, start, stop, unit))
            room -= size - start
            if stop < END:
                unit, room = unit + 1, most
            start = stop
    return ranges


def _difference(one: dict, other: dict) -> str:
    """Return how the work of a header differs from that of another one, in words; "" if it does not."""
    return " and ".join(what for name, what in DIFFERENCES.items() if one.get(name) != other[name])


class _Parts:
    """The parts of a result.

    Attributes:
      folder: a file for each finished unit.
      header: identifies the text and the settings.
      sizes: bytes of text of each unit.
    """

    def __init__(self, target: Path, found: Sources, tokenizer: Tokenizer):
        self.folder, self.found, self.tokenizer = folder_of(target), found, tokenizer
        stats = [stat for stat in found.stats if stat]
        lengths = [stat.st_size for stat in stats]
        self.ranges = divided(lengths, [number for number in range(len(lengths)) if found.is_whole(number)])
        self.sizes = [0] * (self.ranges[-1].unit + 1)
        for it in self.ranges:
            self.sizes[it.unit] += min(it.stop, lengths[it.file]) - it.start
        digest = hashlib.sha256()
        for path, stat in zip(found.files, stats, strict=True):
            digest.update(json.dumps([path and path.name, stat.st_size, stat.st_mtime_ns]).encode() + b"\n")
        self.header = {
            "sources": digest.hexdigest(),
            "fields": list(found.fields.names),
            "settings": [found.encoding, found.splits, found.skips],
            "tokenizer": fingerprint(tokenizer),
            "division": [VERSION, reading.BLOCK, UNITS, *BLOCKS],
        }

    def _path(self, unit: int) -> Path:
        return self.folder / f"{unit}.part"

    def begin(self) -> list[int]:
        """Create the folder if there is none. Return the units that are finished.

        Raises:
          ValueError: the folder belongs to other work; nothing was changed.
        """
        if not self.folder.exists():
            with files.replacing(self.folder) as new:
                (new / HEADER).write_text(json.dumps(self.header, indent=1) + "\n", encoding="utf-8")
        try:
            header = files.read_object(self.folder / HEADER)
        except OSError as error:
            raise ValueError(f"{self.folder} exists and is not unfinished work: move it away") from error
        if other := _difference(header, self.header):
            raise ValueError(
                f"{self.folder} was started with {other}: run with the same ones to resume, or delete it to start again"
            )
        return self.done()

    def done(self) -> list[int]:
        """Return the units that are finished."""
        names = (name.removesuffix(".part") for name in os.listdir(self.folder) if name.endswith(".part"))  # noqa: PTH208
        return [int(name) for name in names if name.isdecimal() and int(name) < len(self.sizes)]

    def encode(self, units: Sequence[int], n_workers: int, check: Callable[[], None]) -> Iterator[int]:
        """Encode units, and yield each after its file was written. `check` is called every few megabytes."""
        # For each group None, or at the end of a unit what was left out of it.
        ends: collections.deque[Tally | None] = collections.deque()
        encoded = encode_groups(self._groups(set(units), ends), self.tokenizer, n_workers)
        with contextlib.closing(encoded):
            for unit in units:
                new = self.folder / f".{uuid.uuid4().hex}"
                with files.replacing_file(self._path(unit), new), new.open("wb") as file:
                    for part in encoded:
                        check()
                        tally = ends.popleft()
                        self._write(file, part, tally or Tally())
                        if tally is not None:
                            break
                yield unit

    def _groups(self, units: set[int], ends: collections.deque[Tally | None]) -> Iterator[list[Piece]]:
        """Yield the groups of pieces of each unit, and an empty group at its end."""
        ranges = (it for it in self.ranges if it.unit in units)
        with contextlib.closing(self.found.read(ranges)) as opened:
            for _, some in itertools.groupby(opened, lambda pair: pair[0].unit):
                self.found.tally = Tally()
                for group in groups_of(itertools.chain.from_iterable(pieces for _, pieces in some)):
                    ends.append(None)
                    yield group
                ends.append(self.found.tally)
                yield []

    def _write(self, file: BinaryIO, part: Encoded, tally: Tally) -> None:
        counts = [part.counts] if self.found.fields.pairs else []
        numbers = np.array([part.n_characters, part.n_bytes, part.n_markers], np.int64)
        told = np.frombuffer(json.dumps(dataclasses.asdict(tally)).encode(), np.uint8)
        for values in (numbers, told, part.ids, part.ends, *counts):
            np.save(file, values)

    def encoded(self) -> Generator[Encoded, None, None]:
        """Yield the ids of all units, in order. The bytes and the tally are those of `Sources.pieces`.

        Raises:
          ValueError: a file is damaged.
        """
        self.found.n_read, self.found.tally = 0, Tally()
        for unit, size in enumerate(self.sizes):
            path = self._path(unit)
            end = path.stat().st_size
            with path.open("rb") as file:
                while file.tell() < end:
                    part, tally = self._read(file)
                    self.found.tally.add(tally)
                    yield part
            self.found.n_read += size

    def _read(self, file: BinaryIO) -> tuple[Encoded, Tally]:
        try:
            numbers, told, ids, ends = (np.load(file) for _ in range(4))
            counts = np.load(file) if self.found.fields.pairs else np.ones(len(ids), np.uint8)
            n_characters, n_bytes, n_markers = map(int, numbers)
            tally = Tally(**json.loads(told.tobytes()))
        except (ValueError, TypeError, EOFError) as error:
            raise ValueError(f"{file.name} is damaged: delete it, and run the same command again") from error
        return Encoded(ids, counts, ends, n_characters, n_bytes, n_markers), tally

    def remove(self) -> None:
        """Remove the folder. After a kill it is there in full, or under a hidden name."""
        hidden = files.beside(self.folder)
        self.folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
