"""The ordered table of the forms in which people have GPT-2, and the decorators that add a row to it."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from wild_model import Source

Kind = Literal["weights", "vocabulary", "both"]


@dataclasses.dataclass(frozen=True)
class Form:
    """One row.

    Attributes:
      name: the row's name in the docs and in the ids of the tests.
      writer: who writes such files, with a public thread or repository.
      kind: what the folder holds.
      make: a function that fills an empty folder and returns the model that was written, or None for a vocabulary.
      transformers: whether transformers 5 opens the folder.
      needs: libraries that `make` needs.
      path: what to load inside the folder.
      dtype: the dtype that `load` has to be asked for.
      refused: a regular expression that the message matches, if the folder is refused here.
      names: the refused thing, in the words of the docs.
    """

    name: str
    writer: str
    kind: Kind
    make: Callable[[Path], Source | None]
    transformers: bool
    needs: tuple[str, ...] = ()
    path: str = ""
    dtype: str | None = None
    refused: str | None = None
    names: str = ""

    def __str__(self):
        return self.name

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of the docs."""
        here = f"no: names {self.names}" if self.refused else "yes"
        here += f', `load("FOLDER/{self.path}")`' if self.path and not self.refused else ""
        here += f', `dtype="{self.dtype}"`' if self.dtype else ""
        equal = {"weights": "weights, logits", "vocabulary": "ids", "both": "weights, logits, ids"}[self.kind]
        there = "yes" if self.transformers else "no"
        return self.name, self.writer, here, there, "-" if self.refused else equal


FORMS: list[Form] = []


def form(kind: Kind, name: str, writer: str, *, transformers: bool, **options):
    """Return a decorator that registers a maker as a row of the table."""

    def register(make):
        assert name not in {row.name for row in FORMS}, name
        FORMS.append(Form(name, writer, kind, make, transformers, **options))
        return make

    return register


weights = functools.partial(form, "weights")
vocabulary = functools.partial(form, "vocabulary")
both = functools.partial(form, "both")
