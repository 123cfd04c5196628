"""The moving average of the weights, and the scale of a float16 loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_steps as ts

import gpt2_jax
from gpt2_jax import training
from gpt2_jax.params import flatten
from gpt2_jax.recipe import from_dict
from gpt2_jax.training import step as steps
from gpt2_jax.training.checkpoints import Checkpoints
from gpt2_jax.training.state import LossScale

EMA = {"learning_rate": 0.02, "ema": 0.3}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


# ---- the average


@pytest.mark.parametrize("lora", [{}, {"rank": 2}], ids=["full", "lora"])
def test_the_average_is_its_definition(x64, lora):
    recipe = ts.recipe(compute_dtype="float64", optimizer=EMA, lora=lora)
    state = ts.begin(recipe)
    plan = training.make_plan(ts.config_of(recipe), recipe)
    expected = {name: np.array(leaf) for name, leaf in state.trained(plan.trained).items()}
    for number in range(5):
        state, _ = ts.train_step(recipe)(state, ts.batch(recipe, number))
        decay = min(0.3, (1 + number) / (10 + number))
        trained = state.trained(plan.trained)
        expected = {name: decay * mean + (1 - decay) * np.asarray(trained[name]) for name, mean in expected.items()}
    assert set(state.average) == set(expected)
    for name, mean in expected.items():
        np.testing.assert_allclose(state.average[name], mean, rtol=0, atol=1e-14)  # measured: 2e-16
    averaged = training.model_params(state.averaged(), recipe)
    assert ts.furthest(ts.flat(averaged), ts.flat(training.model_params(state, recipe))) > 1e-4


def test_a_skipped_step_leaves_the_average():
    recipe = ts.recipe(optimizer=EMA)
    state, _ = ts.run(recipe, [ts.batch(recipe, 0)])
    before = ts.bits(state.average)
    nothing = dataclasses.replace(ts.batch(recipe, 1), weights=np.zeros_like(ts.batch(recipe, 1).weights))
    state, metrics = ts.train_step(recipe)(state, nothing)
    assert metrics["skipped"]
    assert ts.bits(state.average) == before


def run_recipe(**changes):
    monitor = {
        "evaluate_every": 2,
        "sample_every": 0,
        "save_every": 2,
        "tensorboard": False,
        **changes.pop("monitor", {}),
    }
    optimizer = {"learning_rate": 0.02, "schedule": "constant", "ema": 0.9}
    fields = {"steps": 4, "batch_size": 2, "data": {"n_tokens": 16}, "model": {"dropout": 0.0}, "mesh": {"data": 1}}
    return from_dict(training.Recipe, fields | {"monitor": monitor, "optimizer": optimizer} | changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("".join(f"The {i % 7} of thee and the {i * i % 11}.\n" for i in range(60)), encoding="utf-8")
    tokenizer = gpt2_jax.load_tokenizer("shakespeare")
    return training.prepare([path], path.with_name("tokens"), tokenizer, split="tail"), tokenizer


def fitted(run_dir, recipe, data):
    config = gpt2_jax.GPT2Config(1281, 16, 12, 3, 1)
    plan = training.make_plan(config, recipe)
    return plan, training.fit(plan, training.new_params(config, 0), data[0], run_dir, data[1])


@pytest.mark.parametrize("lora", [{}, {"rank": 2}], ids=["full", "lora"])
def test_best_checkpoints_and_the_result_have_the_average(tmp_path, data, lora):
    recipe = run_recipe(lora=lora)
    plan, result = fitted(tmp_path / "run", recipe, data)
    state = Checkpoints(tmp_path / "run").restore(plan.state, 4)
    average = flatten(training.model_params(state.averaged(), recipe))
    assert ts.furthest(average, flatten(training.model_params(state, recipe))) > 1e-4
    found = {
        "the result": result.params,
        "a checkpoint": gpt2_jax.load(tmp_path / "run" / "checkpoints" / "4")[1],
        "the best model": gpt2_jax.load(tmp_path / "run" / "best")[1],
    }
    assert result.best_step == 4
    for what, params in found.items():
        assert ts.furthest(flatten(params), average) <= 1e-6, what  # measured: 0


def test_a_run_with_an_average_resumes_bit_for_bit(tmp_path, data):
    recipe = run_recipe()
    _, whole = fitted(tmp_path / "whole", recipe, data)
    fitted(tmp_path / "parts", dataclasses.replace(recipe, steps=2), data)
    _, resumed = fitted(tmp_path / "parts", recipe, data)
    assert ts.bits(resumed.params) == ts.bits(whole.params)


# ---- float16


def test_float16_gradients_are_those_of_float32():
    batch = ts.batch(ts.recipe(), 3)
    found = {}
    for dtype in ("float32", "float16"):
        recipe = ts.recipe(compute_dtype=dtype, optimizer={"name": "sgd", "learning_rate": 1.0, "momentum": 0.0})
        before = ts.flat(ts.params_of(ts.config_of(recipe)))
        state, (metrics,) = ts.run(recipe, [batch])
        found[dtype] = {name: before[name] - leaf for name, leaf in ts.flat(state.params).items()}
        found[dtype]["loss"] = metrics["loss"]
        found[dtype]["norm"] = metrics["grad_norm"]
    largest = max(np.abs(array).max() for array in found["float32"].values())
    assert ts.furthest(found["float16"], found["float32"]) <= 1e-3 * largest  # measured: 2.0e-4


def test_after_an_overflow_the_step_is_skipped_and_the_scale_is_halved():
    recipe = ts.recipe(compute_dtype="float16")
    state = ts.begin(recipe)
    assert float(state.loss_scale.value) == 2.0**16
    huge = dataclasses.replace(state, loss_scale=LossScale(jnp.float32(2.0**24), jnp.int32(7)))
    before = ts.bits(huge.params)
    state, metrics = ts.train_step(recipe)(huge, ts.batch(recipe, 3))
    assert metrics["skipped"]
    assert ts.bits(state.params) == before
    assert (float(state.loss_scale.value), int(state.loss_scale.n_good)) == (2.0**23, 0)
    for _ in range(12):
        state, metrics = ts.train_step(recipe)(state, ts.batch(recipe, 3))
    assert not metrics["skipped"]
    assert 1 < float(state.loss_scale.value) < 2.0**23
    assert ts.bits(state.params) != before


def test_the_scale_doubles_after_enough_steps_and_has_limits():
    def after(value, n_good, overflowed):
        new = steps._next_scale(LossScale(jnp.float32(value), jnp.int32(n_good)), jnp.asarray(overflowed))
        return float(new.value), int(new.n_good)

    assert after(4, 5, False) == (4, 6)
    assert after(4, steps.GOOD_STEPS - 1, False) == (8, 0)
    assert after(2.0**24, steps.GOOD_STEPS - 1, False) == (2.0**24, 0)
    assert after(4, 5, True) == (2, 0)
    assert after(1, 5, True) == (1, 0)


def test_a_run_in_float16_goes_on_after_overflows_and_resumes_bit_for_bit(tmp_path, data, capfd, monkeypatch):
    monkeypatch.setattr("gpt2_jax.training.state.FIRST_SCALE", 2.0**24)  # so that the first steps overflow
    recipe = run_recipe(compute_dtype="float16", steps=12, monitor={"save_every": 5})
    _, whole = fitted(tmp_path / "whole", recipe, data)
    told = capfd.readouterr().err
    assert "step 1 changed nothing: a float16 number overflowed; the loss scale was 16,777,216" in told
    assert whole.step == 12
    assert not whole.failed
    fitted(tmp_path / "parts", dataclasses.replace(recipe, steps=5), data)
    _, resumed = fitted(tmp_path / "parts", recipe, data)
    assert ts.bits(resumed.params) == ts.bits(whole.params)
    assert whole.best_loss < 7.16  # ln 1281 = 7.155 at the start
