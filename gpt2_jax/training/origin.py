"""What RUN/data was made from, and how: it is made once, and made again only while the run has not begun."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from gpt2_jax.checkpoints import runs
from gpt2_jax.data.finding import STDIN
from gpt2_jax.files import replacing_file
from gpt2_jax.training.opening import has_begun

ORIGIN = "origin.json"  # in RUN/data
T = TypeVar("T")


def origin_of(folder: Path) -> dict[str, Any] | None:
    """Return what is recorded about the text that a folder was made from; None if nothing is."""
    path = folder / ORIGIN
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def made_once(
    folder: Path,
    path: str,
    origin: Mapping[str, Any],
    earlier: Mapping[str, Any] | None,
    is_other: Callable[[str], bool],
    make: Callable[[], T],
    open_it: Callable[[], T],
) -> T:
    """Return what a folder of a run holds. Make it first, unless it was made from the same text in the same way.

    Args:
      folder: RUN/data.
      path: the text as the recipe names it, for messages.
      origin: what determines the content: the hash of the text ("text"; STDIN is standard input), and the settings.
      earlier: the origin of what the folder holds now; None if it is not known.
      is_other: says whether an earlier hash is that of another text.
      make: makes the content, and returns it.
      open_it: returns the content that the folder holds.

    Raises:
      ValueError: the run has begun with another text.
    """
    run_dir = folder.parent
    if folder.exists() and has_begun(run_dir):
        if earlier is not None and is_other(earlier["text"]):
            raise ValueError(f"{run_dir} has a run on a different text from {path}: choose another folder (--run)")
        return open_it()
    if folder.exists() and earlier == origin and origin["text"] != STDIN:
        return open_it()
    with runs.replacing_data(run_dir):
        (folder / ORIGIN).unlink(missing_ok=True)
        made = make()
        with replacing_file(folder / ORIGIN) as temporary:
            temporary.write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
    return made
