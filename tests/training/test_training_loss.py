"""The loss in chunks over the vocabulary is the plain loss, and the logits never exist at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_steps as ts
from hypothesis import given, settings
from hypothesis import strategies as st
from strength import campaign

import gpt2_jax
from gpt2_jax.training.loss import token_loss
from gpt2_jax.training.plan import make_plan
from gpt2_jax.training.step import make_eval_step

BOUNDS = {"float32": 4e-6, "float64": 1e-13}  # relative to the largest value
LONG = gpt2_jax.GPT2Config(n_vocab=50257, n_ctx=1021, n_embd=8, n_head=1, n_layer=1)


def plain(h_BTD, wte_VD, target_BT, weight_BT, chunk=None, mesh=None):
    """The definition, from all logits at once."""
    log_p_BTV = jax.nn.log_softmax(h_BTD @ wte_VD.T)
    return -(jnp.take_along_axis(log_p_BTV, target_BT[..., None], axis=-1)[..., 0] * weight_BT).sum()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@settings(max_examples=campaign(5, 12))
@given(data=st.data())
def test_chunks_give_the_plain_loss_and_gradients(dtype, data):
    """For any shape, any number of chunks, and any weights, including negative ones and all 0."""
    n_rows, n_tokens, width = (data.draw(st.integers(1, most)) for most in (4, 9, 7))
    n_vocab = data.draw(st.integers(1, 67))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    scale = data.draw(st.sampled_from([0.01, 1.0, 30.0]))
    kind = data.draw(st.sampled_from(["ones", "mask", "reals", "zeros"]))
    shape = (n_rows, n_tokens)
    chunk = data.draw(st.integers(1, n_rows * n_tokens * n_vocab + 1))
    with jax.enable_x64(dtype == "float64"):
        h = jnp.asarray(rng.normal(0, scale, (*shape, width)), dtype)
        wte = jnp.asarray(rng.normal(0, 1, (n_vocab, width)), dtype)
        target = jnp.asarray(rng.integers(0, n_vocab, shape), jnp.int32)
        weight = {"ones": np.ones(shape), "zeros": np.zeros(shape), "reals": rng.normal(size=shape)}
        weight = jnp.asarray(weight.get(kind, rng.integers(0, 2, shape)), jnp.float32)
        chunked = functools.partial(token_loss, chunk=chunk)
        ours, our_gradients = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(h, wte, target, weight)
        theirs, their_gradients = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(h, wte, target, weight)
        size = float(np.abs(np.asarray(weight)).sum()) * (1 + scale * width)
        assert abs(ours - theirs) <= BOUNDS[dtype] * size
        for one, other in zip(our_gradients, their_gradients, strict=True):
            assert one.dtype == other.dtype
            assert np.abs(one - other).max() <= BOUNDS[dtype] * size


def test_logits_that_would_overflow_do_not():
    """exp(1000) is infinite in float32; the loss is still the difference to the largest logit."""
    h = jnp.full((1, 2, 1), 1000.0)
    wte = jnp.linspace(-1, 1, 41)[:, None]
    target, weight = jnp.array([[40, 0]]), jnp.ones((1, 2))
    loss, gradients = jax.value_and_grad(token_loss, argnums=(0, 1))(h, wte, target, weight)
    np.testing.assert_allclose(loss, 2000, rtol=1e-6)
    assert all(jnp.isfinite(leaf).all() for leaf in gradients)


def test_the_logits_never_exist_at_once(monkeypatch):
    """A program with the plain loss needs more memory, by at least the size of the logits. Compiled, not run."""
    recipe = ts.recipe(batch_size=7)
    ours = ts.temporary(ts.compiled(recipe, LONG))
    monkeypatch.setattr("gpt2_jax.training.objective.token_loss", plain)
    theirs = ts.temporary(ts.compiled(recipe, LONG))
    logits = recipe.batch_size * LONG.n_ctx * LONG.n_vocab * 4
    assert theirs - ours >= logits


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_evaluation_is_the_plain_loss(dtype):
    """It never uses dropout. It is a sum, so that batches can be added up."""
    with jax.enable_x64(dtype == "float64"):
        recipe = ts.recipe(compute_dtype=dtype, model={"dropout": 0.5})
        config = ts.config_of(recipe)
        batch, params = ts.batch(recipe), ts.params_of(config)
        theirs = ts.plain_loss(config, params, batch)
        rows = jax.tree.map(lambda leaf: leaf[0], batch)
        nats, n_tokens = make_eval_step(make_plan(config, recipe))(params, rows)
        assert n_tokens == batch.weights.sum()
        np.testing.assert_allclose(nats / n_tokens, theirs, rtol=1e-6)
