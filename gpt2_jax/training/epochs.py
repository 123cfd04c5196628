"""Epochs: how many steps they are, and how many were run."""

from __future__ import annotations

import dataclasses
import fractions
import math

from gpt2_jax.data.batching import windows_per_epoch
from gpt2_jax.data.examples import PreparedExamples
from gpt2_jax.data.token_files import Prepared, Tokens
from gpt2_jax.recipe import Recipe
from gpt2_jax.training.objective import rows_of
from gpt2_jax.training.plan import Plan, make_plan


def steps_of(recipe: Recipe, n_per_epoch: int) -> int:
    """Return the optimizer steps of `recipe.epochs` epochs, rounded up.

    Args:
      recipe: a recipe with epochs.
      n_per_epoch: windows or examples of an epoch.
    """
    rows = fractions.Fraction(str(float(recipe.epochs))) * n_per_epoch  # 0.1 * 30 in floats is more than 3
    return max(1, math.ceil(rows / recipe.batch_size))


def n_per_epoch(plan: Plan, data: Prepared | PreparedExamples) -> int:
    """Return the windows of an epoch of text, or its rows of examples.

    Raises:
      ValueError: no example has a target in a row.
    """
    rows = rows_of(plan, data, data.train)
    if rows is not None:
        if not len(rows):
            raise ValueError(
                f"rows of {plan.n_tokens:,} tokens end before the first target of each example: increase data.n_tokens"
            )
        return len(rows)
    assert isinstance(data.train, Tokens)
    return windows_per_epoch(data.train.n_tokens, plan.n_tokens)


def with_steps(plan: Plan, n: int) -> Plan:
    """Return the plan with the steps of its epochs, if its recipe has epochs in place of steps.

    Args:
      plan: from `make_plan`; without steps, it has no schedule of the learning rate yet.
      n: windows or examples of an epoch.
    """
    if not plan.recipe.epochs:
        return plan
    recipe = dataclasses.replace(plan.recipe, steps=steps_of(plan.recipe, n), epochs=0.0)
    return dataclasses.replace(make_plan(plan.config, recipe, plan.mesh, plan.n_tokens), source=plan.source)
