"""Reads the text that a recipe names: tokenized into RUN/data, or pairs that are already prepared."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Container
from pathlib import Path
from typing import Any

from gpt2_jax.checkpoints import runs
from gpt2_jax.data._prepare import prepare
from gpt2_jax.data.encoding import PREPARED
from gpt2_jax.data.example_batches import pairs_of
from gpt2_jax.data.fields import Fields
from gpt2_jax.data.finding import STDIN
from gpt2_jax.data.sources import Sources
from gpt2_jax.data.token_files import Prepared, open_prepared
from gpt2_jax.files import expanded, sha256_of
from gpt2_jax.recipe import Data, Recipe
from gpt2_jax.tokenizer import Tokenizer, end_of_text, fingerprint
from gpt2_jax.training.opening import has_begun
from gpt2_jax.training.origin import made_once, origin_of

READING = ("encoding", "end_of_text", "skip_bad_rows")  # fields of recipe.data that say how text is read
EARLIER = (".txt", ".jsonl", ".csv", ".bin")  # earlier versions read only these files in a folder


def whole_pairs(data: Any, run_dir: str | os.PathLike | None) -> Any:
    """Return pairs of prompt and completion as examples, which no window cuts. Other data is returned as it is.

    A run of an earlier version, which read pairs in windows, goes on with windows.
    """
    if not isinstance(data, Prepared) or data.manifest is None or data.train.mask_path is None:
        return data
    run_dir = None if run_dir is None else expanded(run_dir)
    if run_dir is not None and has_begun(run_dir) and not runs.read_run(run_dir).data.get("pairs"):
        return data
    return pairs_of(data)


def tokenized(recipe: Recipe, tokenizer: Tokenizer, folder: Path) -> Prepared:
    """Tokenize the text of a recipe, unless the folder has its tokens."""
    data, run_dir = recipe.data, folder.parent
    runs.check_free(run_dir)
    settings: dict[str, Any] = {"val_fraction": data.val_fraction, "split": data.split, "seed": recipe.seed}
    settings |= {name: getattr(data, name) for name in READING}
    origin = {"text": _digest(recipe, tokenizer), "tokenizer": fingerprint(tokenizer)} | settings
    found = origin_of(folder)
    defaults = {field.name: field.default for field in dataclasses.fields(Data) if field.name in READING}
    earlier = found and defaults | found  # earlier versions recorded fewer settings

    def is_other(text: str) -> bool:
        return STDIN != origin["text"] != text != _digest(recipe, tokenizer, EARLIER)

    def make() -> Prepared:
        return prepare([data.path], folder, tokenizer, field=data.field, overwrite=folder.exists(), **settings)

    return made_once(folder, data.path, origin, earlier, is_other, make, lambda: open_prepared(folder, tokenizer))


def _digest(recipe: Recipe, tokenizer: Tokenizer, suffixes: Container[str] = ()) -> str:
    """Return the sha256 of the text that a recipe names: its files in order, and the field that is read from them.

    Args:
      recipe: the recipe.
      tokenizer: the tokenizer for the text.
      suffixes: the ends of the names of the files that count; all if there are none.
    """
    if recipe.data.path == STDIN:
        return STDIN
    digest = hashlib.sha256()
    found = Sources([recipe.data.path], Fields(recipe.data.field), tokenizer.n_vocab, end_of_text(tokenizer, PREPARED))
    for file, form in zip(found.files, found.forms, strict=True):
        if file and (not suffixes or form.suffix in suffixes):  # None is standard input
            field = recipe.data.field if form.has_fields else ""
            digest.update(f"{form.suffix} {field} {sha256_of(file)}\n".encode())
    return digest.hexdigest()
