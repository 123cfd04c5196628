"""One optimizer step, `train_step(state, batch) -> (state, metrics)`, and the state that it changes.

Shape letters: A parts of a step, B rows of a part, T tokens, D n_embd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt2_jax.config import GPT2Config
from gpt2_jax.data.batching import Batch
from gpt2_jax.lora import init_lora, merge_lora
from gpt2_jax.model import GPT2, abstract_params, check_params
from gpt2_jax.params import Params, by_rules, flatten, unflatten
from gpt2_jax.recipe import Recipe
from gpt2_jax.sharding import DATA, param_shardings
from gpt2_jax.training.loss import CHUNK, token_loss
from gpt2_jax.training.optimizer import make_optimizer, make_schedule

MEAN_DECAY = 0.98  # of the running mean that a spike is measured by


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


def training_config(config: GPT2Config, recipe: Recipe) -> GPT2Config:
    """Return the config with the recipe's dropout and dtypes."""
    rate, dtype = recipe.model.dropout, jnp.dtype(recipe.compute_dtype)
    rates = {"embd_pdrop": rate, "attn_pdrop": rate, "resid_pdrop": rate}
    return config.replace(compute_dtype=dtype, param_dtype=jnp.promote_types(dtype, jnp.float32), **rates)


def model_params(state: TrainState, recipe: Recipe) -> Params:
    """Return plain GPT-2 params: the state's, LoRA's small tree merged into them."""
    return state.params if state.lora is None else merge_lora(state.params, state.lora, recipe.lora.alpha)


def trained(state: TrainState, recipe: Recipe) -> dict[str, jax.Array]:
    """Return what the optimizer changes, by name: the params that are not frozen, or LoRA's small tree."""
    flat = flatten(state.params if state.lora is None else state.lora)
    rates = by_rules(recipe.optimizer.learning_rates, flat, "optimizer.learning_rates")
    if not any(rates.values()):
        raise ValueError("optimizer.learning_rates freeze every parameter: nothing would be trained")
    return {name: leaf for name, leaf in flat.items() if rates[name]}


def with_trained(state: TrainState, changed: Mapping[str, jax.Array]) -> TrainState:
    """Return the state with these in the place of those that `trained` gave."""
    if state.lora is None:
        return state.replace(params=unflatten(flatten(state.params) | changed))
    return state.replace(lora=unflatten_pairs(flatten(state.lora) | changed))


def unflatten_pairs(flat: Mapping[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
    """Return {"h0/attn/c_attn/w": {"a", "b"}} of {"h0/attn/c_attn/w/a", ...}."""
    pairs: dict[str, dict[str, jax.Array]] = {}
    for name, leaf in flat.items():
        matrix, _, side = name.rpartition("/")
        pairs.setdefault(matrix, {})[side] = leaf
    return pairs


# ---- making a state


def _new_state(config: GPT2Config, recipe: Recipe, params: Params) -> TrainState:
    lora = None
    if recipe.lora.rank:
        key = jax.random.fold_in(_key(recipe), 2**31)  # apart from every step's
        lora = init_lora(params, recipe.lora.rank, recipe.lora.targets, key)
    state = TrainState(jnp.int32(0), params, lora, None, jnp.float32(0))
    changing = trained(state, recipe)
    optimizer = make_optimizer(recipe.optimizer, changing)
    return state.replace(opt_state=optimizer.init(changing))


def init_state(config: GPT2Config, recipe: Recipe, params: Params, mesh: Mesh) -> TrainState:
    """Return the state before the first step, on the devices of a mesh; `params` themselves are copied.

    Raises:
      ValueError: params are not those of the config, or the recipe does not fit them.

    """
    config = training_config(config, recipe)
    check_params(config, params, dtypes=False)
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(config.param_dtype), params)
    shardings = state_shardings(config, recipe, mesh)
    params = jax.tree.map(jax.device_put, params, shardings.params)
    make = jax.jit(lambda params: _new_state(config, recipe, params), out_shardings=shardings, donate_argnums=0)
    return make(params)


def abstract_state(config: GPT2Config, recipe: Recipe, mesh: Mesh) -> TrainState:
    """Return the state as jax.ShapeDtypeStruct with shardings: no memory."""
    config = training_config(config, recipe)
    shapes = _shapes(config, recipe)
    shardings = state_shardings(config, recipe, mesh)
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, shardings)


def _shapes(config: GPT2Config, recipe: Recipe) -> TrainState:
    return jax.eval_shape(lambda params: _new_state(config, recipe, params), abstract_params(config))


def state_shardings(config: GPT2Config, recipe: Recipe, mesh: Mesh) -> TrainState:
    """Return the sharding of each array of the state: by the rules of `gpt2_jax.sharding`, also for the optimizer's.

    An array of the optimizer's belongs to the parameter that its path names.
    """

    def sharding(path: Any, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return param_shardings({name: leaf}, mesh)[name]

    return jax.tree_util.tree_map_with_path(sharding, _shapes(training_config(config, recipe), recipe))


# ---- the step


def make_train_step(config: GPT2Config, recipe: Recipe, mesh: Mesh) -> Callable:
    """Compile-once `train_step(state, batch) -> (state, metrics)`; the state passed in is used up.

    It is a pure function: the same state and batch give the same result, dropout included, whose keys follow from the
    recipe's seed and the step.

    Args:
      config: of the model.
      recipe: how.
      mesh: where; the rows of each part are divided over its `data` axis.

    Returns:
      A jitted function of a TrainState and a Batch of [A, B, T] arrays, A = recipe.accumulate. The metrics are
      scalars: `loss` (nats a token, mean over the weights), `grad_norm` (of all gradients, before clipping),
      `learning_rate`, `n_tokens` (sum of the weights), and the bool `skipped`: the loss or a gradient was not finite,
      there was a spike that the recipe does not ignore, or no target counted; nothing that is trained was changed.

    Raises:
      ValueError: the rows of a part cannot be divided over the mesh, or the recipe's rules do not cover the params.

    """
    config = training_config(config, recipe)
    check_rows(recipe, mesh)
    shapes = _shapes(config, recipe)
    optimizer = make_optimizer(recipe.optimizer, trained(shapes, recipe))
    gradients = _make_gradients(config, recipe, mesh)
    learning_rate = make_schedule(recipe.optimizer, recipe.steps)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        n_tokens = batch.weights.sum()
        loss, grads = gradients(state, batch, n_tokens)
        changing = trained(state, recipe)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, changing)
        rate = learning_rate(state.step)
        changed = jax.tree.map(lambda leaf, update: leaf - (rate * update).astype(leaf.dtype), changing, updates)
        skip = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm)) | (n_tokens == 0)
        if recipe.monitor.on_spike != "ignore":
            skip |= (state.mean_loss > 0) & (loss > recipe.monitor.spike * state.mean_loss)
        new = with_trained(state, changed).replace(opt_state=opt_state)
        new = jax.tree.map(lambda old, new: jnp.where(skip, old, new), state, new)
        new = new.replace(step=state.step + 1, mean_loss=_mean_loss(state.mean_loss, loss, n_tokens, recipe))
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "n_tokens": n_tokens,
            "skipped": skip,
        }
        return new, metrics

    shardings = state_shardings(config, recipe, mesh)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, NamedSharding(mesh, PartitionSpec(None, DATA))),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
    )


def _mean_loss(mean: jax.Array, loss: jax.Array, n_tokens: jax.Array, recipe: Recipe) -> jax.Array:
    """Return the running mean with one more loss: a spike counts as the least one, so that it hides no other."""
    first = mean == 0
    loss = jnp.where(first, loss, jnp.minimum(loss, recipe.monitor.spike * mean)).astype(mean.dtype)
    new = jnp.where(first, loss, MEAN_DECAY * mean + (1 - MEAN_DECAY) * loss)
    return jnp.where(jnp.isfinite(loss) & (n_tokens > 0), new, mean)


def _make_gradients(config: GPT2Config, recipe: Recipe, mesh: Mesh) -> Callable:
    """Return f(state, batch, n_tokens) -> (mean loss, its gradients by what is trained)."""
    model = GPT2(config, remat=recipe.remat)
    deterministic = recipe.model.dropout == 0
    wide = jnp.promote_types(config.compute_dtype, jnp.float32)
    chunk = CHUNK * mesh.shape[DATA]  # that much on each device

    def loss_of(changing, state, tokens_BT, target_BT, weight_BT, key):
        params = model_params(with_trained(state, changing), recipe)
        params = _gathered(params, mesh)
        rngs = None if deterministic else {"dropout": key}
        h_BTD, _ = model.apply({"params": params}, tokens_BT, None, None, deterministic, method="hidden", rngs=rngs)
        return token_loss(h_BTD, params["wte"], target_BT, weight_BT, chunk)

    def gradients(state, batch, n_tokens):
        weights = batch.weights.astype(wide) / jnp.where(n_tokens > 0, n_tokens, 1).astype(wide)
        key = jax.random.fold_in(_key(recipe), state.step)
        changing = trained(state, recipe)

        def part(a):
            arrays = (batch.tokens[a], batch.targets[a], weights[a])
            return jax.value_and_grad(loss_of)(changing, state, *arrays, jax.random.fold_in(key, a))

        if recipe.accumulate == 1:
            return part(0)
        start = (jnp.zeros((), wide), jax.tree.map(jnp.zeros_like, changing))
        return lax.fori_loop(0, recipe.accumulate, lambda a, total: jax.tree.map(jnp.add, total, part(a)), start)

    return gradients


def make_eval_step(config: GPT2Config, recipe: Recipe, mesh: Mesh) -> Callable:
    """Return a jitted eval_step(params, batch of [rows, T]) -> (sum of nats, sum of weights), without dropout."""
    config = training_config(config, recipe)
    model = GPT2(config)
    shardings = unflatten(param_shardings(flatten(abstract_params(config)), mesh))
    chunk = CHUNK * mesh.shape[DATA]

    def eval_step(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        params = _gathered(params, mesh)
        h_BTD, _ = model.apply({"params": params}, batch.tokens, method="hidden")
        return token_loss(h_BTD, params["wte"], batch.targets, batch.weights, chunk), batch.weights.sum()

    return jax.jit(eval_step, in_shardings=(shardings, NamedSharding(mesh, PartitionSpec(DATA))))


def check_rows(recipe: Recipe, mesh: Mesh) -> None:
    """Check that the rows of a part can be divided over the mesh.

    Raises:
      ValueError: they cannot.

    """
    n_parts, n_devices = recipe.accumulate, mesh.shape[DATA]
    if recipe.batch_size % (n_parts * n_devices):
        fitting = [n for n in range(1, n_parts) if recipe.batch_size % (n * n_devices) == 0]
        advice = f"accumulate {fitting[-1]}" if fitting else f"a batch_size that is a multiple of {n_parts * n_devices}"
        raise ValueError(
            f"batch_size {recipe.batch_size} in accumulate {n_parts} parts leaves {recipe.batch_size // n_parts} rows, "
            f"which {n_devices} devices cannot share: set {advice}, or mesh.data smaller"
        )


def _gathered(params: Params, mesh: Mesh) -> Params:
    """Ask for params whole along `data`, where a product takes them; the parts are what the state keeps."""
    flat = flatten(params)
    shardings = param_shardings(flat, mesh, gathered=(DATA,))
    return unflatten({name: lax.with_sharding_constraint(leaf, shardings[name]) for name, leaf in flat.items()})


def _key(recipe: Recipe) -> jax.Array:
    return jax.random.key(recipe.seed, impl="threefry2x32")
