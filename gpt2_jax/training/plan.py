"""The plan of a run: everything that follows from a model's config, a recipe and the devices, worked out once."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt2_jax.config import GPT2Config
from gpt2_jax.model import abstract_params
from gpt2_jax.params import Params, by_rules
from gpt2_jax.recipe import Recipe
from gpt2_jax.sharding import DATA, make_mesh, param_shardings
from gpt2_jax.training.optimizer import make_optimizer, make_schedule
from gpt2_jax.training.state import TrainState, bare_state


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What the parts of a run need to know; made by `make_plan`, once, by whoever starts the run.

    Attributes:
      config: the model's as it is trained, with the recipe's dropout rates and dtypes.
      recipe: how it is trained.
      mesh: the devices.
      n_tokens: T, tokens of a window.
      n_rows: rows of one part of a step on one device along `data`.
      trained: names of the parameters, or of LoRA's matrices, that the optimizer changes.
      optimizer: Optax's, over {name: array} of what is trained.
      schedule: the learning rate of a step, from 0 on.
      state: the TrainState as jax.ShapeDtypeStruct with shardings.
      gathered: params-shaped shardings, whole along `data`: how a product takes the parameters.
    """

    config: GPT2Config
    recipe: Recipe
    mesh: Mesh
    n_tokens: int
    n_rows: int
    trained: tuple[str, ...]
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    state: TrainState
    gathered: Params

    @property
    def on_cpu(self) -> bool:
        """Whether the devices are CPUs."""
        return self.mesh.devices.flat[0].platform == "cpu"

    def over_rows(self, *before: None) -> NamedSharding:
        """Return the sharding of arrays whose rows are divided over `data`; `before` are the axes before the rows."""
        return NamedSharding(self.mesh, PartitionSpec(*before, DATA))

    def whole(self) -> NamedSharding:
        """Return the sharding of arrays that every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())


def make_plan(config: GPT2Config, recipe: Recipe, mesh: Mesh | None = None, n_tokens: int = 0) -> Plan:
    """Work out the plan of a run; nothing is compiled, and no memory is taken.

    Args:
      config: the model's; the recipe's dropout and dtypes take the place of its own.
      recipe: how it is trained.
      mesh: the devices, of `make_mesh`; None makes the recipe's.
      n_tokens: tokens of a window; 0 is the recipe's, or the model's n_ctx.

    Raises:
      ValueError: recipe, model and devices do not fit together, or a rule of the recipe leaves a parameter out.
    """
    if mesh is None:
        mesh = make_mesh(recipe.mesh.data, recipe.mesh.model)
    config = training_config(config, recipe)
    if recipe.data.n_tokens > config.n_ctx:
        raise ValueError(
            f"data.n_tokens, {recipe.data.n_tokens}, must not be more than the model's n_ctx, {config.n_ctx}"
        )
    _check_rows(recipe, mesh)
    bare = jax.eval_shape(functools.partial(bare_state, recipe), abstract_params(config))
    trained = _trained_names(bare, recipe)
    optimizer = make_optimizer(recipe.optimizer, trained)
    state = dataclasses.replace(bare, opt_state=jax.eval_shape(optimizer.init, bare.trained(trained)))
    return Plan(
        config=config,
        recipe=recipe,
        mesh=mesh,
        n_tokens=n_tokens or recipe.data.n_tokens or config.n_ctx,
        n_rows=recipe.batch_size // recipe.accumulate // mesh.shape[DATA],
        trained=trained,
        optimizer=optimizer,
        schedule=make_schedule(recipe.optimizer, recipe.steps),
        state=jax.tree.map(lambda leaf, at: leaf.update(sharding=at), state, _shardings(state, mesh)),
        gathered=_shardings(state.params, mesh, gathered=(DATA,)),
    )


def training_config(config: GPT2Config, recipe: Recipe) -> GPT2Config:
    """Return the config with the recipe's dropout and dtypes."""
    rate, dtype = recipe.model.dropout, jnp.dtype(recipe.compute_dtype)
    rates = {"embd_pdrop": rate, "attn_pdrop": rate, "resid_pdrop": rate}
    return config.replace(compute_dtype=dtype, param_dtype=jnp.promote_types(dtype, jnp.float32), **rates)


def _trained_names(state: TrainState, recipe: Recipe) -> tuple[str, ...]:
    """Return the names of what the rules do not freeze."""
    rates = by_rules(recipe.optimizer.learning_rates, state.by_name(), "optimizer.learning_rates")
    if not any(rates.values()):
        raise ValueError("optimizer.learning_rates freeze every parameter: nothing would be trained")
    return tuple(name for name, rate in rates.items() if rate)


def _shardings(tree: Any, mesh: Mesh, gathered: tuple[str, ...] = ()) -> Any:
    """Return the sharding of each array: by the rules of `gpt2_jax.sharding`, whole along the axes `gathered`.

    An array of the optimizer's belongs to the parameter that its path names.
    """

    def sharding(path: Any, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return param_shardings({name: leaf}, mesh, gathered)[name]

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _check_rows(recipe: Recipe, mesh: Mesh) -> None:
    """Check that the rows of a part can be divided over the mesh."""
    n_parts, n_devices = recipe.accumulate, mesh.shape[DATA]
    if recipe.batch_size % (n_parts * n_devices):
        fitting = [n for n in range(1, n_parts) if recipe.batch_size % (n * n_devices) == 0]
        advice = f"accumulate {fitting[-1]}" if fitting else f"a batch_size that is a multiple of {n_parts * n_devices}"
        raise ValueError(
            f"batch_size {recipe.batch_size} in accumulate {n_parts} parts leaves {recipe.batch_size // n_parts} rows, "
            f"which {n_devices} devices cannot share: set {advice}, or mesh.data smaller"
        )
