"""What a training step changes: parameters, LoRA's matrices, the optimizer state."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gpt2_jax.lora import init_lora, merge_lora, pairs_of
from gpt2_jax.params import Params, flatten, unflatten
from gpt2_jax.recipe import Lora, Recipe

FIRST_SCALE = 2.0**16


@struct.dataclass
class LossScale:
    """The factor of a float16 loss.

    Attributes:
      value: float32 scalar, the factor of the next step.
      n_good: int32 scalar, steps since it last changed.
    """

    value: jax.Array
    n_good: jax.Array


@struct.dataclass
class TrainState:
    """What a step changes, and everything that the next step needs.

    Attributes:
      step: int32 scalar, optimizer steps done.
      params: the model's params; float32 (float64 if `compute_dtype` is float64).
      lora: the small tree of `gpt2_jax.lora`, which is trained instead of params, apart from those that match
        `lora.full`; None without LoRA.
      opt_state: the Optax state of the trained arrays only.
      mean_loss: float32 scalar, running mean of the loss, used to detect spikes; 0 before the first step.
      average: {name: moving average of a trained array}; None without `optimizer.ema`.
      loss_scale: the factor of the loss with compute_dtype float16; else None.
    """

    step: jax.Array
    params: Params
    lora: dict[str, dict[str, jax.Array]] | None
    opt_state: Any
    mean_loss: jax.Array
    average: dict[str, jax.Array] | None = None
    loss_scale: LossScale | None = None

    def averaged(self) -> TrainState:
        """Return the state with the moving average in place of what is trained, if there is one."""
        return self if self.average is None else self.with_trained(self.average)

    def by_name(self) -> dict[str, jax.Array]:
        """Return {name: array} of LoRA's small tree and of the params. Their names differ: pairs end in /a and /b."""
        return flatten(self.lora or {}) | flatten(self.params)

    def trained(self, names: Iterable[str]) -> dict[str, jax.Array]:
        """Return {name: array} of these names, which the optimizer changes."""
        flat = self.by_name()
        return {name: flat[name] for name in names}

    def with_trained(self, changed: Mapping[str, jax.Array]) -> TrainState:
        """Return the state with these arrays in place of those from `trained`."""
        pairs, params = flatten(self.lora or {}), flatten(self.params)
        pairs |= {name: leaf for name, leaf in changed.items() if name in pairs}
        params |= {name: leaf for name, leaf in changed.items() if name not in pairs}
        return dataclasses.replace(self, params=unflatten(params), lora=None if self.lora is None else pairs_of(pairs))


def model_params(state: TrainState, recipe: Recipe, without: Container[str] = ()) -> Params:
    """Return plain GPT-2 params: the state's params, with LoRA's small tree merged into them.

    Args:
      state: the state.
      recipe: the recipe of the run.
      without: names of matrices whose pair is not merged.
    """
    if state.lora is None:
        return state.params
    lora = {name: pair for name, pair in state.lora.items() if name not in without}
    return merge_lora(state.params, lora, recipe.lora.alpha)


def bare_state(recipe: Recipe, params: Params) -> TrainState:
    """Return the state before the first step, without the optimizer state."""
    lora = None
    if recipe.lora.is_used:
        key = jax.random.fold_in(seed_key(recipe), 2**31)  # not the key of any step
        lora = init_lora(params, recipe.lora.rank, recipe.lora.targets, key, recipe.lora.ranks)
    scale = LossScale(jnp.float32(FIRST_SCALE), jnp.int32(0)) if recipe.compute_dtype == "float16" else None
    return TrainState(jnp.int32(0), params, lora, None, jnp.float32(0), loss_scale=scale)


def candidates(state: TrainState, recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the arrays that the rules of the optimizer choose from.

    These are the params. With LoRA they are its pairs, and the params that match `lora.full` and have no pair.

    Raises:
      ValueError: no param matches `lora.full`, and it is not the default, which matches only the head of a classifier.
    """
    params = flatten(state.params)
    if state.lora is None:
        return tuple(params)
    pattern = recipe.lora.full
    full = [name for name in params if pattern and re.search(pattern, name)]
    if not full and pattern not in ("", Lora().full):
        raise ValueError(f"no parameter name matches lora.full, {pattern!r}")
    return (*flatten(state.lora), *(name for name in full if name not in state.lora))


def seed_key(recipe: Recipe) -> jax.Array:
    """Return the key for dropout and for LoRA's initial matrices."""
    return jax.random.key(recipe.seed, impl="threefry2x32")
