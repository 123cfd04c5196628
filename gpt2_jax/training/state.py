"""What a training step changes: parameters, LoRA's matrices, the optimizer state."""

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
    """What a step changes, and everything that the next step needs.

    Attributes:
      step: int32 scalar, optimizer steps done.
      params: the model's params; float32 (float64 if `compute_dtype` is float64).
      lora: the small tree of `gpt2_jax.lora`, which is trained instead of params; None without LoRA.
      opt_state: the Optax state of the trained arrays only.
      mean_loss: float32 scalar, running mean of the loss, used to detect spikes; 0 before the first step.
    """

    step: jax.Array
    params: Params
    lora: dict[str, dict[str, jax.Array]] | None
    opt_state: Any
    mean_loss: jax.Array

    def by_name(self) -> dict[str, jax.Array]:
        """Return {name: array} of what may be trained: the params, or LoRA's small tree."""
        return flatten(self.params if self.lora is None else self.lora)

    def trained(self, names: Iterable[str]) -> dict[str, jax.Array]:
        """Return {name: array} of these names, which the optimizer changes."""
        flat = self.by_name()
        return {name: flat[name] for name in names}

    def with_trained(self, changed: Mapping[str, jax.Array]) -> TrainState:
        """Return the state with these arrays in place of those from `trained`."""
        flat = self.by_name() | dict(changed)
        if self.lora is None:
            return dataclasses.replace(self, params=unflatten(flat))
        return dataclasses.replace(self, lora=_pairs(flat))


def model_params(state: TrainState, recipe: Recipe) -> Params:
    """Return plain GPT-2 params: the state's params, with LoRA's small tree merged into them."""
    return state.params if state.lora is None else merge_lora(state.params, state.lora, recipe.lora.alpha)


def bare_state(recipe: Recipe, params: Params) -> TrainState:
    """Return the state before the first step, without the optimizer state."""
    lora = None
    if recipe.lora.rank:
        key = jax.random.fold_in(seed_key(recipe), 2**31)  # not the key of any step
        lora = init_lora(params, recipe.lora.rank, recipe.lora.targets, key)
    return TrainState(jnp.int32(0), params, lora, None, jnp.float32(0))


def seed_key(recipe: Recipe) -> jax.Array:
    """Return the key for dropout and for LoRA's initial matrices."""
    return jax.random.key(recipe.seed, impl="threefry2x32")


def _pairs(flat: Mapping[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
    """Return {"h0/attn/c_attn/w": {"a", "b"}} from {"h0/attn/c_attn/w/a", ...}."""
    pairs: dict[str, dict[str, jax.Array]] = {}
    for name, leaf in flat.items():
        matrix, _, side = name.rpartition("/")
        pairs.setdefault(matrix, {})[side] = leaf
    return pairs
