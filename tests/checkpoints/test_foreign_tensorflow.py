"""TensorFlow checkpoints of training runs: optimizers' variables, one of several by name, version V1, other hparams."""

import json

import checkpoint_forms as forms
import foreign_models as foreign
import numpy as np
import pytest
from checkpoint_forms import CONFIG, assert_loads_as, variables_of, write_tensorflow

import gpt2_jax
from gpt2_jax.checkpoints import copies

pytestmark = pytest.mark.usefixtures("own_cache")


SLOTS = {  # of TensorFlow's optimizers, of BERT's, and of training loops
    "Adam": ["{}/Adam", "{}/Adam_1", "beta1_power", "beta2_power"],
    "under a scope": ["train/{}/Adam", "train/{}/Adam_1", "train/beta1_power"],
    "BERT's": ["{}/adam_m", "{}/adam_v"],
    "momentum": ["{}/Momentum"],
    "LAMB": ["{}/lamb_m", "{}/lamb_v"],
    "Adafactor's factors": ["{}/vr", "{}/vc"],
    "any other": ["{}/Ftrl", "{}/Ftrl_1"],
    "global_step": ["global_step"],
}


@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize("copy", [True, False])
def test_the_variables_of_an_optimizer_are_left_out(tmp_path, flat, slots, copy):
    """huggingface/transformers#16, #6467."""
    directory = write_tensorflow(tmp_path / "model", CONFIG, flat)
    variables = variables_of(flat)
    more = {slot.format(name): np.float32(3) * array for name, array in variables.items() for slot in slots}
    more |= {name: np.int64(7) for name in ("global_step",) if name in slots}
    forms.write_variables(directory / "model.ckpt", variables | more)
    for _ in range(2):
        assert_loads_as(directory, CONFIG, flat, keep_copy=copy)
        assert gpt2_jax.load_config(directory) == CONFIG


def test_counters_are_left_out(tmp_path, flat):
    """A GPT-2 has no scalars. One among the model's own variables is refused all the same."""
    directory = write_tensorflow(tmp_path / "model", CONFIG, flat)
    variables = variables_of(flat)
    forms.write_variables(directory / "model.ckpt", variables | {"counter": np.int32(3), "Variable_1": np.float32(2)})
    assert_loads_as(directory, CONFIG, flat)
    forms.write_variables(directory / "model.ckpt", variables | {"model/temperature": np.float32(2)})
    assert "extra: model/temperature" in forms.refusal(directory)


def test_an_optimizers_variables_alone_are_no_model(tmp_path, flat):
    directory = write_tensorflow(tmp_path / "model", CONFIG, flat)
    forms.write_variables(directory / "model.ckpt", {f"{k}/Adam": a for k, a in variables_of(flat).items()})
    assert "missing: model/wte" in forms.refusal(directory)


@pytest.fixture
def run(tmp_path, flat):
    """(folder, {step: flat}): a folder of gpt-2-simple with three checkpoints, of which the newest is named."""
    models = {step: forms.random_model(seed=step) for step in (500, 1000, 1500)}
    for step, model in models.items():
        write_tensorflow(tmp_path / "checkpoint" / "run1", CONFIG, model, prefix=f"model-{step}")
    return tmp_path / "checkpoint" / "run1", models


@pytest.mark.parametrize("suffix", ["", ".index", ".data-00000-of-00001"])
def test_one_of_several_checkpoints_by_its_name(run, suffix, monkeypatch):
    """minimaxir/gpt-2-simple#217."""
    folder, models = run
    for step in (1000, 500, 1000):
        assert_loads_as(f"{folder}/model-{step}{suffix}", CONFIG, models[step])
        assert gpt2_jax.load_config(folder / f"model-{step}{suffix}") == CONFIG
    assert_loads_as(folder, CONFIG, models[1500])
    assert len(list(copies.copy_path(folder).parent.iterdir())) == 1  # one copy a folder
    monkeypatch.chdir(folder)
    assert_loads_as("model-500", CONFIG, models[500])


def test_its_vocabulary_is_in_the_folder(run, model_dir):
    folder, _ = run
    config = json.loads((folder / "hparams.json").read_text()) | {"n_vocab": 1281}
    (folder / "hparams.json").write_text(json.dumps(config))
    forms.copy_vocabulary(model_dir, folder)
    assert gpt2_jax.load_tokenizer(folder / "model-500").n_vocab == 1281


def test_the_hparams_may_be_in_the_parent_folder(run):
    folder, models = run
    (folder / "hparams.json").rename(folder.parent / "hparams.json")
    assert_loads_as(folder / "model-1000", CONFIG, models[1000])
    (folder.parent / "hparams.json").unlink()
    assert "hparams.json" in forms.refusal(folder / "model-1000")


def test_several_checkpoints_and_none_named(run):
    folder, _ = run
    (folder / "checkpoint").unlink()
    assert "model-1000" in (said := forms.refusal(folder))
    assert "load one by its name" in said


def test_a_checkpoint_without_its_data_file(run):
    folder, _ = run
    (folder / "model-500.data-00000-of-00001").unlink()
    assert "model-500.data" in forms.refusal(folder / "model-500")
    assert "model-400" in forms.refusal(folder / "model-400")


@pytest.mark.parametrize("name", ["model.ckpt", "model-1000"])
@pytest.mark.parametrize("pointer", [True, False])
def test_version_1_of_tensorflows_checkpoints(tmp_path, flat, name, pointer):
    """One file without an index. It is no pickle, although its name may end in .ckpt."""
    directory = tmp_path / "model"
    foreign.write_v1(directory / name, variables_of(flat))
    (directory / "hparams.json").write_text(json.dumps(CONFIG.to_hparams()))
    if pointer:
        (directory / "checkpoint").write_text(f'model_checkpoint_path: "/there/{name}"\n')
    for source in (directory, directory / name, directory):
        assert_loads_as(source, CONFIG, flat)
        assert gpt2_jax.load_config(source) == CONFIG


def test_settings_of_training_in_hparams(tmp_path, flat):
    """nshepperd/gpt-2's fork and others add dropout rates and the like."""
    directory = write_tensorflow(tmp_path / "model", CONFIG, flat)
    more = {"res_dropout": 0.1, "attn_dropout": 0.1, "embd_pdrop": 0.1, "dtype": "float32", "batch_size": 4}
    (directory / "hparams.json").write_text(json.dumps(CONFIG.to_hparams() | more))
    assert_loads_as(directory, CONFIG, flat)
