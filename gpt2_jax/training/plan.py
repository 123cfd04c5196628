"""The plan of a run: everything that follows from a model's config, a recipe and the devices, computed once."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt2_jax import processes
from gpt2_jax.config import GPT2Config
from gpt2_jax.fused_attention import Padding, kernels
from gpt2_jax.model import abstract_params
from gpt2_jax.params import Params, by_rules
from gpt2_jax.recipe import Recipe
from gpt2_jax.sharding import DATA, MODEL, make_mesh, param_shardings
from gpt2_jax.training.optimizer import make_optimizer, make_schedule
from gpt2_jax.training.state import TrainState, bare_state


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What all parts of a run need to know. Make it once per run, with `make_plan`.

    Attributes:
      config: the model's config in training, with the recipe's dropout rates and dtypes.
      recipe: the recipe of the run.
      mesh: the devices.
      n_tokens: T, the tokens of a window.
      n_rows: rows of one part of a step on one device along `data`.
      trained: names of the arrays that the optimizer changes: parameters, or LoRA's matrices.
      optimizer: the Optax transformation over {name: array} of the trained arrays.
      schedule: the learning rate as a function of the step, counted from 0.
      state: the TrainState as jax.ShapeDtypeStruct with shardings.
      gathered: the shardings that params have in matrix products: a tree like params, not divided along `data`.
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
    def by_heads(self) -> bool:
        """Whether heads are divided over devices: see `gpt2_jax.tensor_parallel`."""
        return self.mesh.shape[MODEL] > 1

    @property
    def on_cpu(self) -> bool:
        """Whether the devices are CPUs."""
        return self.mesh.devices.flat[0].platform == "cpu"

    def over_rows(self, *before: None) -> NamedSharding:
        """Return the sharding of arrays whose rows are divided over `data`; `before` are the axes before the rows."""
        return NamedSharding(self.mesh, PartitionSpec(*before, DATA))

    def whole(self) -> NamedSharding:
        """Return the sharding of arrays that every device holds in full."""
        return NamedSharding(self.mesh, PartitionSpec())


def make_plan(config: GPT2Config, recipe: Recipe, mesh: Mesh | None = None, n_tokens: int = 0) -> Plan:
    """Compute the plan of a run. Nothing is compiled, and no device memory is allocated.

    Args:
      config: the model's config; the recipe's dropout and dtypes replace its own.
      recipe: the recipe of the run.
      mesh: the devices, from `make_mesh`; None makes the recipe's mesh.
      n_tokens: tokens of a window; 0 takes the recipe's `data.n_tokens`, or the model's n_ctx if that is 0 too.

    Raises:
      ValueError: recipe, model and devices do not fit together, or the recipe's rules do not cover a parameter.
    """
    if mesh is None:
        mesh = make_mesh(recipe.mesh.data, recipe.mesh.model)
    _check_processes(mesh)
    config = training_config(config, recipe)
    if recipe.objective == "classification" and not config.labels:
        raise ValueError("a classifier needs labels: pass data to start_model, or config.replace(labels=...)")
    if recipe.data.n_tokens > config.n_ctx:
        raise ValueError(
            f"data.n_tokens, {recipe.data.n_tokens}, must not be more than the model's n_ctx, {config.n_ctx}"
        )
    _check_rows(recipe, mesh)
    n_tokens = n_tokens or recipe.data.n_tokens or config.n_ctx
    ones: Any = jax.ShapeDtypeStruct((1, n_tokens), jnp.int32)
    padding = Padding(ones, None, ones) if recipe.data.pack else None
    kernels(config, mesh, n_tokens, padding, dropped=config.attn_pdrop > 0)  # an error if "fused" is impossible
    bare = jax.eval_shape(functools.partial(bare_state, recipe), abstract_params(config))
    trained = _trained_names(bare, recipe)
    optimizer = make_optimizer(recipe.optimizer, trained)
    state = dataclasses.replace(bare, opt_state=jax.eval_shape(optimizer.init, bare.trained(trained)))
    return Plan(
        config=config,
        recipe=recipe,
        mesh=mesh,
        n_tokens=n_tokens,
        n_rows=recipe.batch_size // recipe.accumulate // mesh.shape[DATA],
        trained=trained,
        optimizer=optimizer,
        schedule=make_schedule(recipe.optimizer, recipe.steps),
        state=jax.tree.map(lambda leaf, at: leaf.update(sharding=at), state, _shardings(state, mesh)),
        gathered=_shardings(state.params, mesh, gathered=(DATA,)),
    )


def training_config(config: GPT2Config, recipe: Recipe) -> GPT2Config:
    """Return the config with the recipe's dropout, dtypes and kind of attention."""
    rate, dtype = recipe.model.dropout, jnp.dtype(recipe.compute_dtype)
    rates = {"embd_pdrop": rate, "attn_pdrop": rate, "resid_pdrop": rate}
    dtypes = {"compute_dtype": dtype, "param_dtype": jnp.promote_types(dtype, jnp.float32)}
    return config.replace(attention=recipe.attention, **dtypes, **rates)


def _trained_names(state: TrainState, recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the arrays that the rules do not freeze."""
    rates = by_rules(recipe.optimizer.learning_rates, state.by_name(), "optimizer.learning_rates")
    if recipe.objective == "classification" and recipe.classification.train == "last_block" and not recipe.lora.rank:
        n_layer = len({name.split("/")[0] for name in rates if re.match(r"h\d+/", name)})
        last = re.compile(rf"(h{n_layer - 1}|ln_f|score)/")
        rates = {name: rate if last.match(name) else 0 for name, rate in rates.items()}
    if not any(rates.values()):
        raise ValueError("optimizer.learning_rates freeze every parameter: nothing would be trained")
    return tuple(name for name, rate in rates.items() if rate)


def _shardings(tree: Any, mesh: Mesh, gathered: tuple[str, ...] = ()) -> Any:
    """Return the sharding of each array by the rules of `gpt2_jax.sharding`, not divided along the `gathered` axes.

    The path of an optimizer array names the parameter that it belongs to.
    """

    def sharding(path: Any, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return param_shardings({name: leaf}, mesh, gathered)[name]

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _check_processes(mesh: Mesh) -> None:
    """Check that every process has devices of the mesh: all of them run all steps."""
    without = {*range(processes.count())} - {device.process_index for device in mesh.devices.flat}
    if without and processes.count() > 1:
        raise ValueError(
            f"process {min(without)} has no device of the mesh: make the mesh with make_mesh, or start fewer"
        )


def _check_rows(recipe: Recipe, mesh: Mesh) -> None:
    """Check that the rows of a part can be divided over the mesh."""
    n_parts, n_devices = recipe.accumulate, mesh.shape[DATA]
    if recipe.batch_size % (n_parts * n_devices):
        fitting = [n for n in range(1, n_parts) if recipe.batch_size % (n * n_devices) == 0]
        advice = f"accumulate = {fitting[-1]}" if fitting else f"batch_size to a multiple of {n_parts * n_devices}"
        raise ValueError(
            f"batch_size {recipe.batch_size} with accumulate {n_parts} gives {recipe.batch_size // n_parts} rows a "
            f"part, which {n_devices} devices cannot share equally: set {advice}, or a smaller mesh.data"
        )
