"""Validation on texts of one's own, in place of a part of the training text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from gpt2_jax.data.examples import PreparedExamples
from gpt2_jax.data.token_files import Prepared
from gpt2_jax.recipe import Recipe
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.training.plan import Plan
from gpt2_jax.training.start import check_data, start_data

Data = Prepared | PreparedExamples


def start_validation(recipe: Recipe, tokenizer: Tokenizer, run_dir: Path) -> dict[str, Data]:
    """Return the validation texts that a recipe names, by name, in their order. Errors of `start_data` are passed on.

    Text is first tokenized into `run_dir/data-NAME`; the next start reads it there.

    Raises:
      ValueError: the recipe trains a classifier, whose labels are those of the training data.
    """
    named = recipe.data.own_validation()
    if named and recipe.objective == "classification":
        raise ValueError("data.val_path and data.validation are not for classification: use data.val_fraction")
    whole = {"val_fraction": 0.0, "test_fraction": 0.0, "val_path": "", "validation": ()}
    found = {}
    for name, path in named:
        one = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=path, **whole))
        found[name] = start_data(one, tokenizer, run_dir / f"data-{name}")
    return found


def with_validation(plan: Plan, data: Data, texts: Mapping[str, Data], tokenizer: Tokenizer | None) -> dict[str, Data]:
    """Return the training data with each validation text in place of their own, by name. They fit the model.

    Prepared tokens with a validation part of their own give that part; all others are used whole.

    Raises:
      ValueError: a text does not fit the model or the recipe.
    """
    found = {}
    for name, text in texts.items():
        split, part = (text.train, "train") if text.val is None else (text.val, "val")
        counts = (text.manifest or {}).get(part, {})
        manifest = None if data.manifest is None else data.manifest | {"val": counts}
        found[name] = check_data(plan, dataclasses.replace(data, val=split, manifest=manifest), tokenizer)  # pyright: ignore[reportArgumentType]
    return found
