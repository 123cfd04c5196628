"""What a manifest says about how text was read, in sentences for users."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpt2_jax.data.finding import counted


def notes_on(manifest: Mapping[str, Any], option: str) -> list[str]:
    """Return what a user should know about prepared text: what was left out, and what may be read otherwise than meant.

    Args:
      manifest: the content of tokens.json, also of an earlier version.
      option: what to do so that `<|endoftext|>` in a text ends a document.
    """
    notes = []
    if len(types := manifest.get("file_types", ())) > 1:  # such as README.md beside the files that were meant
        notes.append(f"files: {counted(types)}")
    if manifest.get("delimiters"):
        notes += [f"{_several(n, '.csv file')}: fields are divided by {name}" for name, n in _delimiters(manifest)]
    if left_out := manifest.get("left_out"):
        notes.append(f"left out: {counted(left_out)}")
    if n_empty := manifest.get("empty_documents"):
        notes.append(f"left out: {_several(n_empty, 'document')} without text")
    if n_skipped := manifest.get("skipped_rows"):
        notes.append(f"left out: {_several(n_skipped, 'bad record')}, the first is {manifest['first_skipped_row']}")
    if n_markers := manifest.get("end_of_text_as_text"):
        notes.append(
            f"note: the text has the characters <|endoftext|> {_several(n_markers, 'time')}; they stay ordinary text, "
            f"because a document ends with its file, line or row; if they separate documents, {option}"
        )
    return notes


def _delimiters(manifest: Mapping[str, Any]) -> list[tuple[str, int]]:
    return [("tabs" if it == "\t" else it, n) for it, n in sorted(manifest["delimiters"].items())]


def _several(count: int, name: str) -> str:
    return f"{count:,} {name}{'' if count == 1 else 's'}"
