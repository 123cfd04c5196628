"""`load` of a run that trains: its best model is replaced, and its old checkpoints are removed, while they are read."""

import shutil
import threading

import numpy as np
import pytest
from tiny_models import random_params

import gpt2_jax
from gpt2_jax.checkpoints import loading, orbax, run_weights
from gpt2_jax.checkpoints.integrity import DamagedError
from gpt2_jax.checkpoints.runs import write_run
from gpt2_jax.files import put_in_place
from gpt2_jax.params import flatten
from gpt2_jax.recipe import Recipe
from gpt2_jax.training.checkpoints import Checkpoints
from gpt2_jax.training.plan import make_plan
from gpt2_jax.training.step import init_state

CONFIG = gpt2_jax.GPT2Config(n_vocab=37, n_ctx=31, n_embd=12, n_head=3, n_layer=2)


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run", CONFIG, Recipe(), {})
    return tmp_path / "run"


def is_model(params, seed):
    theirs = flatten(random_params(CONFIG, seed))
    return all(np.array_equal(leaf, theirs[name]) for name, leaf in flatten(params).items())


def save(run, seed):
    gpt2_jax.save(run / "best", CONFIG, random_params(CONFIG, seed), "orbax")


@pytest.fixture
def meanwhile(monkeypatch):
    """meanwhile(module, act): call `act` after the first `n_leaves` leaves that the module reads."""

    def call(form, module, act, n_leaves=3):
        calls = []

        def read(path):
            config, leaves = module.read(path, loading.open_leaves)
            calls.append(path)

            def some():
                for i, leaf in enumerate(leaves):
                    if len(calls) == 1 and i == n_leaves:
                        act()
                    yield leaf

            return config, some()

        monkeypatch.setitem(loading.READERS, form, lambda path, _: read(path))
        return calls

    return call


def test_a_best_model_that_is_replaced_as_it_is_read_is_read_again(run, meanwhile):
    save(run, 1)
    calls = meanwhile("orbax", orbax, lambda: save(run, 2))
    assert is_model(gpt2_jax.load(run)[1], 2)
    assert len(calls) == 2


def test_a_checkpoint_that_is_removed_as_it_is_read_gives_the_next(run, meanwhile):
    plan = make_plan(CONFIG, Recipe(batch_size=8))
    with Checkpoints(run) as checkpoints:
        checkpoints.save(1, init_state(plan, random_params(CONFIG, 1)), wait=True)
        saved = init_state(plan, random_params(CONFIG, 2))
        calls = meanwhile("checkpoint", run_weights, lambda: checkpoints.save(2, saved, wait=True), n_leaves=0)
        assert is_model(gpt2_jax.load(run)[1], 2)
    assert [path.name for path in calls] == ["1", "2"]


def test_damage_is_no_replacement(run, meanwhile):
    save(run, 1)

    def damage():
        manifest = run / "best" / orbax.MANIFEST
        manifest.write_text(manifest.read_text().replace("a", "b"))

    damage()
    calls = meanwhile("orbax", orbax, lambda: None)
    with pytest.raises(DamagedError):
        gpt2_jax.load(run)
    assert calls == []


def test_real_renames_in_a_thread(run, tmp_path):
    """Every load gives one of the two models."""
    models = {seed: tmp_path / f"model{seed}" for seed in (1, 2)}
    for seed, folder in models.items():
        save(run, seed)
        shutil.copytree(run / "best", folder)
    ended = threading.Event()

    def replace():
        while not ended.wait(0.02):  # about as long as one load
            for folder in models.values():
                new = shutil.copytree(folder, run / f".best.{'0a' * 16}")
                put_in_place(new, run / "best")
                shutil.rmtree(new)
                ended.wait(0.02)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(40):
            params = gpt2_jax.load(run)[1]
            assert is_model(params, 1) or is_model(params, 2)
            assert gpt2_jax.load_config(run) == CONFIG
    finally:
        ended.set()
        thread.join()
