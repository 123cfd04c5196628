"""One optimizer step, `train_step(state, batch) -> (state, metrics)`, as the plan defines it.

Shape letters: A parts of a step, B rows of a part, T tokens, D n_embd.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding

from gpt2_jax.checkpoints.placing import place
from gpt2_jax.data.batching import Batch
from gpt2_jax.jax_defaults import under_jax_defaults
from gpt2_jax.model import GPT2, check_params
from gpt2_jax.params import Params
from gpt2_jax.tensor_parallel import by_heads
from gpt2_jax.training.objective import abstract_batch, batch_loss
from gpt2_jax.training.plan import Plan
from gpt2_jax.training.state import TrainState, bare_state, model_params, seed_key

# By default, XLA for CPUs removes barriers before it looks for duplicate work and fuses operations. So it would undo
# rematerialization, and the order of updates in `_updated`. The results are the same, but take more time and memory.
KEEP_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}
MEAN_DECAY = 0.98  # decay of the running mean loss that spikes are compared with


@under_jax_defaults
def init_state(plan: Plan, params: Params, donate: bool = False) -> TrainState:
    """Return the state before the first step, on the devices of the plan's mesh.

    Args:
      plan: the plan of the run.
      params: the initial params, on any devices or as NumPy arrays. They are copied, one after the other.
      donate: delete each jax array of `params` as soon as it is copied, so that they are never in memory twice.

    Raises:
      ValueError: params do not match the plan's config.
    """
    check_params(plan.config, params, dtypes=False)
    shardings = _shardings(plan.state)

    def copy(leaf: Any, sharding: NamedSharding) -> jax.Array:
        copied = _copy(leaf, plan.config.param_dtype, sharding)
        if donate and isinstance(leaf, jax.Array):
            leaf.delete()
        return copied

    params = jax.tree.map(copy, params, shardings.params)

    def make(params: Params) -> TrainState:
        state = bare_state(plan.recipe, params)
        return dataclasses.replace(state, opt_state=plan.optimizer.init(state.trained(plan.trained)))

    return jax.jit(make, out_shardings=shardings, donate_argnums=0)(params)


def _copy(leaf: jax.Array | np.ndarray, dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
    """Return a copy of an array with a dtype and a sharding. It is complete, and its memory can be donated."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:  # on the devices of several processes
        return jax.jit(lambda leaf: jnp.copy(leaf).astype(dtype), out_shardings=sharding)(leaf).block_until_ready()
    if isinstance(leaf, jax.Array) and leaf.dtype == dtype and sharding.is_fully_addressable:
        placed = jax.device_put(leaf, sharding)  # from device to device
    else:  # the NumPy array of a jax array would live as long as that array: so it is that of a copy
        placed, _ = place(np.asarray(jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf), dtype, sharding)
    # `placed` may share the memory of `leaf` or, on a CPU, of a NumPy array, which cannot be donated.
    return jax.jit(jnp.copy, out_shardings=sharding)(placed).block_until_ready()


def make_train_step(plan: Plan) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Return `train_step(state, batch) -> (state, metrics)`, which compiles once; the state passed in is donated.

    It is a pure function: the same state and batch give the same result. This includes dropout, whose keys are derived
    from the recipe's seed and the step.

    Args:
      plan: from `make_plan`; the rows of each part are divided over the `data` axis of its mesh.

    Returns:
      A jitted function of a TrainState and a Batch of [A, B, T] arrays, where A is recipe.accumulate. The metrics are
      scalars: `loss` (the weighted mean, in nats a token, or for classification nats an example), `grad_norm` (of all
      gradients, before clipping), `learning_rate`, `n_tokens` (sum of the weights), and the bool `skipped`. A step is
      skipped if the loss or a gradient is not finite, if there is a spike that the recipe does not ignore, or if no
      target counts. A skipped step changes neither the trained arrays nor the optimizer state.
    """
    gradients = _make_gradients(plan)
    monitor = plan.recipe.monitor

    @under_jax_defaults
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        n_tokens = batch.weights.sum()
        changing = state.trained(plan.trained)
        loss, grads = gradients(state, changing, batch, n_tokens)
        grad_norm = optax.tree.norm(grads)
        rate = plan.schedule(state.step)
        skip = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm)) | (n_tokens == 0)
        if monitor.on_spike != "ignore":
            skip |= (state.mean_loss > 0) & (loss > monitor.spike * state.mean_loss)
        changed, opt_state = _updated(plan, changing, state.opt_state, grads, rate, skip)
        mean_loss = _mean_loss(state.mean_loss, loss, n_tokens, monitor.spike)
        new = state.with_trained(changed)
        new = dataclasses.replace(new, step=state.step + 1, opt_state=opt_state, mean_loss=mean_loss)
        metrics = {"loss": loss, "grad_norm": grad_norm, "learning_rate": rate, "n_tokens": n_tokens, "skipped": skip}
        return new, metrics

    shardings = _shardings(plan.state)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, plan.over_rows(None)),
        out_shardings=(shardings, plan.whole()),
        compiler_options=KEEP_BARRIERS if plan.on_cpu else None,
    )


def lower_train_step(plan: Plan) -> Any:
    """Return `make_train_step(plan)` as a jax.stages.Lowered, before there is a state or a batch."""
    step: Any = make_train_step(plan)
    return step.lower(plan.state, abstract_batch(plan))


def _updated(plan: Plan, changing: dict, opt_state: Any, grads: dict, rate: Any, skip: jax.Array) -> tuple:
    """Return the trained arrays and the optimizer state after a step; the given ones if it is skipped.

    XLA for CPUs computes each array in a pass of its own. The new moments replace the old ones in place, but the new
    weights need the old moments, so XLA would copy these first. With the barrier, the weights are computed first. The
    second call of the optimizer is for its state alone, and the first for its updates; XLA drops what is not used.
    """

    def unless_skipped(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda new, old: jnp.where(skip, old, new), new, old)

    updates, new_opt_state = plan.optimizer.update(grads, opt_state, changing)
    changed = jax.tree.map(lambda leaf, update: leaf - (rate * update).astype(leaf.dtype), changing, updates)
    changed = unless_skipped(changed, changing)
    if plan.on_cpu:
        changed, opt_state = lax.optimization_barrier((changed, opt_state))
        _, new_opt_state = plan.optimizer.update(grads, opt_state, changing)
    return changed, unless_skipped(new_opt_state, opt_state)


def _mean_loss(mean: jax.Array, loss: jax.Array, n_tokens: jax.Array, spike: float) -> jax.Array:
    """Return the running mean with one more loss. A spike counts only as `spike * mean`, so it hides no later spike."""
    first, counts = mean == 0, jnp.isfinite(loss) & (n_tokens > 0)
    loss = jnp.where(first, loss, jnp.minimum(loss, spike * mean)).astype(mean.dtype)
    new = jnp.where(first, loss, MEAN_DECAY * mean + (1 - MEAN_DECAY) * loss)
    return jnp.where(counts, new, mean)


def _make_gradients(plan: Plan) -> Callable:
    """Return f(state, changing, batch, n_tokens) -> (mean loss, its gradients with respect to `changing`)."""
    recipe = plan.recipe
    # On a CPU, writing an array to new memory and reading it again takes longer than an elementwise operation.
    remat = recipe.remat or ("elementwise" if plan.on_cpu else False)
    model = GPT2(plan.config, remat=remat, mesh=plan.mesh, by_heads=plan.by_heads)
    deterministic = recipe.model.dropout == 0
    wide = jnp.promote_types(plan.config.compute_dtype, jnp.float32)

    def loss_of(changing, state, part, key):
        params = _gathered(plan, model_params(state.with_trained(changing), recipe))
        return batch_loss(plan, model, params, part, None if deterministic else key)

    def gradients(state, changing, batch, n_tokens):
        weights = batch.weights.astype(wide) / jnp.where(n_tokens > 0, n_tokens, 1).astype(wide)
        batch = dataclasses.replace(batch, weights=weights)
        key = jax.random.fold_in(seed_key(recipe), state.step)

        def part(a):
            one = jax.tree.map(lambda array: array[a], batch)
            return jax.value_and_grad(loss_of)(changing, state, one, jax.random.fold_in(key, a))

        if recipe.accumulate == 1:
            return part(0)
        start = (jnp.zeros((), wide), jax.tree.map(jnp.zeros_like, changing))
        return lax.fori_loop(0, recipe.accumulate, lambda a, total: jax.tree.map(jnp.add, total, part(a)), start)

    return gradients


def make_eval_step(plan: Plan) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """Return a jitted `eval_step(params, batch of [rows, T]) -> (sum of nats, sum of weights)`, without dropout."""
    model = GPT2(plan.config, mesh=plan.mesh, by_heads=plan.by_heads)

    @under_jax_defaults
    def eval_step(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        params = _gathered(plan, params)
        return batch_loss(plan, model, params, batch), batch.weights.sum()

    return jax.jit(eval_step, in_shardings=(_shardings(plan.state.params), plan.over_rows()))


def _gathered(plan: Plan, params: Params) -> Params:
    """Divide params as matrix products need them: not along `data`, and by heads. The state keeps them divided."""
    params = jax.tree.map(lax.with_sharding_constraint, params, plan.gathered)
    return by_heads(plan.config, params, plan.mesh) if plan.by_heads else params


def _shardings(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
