"""A recipe's attention: what training takes from it, and what is refused before weights are read."""

import types

import jax
import jax.numpy as jnp
import pytest

from gpt2_jax import GPT2Config, fused_attention
from gpt2_jax.recipe import Model, Recipe
from gpt2_jax.sharding import make_mesh
from gpt2_jax.training import memory
from gpt2_jax.training.plan import make_plan
from gpt2_jax.training.step import Batch, make_eval_step, make_train_step

CONFIG = GPT2Config(n_vocab=37, n_ctx=256, n_embd=128, n_head=2, n_layer=3)
TPU = types.SimpleNamespace(platform="tpu", device_kind="TPU v5p")


@pytest.fixture
def on_a_tpu(monkeypatch):
    """Two devices: only the plan's mesh says which of them a step uses."""
    monkeypatch.setattr(fused_attention, "_accelerators", lambda mesh: [[TPU, TPU]])


def plan_of(attention="auto", dropout=0.0, n_tokens=130, compute_dtype="bfloat16"):
    model = Model(dropout=dropout)
    recipe = Recipe(batch_size=2, model=model, compute_dtype=compute_dtype, attention=attention)
    return make_plan(CONFIG, recipe, make_mesh(1, 1), n_tokens)


def kernels_in(plan):
    """Whether the training step and the evaluation step have kernels."""
    shape = (2, plan.n_tokens)
    rows = Batch(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)))
    parts = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *shape), leaf.dtype), rows)
    train, evaluate = (
        make_train_step(plan).trace(plan.state, parts),
        make_eval_step(plan).trace(plan.state.params, rows),
    )
    return ["pallas_call" in str(traced.jaxpr) for traced in (train, evaluate)]


def test_both_steps_take_the_kernel(on_a_tpu):
    assert kernels_in(plan_of()) == kernels_in(plan_of("fused")) == [True, True]
    assert kernels_in(plan_of("plain")) == [False, False]
    assert kernels_in(plan_of(dropout=0.1)) == [False, True]  # evaluation has no dropout
    assert kernels_in(plan_of(n_tokens=127)) == [False, False]


def test_the_estimate_of_memory_has_no_weights_of_a_kernel(on_a_tpu):
    weights = 3 * 2 * 2 * (128 * 128 + 2 * 130)  # layers, rows, heads, weights of two blocks of queries
    fused = memory._on_accelerator(plan_of())
    assert memory._on_accelerator(plan_of("plain")) - fused == 6 * weights  # bytes
    assert memory._on_accelerator(plan_of(dropout=0.1)) - fused == 7 * weights  # the mask of dropout, too


def test_what_is_impossible_is_refused_by_the_plan(on_a_tpu, monkeypatch):
    with pytest.raises(ValueError, match="a fused kernel has no dropout on attention weights: set"):
        plan_of("fused", dropout=0.1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match='attention="fused" is impossible here: a CPU has no fused kernel'):
        plan_of("fused")
    with pytest.raises(ValueError, match="attention must be one of auto, plain, fused, not 'flash'"):
        Recipe(attention="flash")
    assert plan_of("plain").config.attention == "plain"
