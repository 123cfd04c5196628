"""recipe.epochs: how many steps they are, and what the run says about them."""

import json
import math

import commands
import jax
import numpy as np
import pytest
import tiny_runs
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import CONFIG, params, small

from gpt2_jax.recipe import Recipe
from gpt2_jax.training import fit, init_state, make_plan, make_train_step
from gpt2_jax.training.epochs import n_per_epoch, steps_of, with_steps

pytestmark = pytest.mark.usefixtures("compiled_once")

NO_STEPS = {"steps": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    return tiny_runs.prepared(
        tmp_path_factory.mktemp("text"), tokenizer, tiny_runs.TEXT[:400], val_fraction=0, split="auto"
    )


@given(n=st.integers(1, 10**7), tenths=st.integers(1, 99), batch=st.integers(1, 64))
def test_steps_are_rounded_up_once(n, tenths, batch):
    """Exactly: 0.1 * 30 is more than 3 in floats."""
    assert steps_of(Recipe(epochs=tenths / 10, batch_size=batch), n) == max(1, -(-n * tenths // (10 * batch)))


def test_steps_and_epochs_are_not_both_set():
    with pytest.raises(ValueError, match="epochs must be 0 if steps is set"):
        Recipe(steps=10, epochs=1)
    with pytest.raises(ValueError, match="epochs must be a number, 0 or more"):
        Recipe(epochs=-1)
    assert make_plan(CONFIG, Recipe(model=small().model)).recipe.steps == 1000
    assert make_plan(CONFIG, Recipe(steps=7)).recipe.steps == 7


def test_epochs_train_as_many_steps_as_they_are(tmp_path, data, capfd):
    """The run, its learning rates and run.json are those of the same steps; the same command resumes it."""
    plan = make_plan(CONFIG, small(**NO_STEPS, epochs=1.5, optimizer={"schedule": "cosine", "learning_rate": 0.01}))
    n = n_per_epoch(plan, data)
    assert n == math.ceil((data.train.n_tokens - 1) / 11) > 9
    n_steps = math.ceil(1.5 * n / 3)
    fitted = fit(plan, params(), data, tmp_path / "run")
    err = capfd.readouterr().err
    assert fitted.step == n_steps
    assert f"{n_steps} steps are {n_steps * 3 / n:.4g} epochs of {n} rows" in err
    told = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]
    assert (told["steps"], "epochs" in told) == (n_steps, False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == pytest.approx([step * 3 / n for step in range(1, n_steps + 1)])
    steps = make_plan(CONFIG, small(steps=n_steps, optimizer={"schedule": "cosine", "learning_rate": 0.01}))
    straight = fit(steps, params(), data, tmp_path / "straight")
    jax.tree.map(np.testing.assert_array_equal, fitted.params, straight.params)
    capfd.readouterr()
    assert fit(plan, params(), data, tmp_path / "run").step == n_steps
    assert f"all {n_steps} steps are done" in capfd.readouterr().err


def test_a_loop_of_ones_own_is_told_to_set_steps(data):
    plan = make_plan(CONFIG, small(**NO_STEPS, epochs=2))
    batch = jax.tree.map(lambda leaf: np.zeros((1, *leaf.shape[1:]), leaf.dtype), next(iter_batch(plan, data)))
    with pytest.raises(ValueError, match="epochs must be turned into steps"):
        make_train_step(plan)(init_state(plan, params()), batch)
    assert with_steps(plan, 30).recipe.steps == 20


def iter_batch(plan, data):
    from gpt2_jax.training import batches

    stream = batches(data.train, plan.n_tokens, plan.recipe.batch_size, 0)
    try:
        yield jax.tree.map(lambda array: array[None], next(stream))
    finally:
        stream.close()


def test_an_option_replaces_the_other_one_of_the_recipe(tmp_path):
    (tmp_path / "steps.toml").write_text("steps = 120\n")
    (tmp_path / "epochs.toml").write_text("epochs = 3\n")
    for name, options, steps, epochs in (
        ("steps", (), 120, 0),
        ("steps", ("--epochs", "1.5"), 0, 1.5),
        ("epochs", ("--steps=70",), 70, 0),
        ("epochs", (), 0, 3),
    ):
        recipe = commands.parse("gpt2-train", "--config", str(tmp_path / f"{name}.toml"), *options).recipe
        assert (recipe.steps, recipe.epochs) == (steps, epochs)
    with pytest.raises(ValueError, match="epochs must be 0 if steps is set"):
        commands.parse("gpt2-train", "--steps", "3", "--epochs", "3")
