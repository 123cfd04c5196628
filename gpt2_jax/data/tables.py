"""The records of .csv, .jsonl and .json files, each with the place where it stands."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def records(path: Path, encoding: str = "utf-8", skip_bad: bool = False) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each record of a file as a dict, and its place, "FILE, line N", for messages."""
    del skip_bad
    kind = path.suffix.lower()
    with path.open(encoding=encoding, newline="") as file:
        if kind == ".json":
            for number, record in enumerate(json.load(file), start=1):
                yield record, f"{path}, record {number}"
        elif kind == ".jsonl":
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield json.loads(line), f"{path}, line {number}"
        else:
            reader = csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",")
            for record in reader:
                yield record, f"{path}, line {reader.line_num}"
