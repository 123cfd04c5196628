"""Reading and writing OpenAI's TensorFlow checkpoints."""

import json
import shutil

import checkpoint_forms as forms
import jax
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax import GPT2Config
from gpt2_jax.params import flatten, unflatten

CONFIG = GPT2Config(n_vocab=37, n_ctx=11, n_embd=15, n_head=3, n_layer=2)
DATA = "model.ckpt.data-00000-of-00001"


@pytest.fixture(scope="module", autouse=True)
def _tensorflow():
    """Import TensorFlow once. Its own warnings are not errors."""
    forms.import_tensorflow()


@pytest.fixture
def params():
    """Random parameters, b and g too, so that no two are equal."""
    leaves, treedef = jax.tree.flatten(gpt2_jax.abstract_params(CONFIG))
    rng = np.random.default_rng(5)
    return treedef.unflatten([rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


@pytest.fixture
def directory(tmp_path, params):
    gpt2_jax.save(tmp_path / "model", CONFIG, params, format="tensorflow")
    return tmp_path / "model"


def write_variables(directory, variables):
    """Overwrite the checkpoint with any variables."""
    import tensorflow as tf

    prefix = str(directory / "model.ckpt")
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=list(variables),
        shape_and_slices=[""] * len(variables),
        tensors=list(variables.values()),
    )


def variables_of(params):
    return {f"model/{k}": v[None] if k.endswith("/w") else v for k, v in flatten(params).items()}


def test_every_variable_comes_back_bit_for_bit_and_untransposed(directory, params):
    config, loaded = gpt2_jax.load(directory)
    assert config == CONFIG
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for name, array in flatten(loaded).items():
        assert isinstance(array, jax.Array)
        np.testing.assert_array_equal(array, flatten(params)[name], err_msg=name)
    assert type(loaded["h0"]["attn"]) is dict


def test_the_embedded_model_is_read_as_tensorflow_reads_it(model_dir, shakespeare):
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(model_dir / "model.ckpt"))
    flat = flatten(shakespeare[1])
    assert {f"model/{name}" for name in flat} == set(reader.get_variable_to_shape_map())
    for name, array in flat.items():
        stored = reader.get_tensor(f"model/{name}")
        assert stored.shape == ((1, *array.shape) if name.endswith("/w") else array.shape)
        np.testing.assert_array_equal(stored.reshape(array.shape), array, err_msg=name)
    assert sum(array.size for array in flat.values()) == 3_553_024


def test_the_graph_and_the_vocabulary_are_not_needed(tmp_path, model_dir, shakespeare):
    for name in ("checkpoint", "hparams.json", DATA, "model.ckpt.index"):
        shutil.copy(model_dir / name, tmp_path)
    config, params = gpt2_jax.load(str(tmp_path))
    assert config == shakespeare[0]
    np.testing.assert_array_equal(params["wpe"], shakespeare[1]["wpe"])


def test_each_variable_is_visited_once(directory, monkeypatch):
    import tensorflow as tf

    visited = []

    class Reader:
        def __init__(self, path):
            self.reader = real(path)

        def __getattr__(self, name):
            return getattr(self.reader, name)

        def get_tensor(self, name):
            visited.append(name)
            return self.reader.get_tensor(name)

    real = tf.train.load_checkpoint
    monkeypatch.setattr(tf.train, "load_checkpoint", Reader)
    gpt2_jax.load(directory)
    assert sorted(visited) == sorted(f"model/{name}" for name in flatten(gpt2_jax.abstract_params(CONFIG)))


def test_the_pointer_is_followed_by_name_alone(directory):
    for path in directory.glob("model.ckpt.*"):
        path.rename(directory / path.name.replace("model.ckpt", "model-1000"))
    (directory / "checkpoint").write_text(
        'model_checkpoint_path: "/somewhere/else/run1/model-1000"\n', encoding="utf-8"
    )
    assert gpt2_jax.load(directory)[0] == CONFIG
    (directory / "checkpoint").write_text('model_checkpoint_path: "C:\\\\run1\\\\model-1000"\n', encoding="utf-8")
    assert gpt2_jax.load(directory)[0] == CONFIG
    (directory / "checkpoint").unlink()
    assert gpt2_jax.load(directory)[0] == CONFIG
    shutil.copy(directory / "model-1000.index", directory / "model-2000.index")
    with pytest.raises(ValueError, match=r"several checkpoints .model-1000, model-2000."):
        gpt2_jax.load(directory)
    (directory / "checkpoint").write_text("nothing here\n", encoding="utf-8")
    with pytest.raises(ValueError, match="names no checkpoint"):
        gpt2_jax.load(directory)


def test_missing_extra_and_misshaped_variables_are_all_named(directory, params):
    variables = variables_of(params)
    variables["model/h1/mlp/c_fc/kernel"] = variables.pop("model/h1/mlp/c_fc/w")
    variables["model/global_steps"] = np.int64(3)
    variables["model/h0/mlp/c_proj/w"] = variables["model/h0/mlp/c_proj/w"].transpose(0, 2, 1)
    variables["model/wpe"] = variables["model/wpe"].astype(np.float64)
    write_variables(directory, variables)
    with pytest.raises(ValueError, match="does not hold the GPT-2") as error:
        gpt2_jax.load(directory)
    assert set(str(error.value).split("\n  ")[1:]) == {
        "missing: model/h1/mlp/c_fc/w float32[1, 15, 60]",
        "extra: model/h1/mlp/c_fc/kernel float32[1, 15, 60]",
        "extra: model/global_steps int64[]",
        "misshaped: model/h0/mlp/c_proj/w is float32[1, 15, 60], expected float32[1, 60, 15]",
        "misshaped: model/wpe is float64[11, 15], expected float32[11, 15]",
    }


@pytest.mark.parametrize("name", ["hparams.json", "model.ckpt.index", DATA])
def test_a_missing_file_is_named(directory, name):
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.split("-")[0]):
        gpt2_jax.load(directory)


def test_a_missing_directory_is_named(tmp_path):
    for load in (gpt2_jax.load, gpt2_jax.load_tokenizer):
        with pytest.raises(FileNotFoundError, match=r"no such model: .*nowhere"):
            load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["model.ckpt.index", DATA])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_told(directory, name, keep):
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=r"model.ckpt is damaged and must be fetched again: .+") as error:
        gpt2_jax.load(directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", range(7))
def test_a_changed_byte_of_the_weights_is_told(directory, seed):
    content = bytearray((directory / DATA).read_bytes())
    place = np.random.default_rng(seed).integers(len(content))
    content[place] ^= 1 << seed
    (directory / DATA).write_bytes(bytes(content))
    with pytest.raises(ValueError, match="damaged"):
        gpt2_jax.load(directory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting"),
        ("[1]", "must be a mapping of names to numbers"),
        ("", "Expecting value"),
        ("[" * 99_999, "recursion"),
        (json.dumps(CONFIG.to_hparams() | {"n_layer": -1}), "n_layer must be a whole number, from 1 to"),
        (json.dumps(CONFIG.to_hparams() | {"experts": 1}), "unknown hyperparameters experts"),
    ],
)
def test_malformed_hparams_are_told_with_the_file(directory, text, message):
    (directory / "hparams.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"hparams\.json: .*{message}"):
        gpt2_jax.load(directory)
    (directory / "hparams.json").write_bytes(b"\xff{}")
    with pytest.raises(ValueError, match=r"hparams\.json"):
        gpt2_jax.load(directory)


def test_running_out_of_memory_is_not_called_damage(directory, monkeypatch):
    def fail(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(jax, "device_put", fail)
    with pytest.raises(RuntimeError, match=r"^RESOURCE_EXHAUSTED"):
        gpt2_jax.load(directory)


def test_a_path_that_tensorflow_takes_for_a_pattern_is_told(directory):
    odd = directory.rename(directory.with_name("mo[d]el"))
    with pytest.raises(ValueError, match=r"TensorFlow treats \[ in a path as a pattern"):
        gpt2_jax.load(odd)


def test_a_pointer_is_a_name_and_no_pattern(directory):
    (directory / "checkpoint").write_text('model_checkpoint_path: "mod*"\n', encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"mod\*\.index"):
        gpt2_jax.load(directory)


def test_a_directory_must_be_a_path():
    for load in (gpt2_jax.load, gpt2_jax.load_config, gpt2_jax.load_tokenizer):
        for wrong in (None, 3, b"x"):
            with pytest.raises(ValueError, match="must be named by a path"):
                load(wrong)


def test_the_config_alone(directory):
    (directory / DATA).unlink()
    assert gpt2_jax.load_config(directory) == CONFIG


def test_an_absurd_number_of_layers_is_told_at_once(directory):
    (directory / "hparams.json").write_text(json.dumps(CONFIG.to_hparams() | {"n_layer": 10**9}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"n_layer = 1000000000, but .*model.ckpt has 28 variables"):
        gpt2_jax.load(directory)


def test_writing_refuses_what_it_could_not_read_and_leaves_nothing_behind(tmp_path, params):
    wrong = flatten(params)
    wrong["wte"] = wrong["wte"][:-1]
    with pytest.raises(ValueError, match="misshaped: wte"):
        gpt2_jax.save(tmp_path / "model", CONFIG, unflatten(wrong), format="tensorflow")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, params, monkeypatch):
    import tensorflow as tf

    def fail(**_):
        raise OSError("no space left on device")

    monkeypatch.setattr(tf.raw_ops, "SaveV2", fail)
    with pytest.raises(OSError, match="no space"):
        gpt2_jax.save(tmp_path / "model", CONFIG, params, format="tensorflow")
    assert list(tmp_path.iterdir()) == []


def test_tensorflow_reads_what_was_written_under_the_original_names(directory, params):
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(directory))
    for name, array in variables_of(params).items():
        np.testing.assert_array_equal(reader.get_tensor(name), array)
    assert json.loads((directory / "hparams.json").read_text()) == CONFIG.to_hparams()
