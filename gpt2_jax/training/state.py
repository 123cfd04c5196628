"""What a training step changes: parameters, LoRA's matrices, the optimizer's state."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gpt2_jax.lora import init_lora, merge_lora
from gpt2_jax.params import Params, flatten, unflatten
from gpt2_jax.recipe import Recipe


@struct.dataclass
class TrainState:
    """What a step changes, and all that the next one needs.

    Attributes:
      step: int32 scalar, optimizer steps done.
      params: the model's params, as everywhere; float32 (float64 under a float64 `compute_dtype`).
      lora: the small tree of `gpt2_jax.lora` that is trained in their place, None without LoRA.
      opt_state: Optax's, of what is trained alone.
      mean_loss: float32 scalar, running mean of the loss, by which spikes are told; 0 before the first step.
    """

    step: jax.Array
    params: Params
    lora: dict[str, dict[str, jax.Array]] | None
    opt_state: Any
    mean_loss: jax.Array

    def by_name(self) -> dict[str, jax.Array]:
        """Return what may be trained by name: the params, or LoRA's small tree."""
        return flatten(self.params if self.lora is None else self.lora)

    def trained(self, names: Iterable[str]) -> dict[str, jax.Array]:
        """Return the arrays of these names, which are those that the optimizer changes."""
        flat = self.by_name()
        return {name: flat[name] for name in names}

    def with_trained(self, changed: Mapping[str, jax.Array]) -> TrainState:
        """Return the state with these arrays in the place of those that `trained` gave."""
        flat = self.by_name() | dict(changed)
        if self.lora is None:
            return dataclasses.replace(self, params=unflatten(flat))
        return dataclasses.replace(self, lora=_pairs(flat))


def model_params(state: TrainState, recipe: Recipe) -> Params:
    """Return plain GPT-2 params: the state's, LoRA's small tree merged into them."""
    return state.params if state.lora is None else merge_lora(state.params, state.lora, recipe.lora.alpha)


def bare_state(recipe: Recipe, params: Params) -> TrainState:
    """Return the state before the first step, without that of the optimizer."""
    lora = None
    if recipe.lora.rank:
        key = jax.random.fold_in(seed_key(recipe), 2**31)  # apart from every step's
        lora = init_lora(params, recipe.lora.rank, recipe.lora.targets, key)
    return TrainState(jnp.int32(0), params, lora, None, jnp.float32(0))


def seed_key(recipe: Recipe) -> jax.Array:
    """Return the key that dropout and LoRA's first matrices are drawn with."""
    return jax.random.key(recipe.seed, impl="threefry2x32")


def _pairs(flat: Mapping[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
    """Return {"h0/attn/c_attn/w": {"a", "b"}} of {"h0/attn/c_attn/w/a", ...}."""
    pairs: dict[str, dict[str, jax.Array]] = {}
    for name, leaf in flat.items():
        matrix, _, side = name.rpartition("/")
        pairs.setdefault(matrix, {})[side] = leaf
    return pairs
