"""A training run can be named as a model: its best, else its newest checkpoint, or a given checkpoint."""

import re
import shutil
from pathlib import Path

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_params
from train_states import abstract, assert_same

import gpt2_jax
from gpt2_jax import checkpoints, inspection
from gpt2_jax.checkpoints.integrity import DamagedError
from gpt2_jax.checkpoints.runs import write_run
from gpt2_jax.commands import convert, generate, inspect
from gpt2_jax.lora import init_lora, merge_lora
from gpt2_jax.params import flatten
from gpt2_jax.recipe import Lora, Recipe
from gpt2_jax.training.checkpoints import Checkpoints
from gpt2_jax.training.step import TrainState

ALPHA = 7.0


@pytest.fixture(scope="module")
def config(tokenizer):
    return gpt2_jax.GPT2Config(tokenizer.n_vocab, n_ctx=31, n_embd=12, n_head=3, n_layer=2)


def state_of(params, lora=None):
    moments = jax.tree.map(jnp.ones_like, params)
    return TrainState(jnp.int32(3), params, lora, (moments, moments), jnp.float32(2))


def make_run(folder, config, tokenizer, states, recipe=None):
    write_run(folder, config.replace(compute_dtype="bfloat16"), recipe or Recipe(), {}, tokenizer)
    with Checkpoints(folder, keep=9) as saved:
        for step, state in states.items():
            saved.save(step, state)
    return folder


@pytest.fixture(scope="module")
def run(config, tokenizer, tmp_path_factory):
    """A run with checkpoints of steps 9 and 10. The step is the seed of the params."""
    states = {step: state_of(random_params(config, step)) for step in (9, 10)}
    return make_run(tmp_path_factory.mktemp("folder") / "run", config, tokenizer, states)


def test_the_newest_checkpoint_until_there_is_a_best(run, config, tokenizer, tmp_path):
    assert gpt2_jax.load_config(run) == config
    found, params = gpt2_jax.load(run)
    assert found == config
    assert_same(params, random_params(config, 10))
    run = shutil.copytree(run, tmp_path / "r[un]")
    gpt2_jax.save(run / "best", config, random_params(config, 3), format="orbax", tokenizer=tokenizer)
    for source in (run, run / "best"):
        found, params = gpt2_jax.load(source)
        assert found == config == gpt2_jax.load_config(source)
        assert_same(params, random_params(config, 3))
        assert gpt2_jax.load_tokenizer(source).tokens == tokenizer.tokens


def test_a_checkpoint_by_name_and_from_within(run, config, tokenizer, monkeypatch):
    assert_same(gpt2_jax.load(run / "checkpoints" / "9")[1], random_params(config, 9))
    assert gpt2_jax.load_tokenizer(run / "checkpoints" / "9").tokens == tokenizer.tokens
    assert checkpoints.has_vocabulary(run / "checkpoints" / "9")
    monkeypatch.chdir(run / "checkpoints" / "9")
    assert_same(gpt2_jax.load(".")[1], random_params(config, 9))
    assert gpt2_jax.load_config(".") == config


def test_dtype_and_sharding_as_for_any_model(run, config):
    found, params = gpt2_jax.load(run, dtype="bfloat16", sharding=jax.devices()[0])
    assert found == config.replace(param_dtype="bfloat16")
    expected = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), random_params(config, 10))
    assert_same(params, expected)


def test_lora_is_merged(config, tokenizer, tmp_path):
    params, recipe = random_params(config, 5), Recipe(lora=Lora(rank=3, alpha=ALPHA))
    lora = init_lora(params, 3, recipe.lora.targets, jax.random.key(1))
    lora = jax.tree.map(lambda leaf: leaf + 0.5, lora)
    run = make_run(tmp_path / "run", config, tokenizer, {4: state_of(params, lora)}, recipe)
    found, merged = flatten(gpt2_jax.load(run)[1]), flatten(merge_lora(params, lora, ALPHA))
    assert found.keys() == merged.keys()
    for name, leaf in flatten(params).items():
        np.testing.assert_array_equal(found[name], merged[name], strict=True)
        assert np.array_equal(found[name], leaf) == (name not in lora)
    name = "h1/attn/c_attn/w"
    expected = np.float64(flatten(params)[name]) + ALPHA / 3 * np.float64(lora[name]["a"]) @ np.float64(lora[name]["b"])
    np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-6)


def test_saved_on_eight_devices_loaded_on_one(config, tokenizer, tmp_path):
    write_run(tmp_path, config, Recipe(), {}, tokenizer)
    code = """
        import json, sys, jax
        from gpt2_jax.training.checkpoints import Checkpoints
        sys.path.append(sys.argv[2])
        from test_load_runs import state_of, random_params
        from gpt2_jax.checkpoints.runs import read_run
        from train_states import on_mesh

        params = random_params(read_run(sys.argv[1]).config, 11)
        with Checkpoints(sys.argv[1]) as checkpoints:
            checkpoints.save(2, on_mesh(state_of(params), 8))
        print(json.dumps(len(jax.devices())))
    """
    assert commands.on_eight_devices(code, tmp_path, Path(__file__).parent) == 8
    assert_same(gpt2_jax.load(tmp_path)[1], random_params(config, 11))


def test_a_run_called_as_a_size_is_a_run(run, config, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "124M")
    monkeypatch.chdir(tmp_path)
    assert_same(gpt2_jax.load("124M")[1], random_params(config, 10))
    assert gpt2_jax.load_config("124M") == config


def test_the_commands_take_a_run(run, config, tmp_path, capfd):
    done = commands.caller(convert.main, capfd)(run, tmp_path / "out", "--format", "huggingface")
    assert (done.code, done.out) == (0, f"{tmp_path / 'out'}\n")
    assert_same(gpt2_jax.load(tmp_path / "out")[1], random_params(config, 10))
    assert checkpoints.has_vocabulary(tmp_path / "out")
    done = commands.caller(inspect.main, capfd)(run)
    assert done.code == 0
    assert "checkpoint form" in done.out
    with commands.config_of_jax_kept():
        args = ("--model", run, "--prompt", "O", "--max-new-tokens", 3, "--seed", 0)
        done = commands.caller(generate.main, capfd)(*args)
    assert done.code == 0
    assert done.out.startswith("O")


def test_what_inspection_says_of_the_files(run):
    directory = checkpoints.locate(run)
    assert directory == run / "checkpoints" / "10"
    report = inspection.report(directory, *gpt2_jax.load(run))
    assert report["form"] == "checkpoint"
    assert {file["name"]: file["used"] for file in report["files"] if file["purpose"]} == {
        "checkpoint.json": True, "params/": True, "trainer/": False, "_CHECKPOINT_METADATA": False,
        "orbax.checkpoint": False, "commit_success.txt": False,
    }  # fmt: skip
    assert len(report["files"]) == 6
    assert report["vocabulary"]["missing"] is None


def test_a_run_without_a_model_yet(config, tokenizer, tmp_path):
    write_run(tmp_path, config, Recipe(), {}, tokenizer)
    (tmp_path / "checkpoints" / ".3.saving").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="saved no model yet"):
        gpt2_jax.load(tmp_path)
    assert gpt2_jax.load_tokenizer(tmp_path).n_vocab == config.n_vocab


@pytest.mark.parametrize("damage", ["checkpoint.json", "params", "params/wte/zarr.json"])
def test_damage_is_told_and_nothing_else_is_taken(run, tmp_path, damage):
    run = shutil.copytree(run, tmp_path / "run")
    path = run / "checkpoints" / "10" / damage
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DamagedError, match=r"checkpoints/10 is damaged: .*missing"):
        gpt2_jax.load(run)


def test_damage_to_the_optimizer_is_none_of_the_models(run, config, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "10" / "trainer")
    assert_same(gpt2_jax.load(run)[1], random_params(config, 10))


def test_what_does_not_belong_together_is_told(run, config, tokenizer, tmp_path):
    shutil.copytree(run / "checkpoints" / "10", tmp_path / "alone")
    with pytest.raises(FileNotFoundError, match=r"holds no run\.json"):
        gpt2_jax.load(tmp_path / "alone")
    write_run(tmp_path / "run", config.replace(n_layer=3), Recipe(), {}, tokenizer)
    shutil.copytree(run / "checkpoints", tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match=rf"{re.escape('run.json')}: missing: h2/"):
        gpt2_jax.load(tmp_path / "run")
    write_run(tmp_path / "other", config.replace(n_vocab=5), Recipe(), {}, tokenizer)
    with pytest.warns(UserWarning, match="n_vocab = 5"):
        gpt2_jax.load_tokenizer(tmp_path / "other")


def test_another_programs_run_json_makes_no_run(run, config, tmp_path):
    gpt2_jax.save(tmp_path / "model", config, random_params(config, 1), format="huggingface")
    (tmp_path / "model" / "run.json").write_text('{"id": 3}')
    assert_same(gpt2_jax.load(tmp_path / "model")[1], random_params(config, 1))


def test_restored_and_loaded_are_the_same(run, config):
    state = state_of(random_params(config, 10))
    assert_same(Checkpoints(run).restore(abstract(state)), state)
