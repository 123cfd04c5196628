"""Writes the examples that a recipe names, for the objectives classification and instruction."""

from __future__ import annotations

import dataclasses
import functools
import operator
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2_jax import processes
from gpt2_jax.checkpoints import runs
from gpt2_jax.data.examples import Example, PreparedExamples, is_prepared_examples, open_examples, write_examples
from gpt2_jax.data.finding import STDIN
from gpt2_jax.data.labelled import labelled_examples
from gpt2_jax.data.tables import records
from gpt2_jax.data.templates import instruction_examples, template_of
from gpt2_jax.files import expanded, sha256_of
from gpt2_jax.recipe import Recipe
from gpt2_jax.tokenizer import Tokenizer, fingerprint
from gpt2_jax.training.origin import made_once, origin_of


def start_examples(recipe: Recipe, tokenizer: Tokenizer, folder: Path) -> PreparedExamples:
    """Return the examples that a recipe names; those of a file are first written into `folder`."""
    if is_prepared_examples(recipe.data.path):
        return open_examples(recipe.data.path, tokenizer)
    opened: list[PreparedExamples] = []
    processes.on_first(lambda: opened.append(_written_examples(recipe, tokenizer, folder)))
    return opened[0] if opened else open_examples(folder, tokenizer)


def _written_examples(recipe: Recipe, tokenizer: Tokenizer, folder: Path) -> PreparedExamples:
    """Write the examples of a recipe, unless the folder has them."""
    data, run_dir, path = recipe.data, folder.parent, expanded(recipe.data.path)
    runs.check_free(run_dir)
    if data.path == STDIN:
        raise ValueError(f"objective {recipe.objective} needs a file of records, not standard input")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}" if not path.exists() else f"{path} is a folder: name a file")
    settings: dict[str, Any] = {"val_fraction": data.val_fraction, "test_fraction": data.test_fraction}
    settings |= {"seed": recipe.seed, "undersample": recipe.classification.balance == "undersample"}
    reading = _settings(recipe) | {"encoding": data.encoding, "skip_bad_rows": data.skip_bad_rows}
    origin = {"text": sha256_of(path), "tokenizer": fingerprint(tokenizer)} | settings | reading

    def make() -> PreparedExamples:
        found = _examples(recipe, tokenizer, path)
        return write_examples(folder, found, tokenizer, overwrite=folder.exists(), more=reading, **settings)

    is_other = functools.partial(operator.ne, origin["text"])
    open_it = functools.partial(open_examples, folder, tokenizer)
    return made_once(folder, data.path, origin, origin_of(folder), is_other, make, open_it)


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that determine the examples of a file."""
    if recipe.objective == "classification":
        return {"field": recipe.data.field, "label_field": recipe.data.label_field}
    template = dataclasses.asdict(template_of(recipe.instruction))
    return {"template": template, "loss_on": recipe.instruction.loss_on}


def _examples(recipe: Recipe, tokenizer: Tokenizer, path: Path) -> Iterator[Example]:
    found = _records(recipe, path)
    if recipe.objective == "classification":
        return labelled_examples(found, tokenizer, recipe.data.field, recipe.data.label_field)
    return instruction_examples(found, tokenizer, template_of(recipe.instruction), recipe.instruction.loss_on)


def _records(recipe: Recipe, path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the records of a file, and warn at the end if some were left out."""
    skipped: list[str] = []
    yield from records(path, recipe.data.encoding, recipe.data.skip_bad_rows, skipped.append)
    if skipped:
        plural = "" if len(skipped) == 1 else "s"
        warnings.warn(f"left out: {len(skipped):,} bad record{plural}, the first is {skipped[0]}", stacklevel=2)
