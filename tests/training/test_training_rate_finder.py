"""The learning rate range test."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import training_steps as ts

import gpt2_jax
from gpt2_jax import training
from gpt2_jax.added_tokens import with_tokens
from gpt2_jax.commands import train
from gpt2_jax.training.rate_finder import find_learning_rate, running_mean, steepest

CONFIG = gpt2_jax.GPT2Config(1281, 16, 12, 3, 1)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("".join(f"The {i % 7} of thee and the {i * i % 11}.\n" for i in range(60)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(text):
    tokenizer = gpt2_jax.load_tokenizer("shakespeare")
    return training.prepare([text], text.with_name("tokens"), tokenizer, split="tail")


def test_the_running_mean_is_a_weighted_mean_of_all_losses():
    losses = np.random.default_rng(0).normal(3, 1, 20)
    weights = 0.8 ** np.arange(20)[::-1]
    np.testing.assert_allclose(running_mean(losses)[-1], (weights * losses).sum() / weights.sum(), rtol=1e-13)
    np.testing.assert_allclose(running_mean([2.5] * 7), 2.5, rtol=1e-13)


def test_the_suggested_rate_is_where_the_loss_falls_fastest():
    rates = np.geomspace(1e-6, 1, 61)
    losses = 3 - np.tanh(2 * np.log10(rates / 1e-3)) + np.where(rates > 0.1, 50 * rates, 0)
    assert steepest(rates, losses) == pytest.approx(1e-3)
    assert steepest(rates, np.where(rates > 0.2, math.nan, losses)) == pytest.approx(1e-3)
    by_chance = losses + np.array([3.0, 1.0, 2.0, 0.5] + [0.0] * 57)  # the first batches differ
    assert steepest(rates, by_chance) == pytest.approx(1e-3)
    with pytest.raises(ValueError, match="the loss never fell: a learning rate cannot be suggested"):
        steepest(rates, np.linspace(1, 2, 61))
    with pytest.raises(ValueError, match="the loss is not a finite number at the start"):
        steepest(rates, np.full(61, math.nan))


def test_each_step_has_its_rate_and_the_test_ends_when_the_loss_diverges(data):
    recipe = ts.recipe(batch_size=2, data={"n_tokens": 16}, optimizer={"name": "sgd", "momentum": 0.0})
    plan = training.make_plan(CONFIG, recipe)
    params = training.new_params(CONFIG, 0)
    test = find_learning_rate(plan, params, data, lowest=1e-3, highest=1e4, n_steps=30)
    np.testing.assert_allclose(test.rates, np.geomspace(1e-3, 1e4, 30)[: len(test.rates)], rtol=1e-12)
    assert 10 < len(test.rates) < 30
    assert not math.isfinite(test.losses[-1]) or test.means[-1] > 4 * test.means.min()
    assert 1e-3 < test.suggested < 1e3
    assert ts.bits(params) == ts.bits(training.new_params(CONFIG, 0))  # they are not changed

    # The losses are those of a run with these rates.
    state, stream = training.init_state(plan, params), training.batches(data.train, 16, 2, recipe.seed)
    for number in range(8):
        at = dataclasses.replace(plan, schedule=lambda step, rate=test.rates[number]: rate + 0 * step)
        batch = jax.tree.map(lambda array: array[None], next(stream))
        state, metrics = training.make_train_step(at)(state, batch)
        assert float(metrics["loss"]) == pytest.approx(test.losses[number], rel=1e-6)  # measured: 0
    stream.close()


def test_an_added_token_without_a_row_does_not_matter_if_the_data_has_none(text, data):
    tokenizer = with_tokens(gpt2_jax.load_tokenizer("shakespeare"), ["<|user|>"])
    more = training.prepare([text], text.with_name("more"), tokenizer, split="tail")
    plan = training.make_plan(CONFIG, ts.recipe(batch_size=2, data={"n_tokens": 16}))
    params = training.new_params(CONFIG, 0)
    test = find_learning_rate(plan, params, more, lowest=1e-3, n_steps=10, tokenizer=tokenizer)
    expected = find_learning_rate(plan, params, data, lowest=1e-3, n_steps=10)
    np.testing.assert_array_equal(test.losses, expected.losses)


def test_the_command_prints_the_rate_and_draws_the_losses(tmp_path, text, capsys):
    run = tmp_path / "run"
    options = ["--data.path", str(text), "--run", str(run), "--model.source", "", "--model.tokenizer", "shakespeare"]
    options += ["--model.n-layer", "1", "--model.n-embd", "12", "--model.n-head", "3", "--model.n-ctx", "16"]
    options += ["--monitor.sample-every", "0", "--batch-size", "2", "--steps", "2"]
    options += ["--data.val-path", str(text), "--monitor.patience", "3"]  # the test validates nothing
    train.main([*options, "--find-learning-rate"])
    printed = capsys.readouterr()
    assert 1e-6 < float(printed.out) < 1
    assert (run / "learning_rate.png").read_bytes().startswith(b"\x89PNG")
    train.main(options)  # the folder is free for the run, whose text is ready
    assert (run / "checkpoints" / "2").is_dir()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main([*options, "--find-learning-rate"])
    assert stopped.value.code == 2
    assert "has a run that has begun: choose another folder to try learning rates" in capsys.readouterr().err
