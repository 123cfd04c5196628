"""Finds the files to read in folders, and says which files are left out."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from gpt2_jax.data.reading import FORMS, form_of
from gpt2_jax.data.token_files import MANIFEST
from gpt2_jax.files import expanded

STDIN = "-"
TYPES = f"{', '.join(FORMS)} (all but the last two also with .gz)"
COMPRESSED = (".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz", ".7z", ".lz4", ".rar")
BROKEN = "broken link"


def find(name: str, left_out: collections.Counter[str]) -> list[Path | None]:
    """Return the files of one source: the file itself, or those of a folder, sorted by their paths in it.

    Names that begin with a dot are not read. Links are followed, except to a folder that contains the link.

    Args:
      name: a file, a folder, or "-" for standard input, which is None in the result.
      left_out: counts the files of the folder that cannot be read, by the end of their names.

    Raises:
      FileNotFoundError: there is no such file, or the folder has nothing to read.
      ValueError: the file has an unknown type, or the folder contains prepared tokens.
      OSError: a folder cannot be listed.
    """
    if name == STDIN:
        return [None]
    path = expanded(name)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if not path.is_dir():
        if not form_of(path).name:
            raise ValueError(f"{path} {_unknown(path)}")
        return [path]
    names, others = {}, collections.Counter()
    for file in _files(path):
        if not file.exists():
            others[BROKEN] += 1
        elif form_of(file).name and file.is_file():
            names[file.relative_to(path).as_posix()] = file
        else:
            others[form_of(file).suffix] += 1
    if not names:
        there = f"; it has {counted(others)}" if others else ""
        raise FileNotFoundError(f"{path} has no file of type {TYPES}{there}")
    found = set(names.values())
    for file in names.values():
        if (file.parent / MANIFEST).is_file() or (file.name == "val.bin" and file.with_name("train.bin") in found):
            raise ValueError(f"{file.parent} contains tokens that are already split: train on this folder directly")
    left_out.update(others)
    return [names[name] for name in sorted(names)]


def _files(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """Yield all files in a folder, also those of linked folders."""
    stat = folder.stat()
    here = (*above, (stat.st_dev, stat.st_ino))
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield path
        elif ((inner := path.stat()).st_dev, inner.st_ino) not in here:  # else a link leads to a folder above it
            yield from _files(path, here)


def left_out(names: Iterable[str]) -> collections.Counter[str]:
    """Return how many files in the folders among these sources are not read, by the end of their names."""
    others: collections.Counter[str] = collections.Counter()
    for name in names:
        find(name, others)
    return others


def counted(files: Mapping[str, int]) -> str:
    """Return numbers of files by the ends of their names, in words: "3 .zst, 1 .pdf"."""
    ordered = sorted(files.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in ordered)


def _unknown(path: Path) -> str:
    """Return what is wrong with a file of an unknown type, and what to do."""
    form = form_of(path)
    if form.zipped or form.suffix in COMPRESSED:
        return f"is compressed: decompress it to a file of type {TYPES}"
    return f"is not a file of type {TYPES}: rename it, or pass its text on standard input (-)"
