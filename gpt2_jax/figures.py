"""The `Figure` class of all pictures, the check of their file names, and writing a file in one step.

matplotlib is imported only when `Figure` is first used.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_jax.files import expanded, replacing_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")


def __getattr__(name: str) -> Any:
    """Create the class `Figure` when it is first used (PEP 562)."""
    if name != "Figure":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from matplotlib.figure import Figure as Base

    class Figure(Base):
        """A matplotlib Figure that a notebook shows as the value of a cell, without pyplot and `%matplotlib`."""

        __module__, __qualname__ = __name__, "Figure"  # pickle finds the class under these names

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png")
            return buffer.getvalue()

    return globals().setdefault("Figure", Figure)


def check_path(path: str | os.PathLike) -> Path:
    """Check the path of a picture to write, and return it.

    Raises:
      ValueError: the extension is not .png, .svg or .pdf, or the path is a folder.
      FileNotFoundError: the folder for the file does not exist.
    """
    path = expanded(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: a picture's name must end in {', '.join(FORMATS)}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the picture another name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such folder for the picture: {path.parent}")
    return path


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure into a file, in the format of its extension. The file replaces an old one in one step.

    Raises:
      ValueError, FileNotFoundError: as `check_path`.
    """
    path = check_path(path)
    with replacing_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=120)
