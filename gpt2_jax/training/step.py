"""One optimizer step, `train_step(state, batch) -> (state, metrics)`, as the plan defines it.

Shape letters: A parts of a step, B rows of a part, T tokens, D n_embd.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding, Sharding

from gpt2_jax.checkpoints.placing import place
from gpt2_jax.data.batching import Batch
from gpt2_jax.jax_defaults import under_jax_defaults
from gpt2_jax.lora import OUTPUT_HEAD, TABLES, Branches
from gpt2_jax.model import GPT2, check_params
from gpt2_jax.params import Params, flatten, unflatten
from gpt2_jax.tensor_parallel import by_heads
from gpt2_jax.training.objective import abstract_batch, batch_loss, label_counts, label_logits, label_loss
from gpt2_jax.training.plan import Plan
from gpt2_jax.training.state import LossScale, TrainState, bare_state, model_params, seed_key

# By default, XLA for CPUs removes barriers before it looks for duplicate work and fuses operations. So it would undo
# rematerialization, and the order of updates in `_updated`. The results are the same, but take more time and memory.
KEEP_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}
GOOD_STEPS, MOST_SCALE = 2000, 2.0**24  # steps until a loss scale doubles, and its limit
BRANCHES = 2**31  # folded into a step's key for the dropout of LoRA's branches
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
        placed = copied(leaf, plan.config.param_dtype, sharding)
        if donate and isinstance(leaf, jax.Array):
            leaf.delete()
        return placed

    params = jax.tree.map(copy, params, shardings.params)

    def make(params: Params) -> TrainState:
        state = bare_state(plan.recipe, params)
        trained = state.trained(plan.trained)
        average = jax.tree.map(jnp.copy, trained) if plan.recipe.optimizer.ema else None
        return dataclasses.replace(state, opt_state=plan.optimizer.init(trained), average=average)

    return jax.jit(make, out_shardings=shardings, donate_argnums=0)(params)


def copied(leaf: jax.Array | np.ndarray, dtype: np.dtype, sharding: Sharding) -> jax.Array:
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
        if state.average is not None:
            new = dataclasses.replace(new, average=_averaged(plan, state, changed, skip))
        if state.loss_scale is not None:
            overflowed = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
            new = dataclasses.replace(new, loss_scale=_next_scale(state.loss_scale, overflowed))
            metrics["loss_scale"] = state.loss_scale.value
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


def _averaged(plan: Plan, state: TrainState, changed: dict, skip: jax.Array) -> dict:
    """Return the moving average after a step. A skipped step does not change it."""
    step = state.step.astype(float)
    decay = jnp.minimum(plan.recipe.optimizer.ema, (1 + step) / (10 + step))
    share = jnp.where(skip, 0, 1 - decay)
    return jax.tree.map(lambda mean, leaf: mean + (share * (leaf - mean)).astype(mean.dtype), state.average, changed)


def _next_scale(scale: LossScale, overflowed: jax.Array) -> LossScale:
    """Return the factor of the next loss, by the rules of Micikevicius et al. 2018 (arXiv:1710.03740, section 3.2)."""
    n_good = jnp.where(overflowed, 0, scale.n_good + 1)
    grows = n_good >= GOOD_STEPS
    value = jnp.where(overflowed, jnp.maximum(scale.value / 2, 1), jnp.where(grows, 2 * scale.value, scale.value))
    return LossScale(jnp.minimum(value, MOST_SCALE), jnp.where(grows, 0, n_good))


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
        state = state.with_trained(changing)
        branches = _branches(plan, state, key)
        params = _gathered(plan, model_params(state, recipe, without=() if branches is None else branches.pairs))
        return batch_loss(plan, model, params, part, None if deterministic else key, branches)

    def gradients(state, changing, batch, n_tokens):
        weights = batch.weights.astype(wide) / jnp.where(n_tokens > 0, n_tokens, 1).astype(wide)
        if state.loss_scale is not None:  # before the backward pass, in which small float16 numbers would become 0
            weights = weights * state.loss_scale.value
        batch = dataclasses.replace(batch, weights=weights)
        key = jax.random.fold_in(seed_key(recipe), state.step)

        def part(a):
            one = jax.tree.map(lambda array: array[a], batch)
            return jax.value_and_grad(loss_of)(changing, state, one, jax.random.fold_in(key, a))

        if recipe.accumulate == 1:
            found = part(0)
        else:
            start = (jnp.zeros((), wide), jax.tree.map(jnp.zeros_like, changing))
            found = lax.fori_loop(0, recipe.accumulate, lambda a, total: jax.tree.map(jnp.add, total, part(a)), start)
        if state.loss_scale is None:
            return found
        return jax.tree.map(lambda array: array / state.loss_scale.value, found)

    return gradients


def _branches(plan: Plan, state: TrainState, key: jax.Array) -> Branches | None:
    """Return LoRA's pairs as branches beside the weights, if they have dropout. Those of tables are merged."""
    lora = plan.recipe.lora
    if state.lora is None or not lora.dropout:
        return None
    flat = {name: pair for name, pair in state.lora.items() if name not in TABLES}
    whole = jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf, plan.whole()), flat)
    a, b = ({name: pair[side] for name, pair in whole.items()} for side in "ab")
    n_in = {name: a[name].shape[0] if name != OUTPUT_HEAD else b[name].shape[1] for name in flat}
    if plan.by_heads:  # b has the columns of a matrix, and a its rows
        columns, rows = (r"attn/c_attn/w$", b), (r"attn/c_proj/w$", a)
        for pattern, side in (columns, rows):
            names = [name for name in side if re.search(pattern, name)]
            ordered = by_heads(plan.config, unflatten({name: side[name] for name in names}), plan.mesh)
            side |= flatten(ordered)
    pairs = {name: {"a": a[name], "b": b[name]} for name in flat}
    return Branches(pairs, lora.alpha, lora.dropout, jax.random.fold_in(key, BRANCHES), n_in)


def averaged_params(plan: Plan, state: TrainState) -> Params:
    """Return what `model_params` does, of the moving average if there is one, divided over the devices as params are.

    Without this, JAX would choose how the merged matrices of LoRA are divided. All processes must call this.
    """
    params = model_params(state.averaged(), plan.recipe)
    if state.lora is None:
        return params
    flat, at = flatten(params), flatten(_shardings(plan.state.params))
    merged = {name: flat[name] for name in state.lora}
    placed = jax.jit(lambda leaves: leaves, out_shardings={name: at[name] for name in merged})
    return unflatten(flat | placed(merged))


def make_eval_step(plan: Plan) -> Callable[[Params, Batch], tuple[jax.Array, ...]]:
    """Return a jitted `eval_step(params, batch of [rows, T]) -> (sum of nats, sum of weights)`, without dropout.

    For classification there is a third result, the confusion matrix of the batch: int32 [L, L], rows are true labels.
    """
    model = GPT2(plan.config, mesh=plan.mesh, by_heads=plan.by_heads)

    @under_jax_defaults
    def eval_step(params: Params, batch: Batch) -> tuple[jax.Array, ...]:
        params = _gathered(plan, params)
        if plan.recipe.objective == "classification":
            logits_BL = label_logits(model, params, batch)
            return label_loss(logits_BL, batch), batch.weights.sum(), label_counts(logits_BL, batch)
        return batch_loss(plan, model, params, batch), batch.weights.sum()

    shardings = (_shardings(plan.state.params), plan.over_rows())
    whole = plan.whole() if plan.recipe.objective == "classification" else None
    return jax.jit(eval_step, in_shardings=shardings, out_shardings=whole)


def _gathered(plan: Plan, params: Params) -> Params:
    """Divide params as matrix products need them: not along `data`, and by heads. The state keeps them divided."""
    params = jax.tree.map(lax.with_sharding_constraint, params, plan.gathered)
    return by_heads(plan.config, params, plan.mesh) if plan.by_heads else params


def _shardings(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
