"""Weights from other tools, and changes to files during a load or a save."""

import json
import warnings

import checkpoint_forms as forms
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_forms import CONFIG, FORMATS

import gpt2_jax
from gpt2_jax.checkpoints import ahead, copies, saving
from gpt2_jax.checkpoints import safetensors as reader


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    forms.import_tensorflow()
    monkeypatch.setenv("GPT2_JAX_CACHE", str(tmp_path / "cache"))


def export(directory, flat, **options):
    gpt2_jax.save(directory, CONFIG, forms.nested(flat), format="huggingface", **options)
    return directory


def test_a_file_replaced_while_it_is_read_is_told(tmp_path, flat, monkeypatch):
    """A load must not mix the halves of two models."""
    directory = forms.write_huggingface(tmp_path / "model", CONFIG, forms.hf_tensors(flat))
    other = forms.write_huggingface(tmp_path / "other", CONFIG, forms.hf_tensors(forms.random_model(seed=7)))
    monkeypatch.setattr(ahead, "N_THREADS", 1)
    read_bytes, n_read = reader._read_bytes, []

    def read_then_replace(*args):
        n_read.append(1)
        if len(n_read) == 9:
            (other / "model.safetensors").replace(directory / "model.safetensors")
        return read_bytes(*args)

    monkeypatch.setattr(reader, "_read_bytes", read_then_replace)
    with pytest.raises(ValueError, match=r"model\.safetensors was replaced or written to while it was read"):
        gpt2_jax.load(directory)


@pytest.mark.parametrize("there", ["a model", "nothing"])
def test_what_appears_during_a_save_is_not_lost(tmp_path, flat, monkeypatch, there):
    model = tmp_path / "model"
    if there == "a model":
        export(model, flat)
    write = saving.WRITERS["huggingface"]

    def write_and_drop_in(*args):
        write(*args)
        model.mkdir(exist_ok=True)
        (model / "thesis.txt").write_text("7")

    monkeypatch.setitem(saving.WRITERS, "huggingface", write_and_drop_in)
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        export(model, forms.random_model(seed=7))
    assert (model / "thesis.txt").read_text() == "7"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_another_architectures_model_is_not_replaced(tmp_path, flat):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    safetensors.numpy.save_file({"x": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(FileExistsError, match=r"config\.json, model\.safetensors"):
        export(tmp_path, flat)
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "bert"}


@pytest.mark.parametrize("format", FORMATS)
def test_arrays_of_the_other_byte_order_are_saved_right(tmp_path, flat, format):
    params = forms.nested({name: array.astype(">f4") for name, array in flat.items()})
    gpt2_jax.save(tmp_path / "model", CONFIG, params, format=format)
    assert forms.difference(gpt2_jax.load(tmp_path / "model")[1], flat) == ""


@pytest.mark.parametrize(("n_vocab", "end"), [(37, 36), (50257, 50256), (50304, 50256)])
def test_the_end_of_text_without_a_vocabulary(tmp_path, n_vocab, end):
    """Added rows of the embedding have ids after `<|endoftext|>`."""
    config = CONFIG.replace(n_vocab=n_vocab)
    params = forms.nested(forms.random_model(config))
    gpt2_jax.save(tmp_path / "model", config, params, format="huggingface")
    fields = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (fields["eos_token_id"], fields["bos_token_id"]) == (end, end)


def test_one_array_under_the_name_of_the_head_alone(tmp_path, flat):
    """safetensors.torch.save_model keeps only one of two names for one array."""
    tensors = forms.hf_tensors(flat)
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    forms.assert_loads_as(forms.write_huggingface(tmp_path / "model", CONFIG, tensors), CONFIG, flat)


def test_a_pointer_of_git_lfs_is_told(tmp_path, flat):
    directory = forms.write_huggingface(tmp_path / "model", CONFIG, forms.hf_tensors(flat))
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 548105171\n"
    (directory / "model.safetensors").write_text(text)
    with pytest.raises(ValueError, match="git lfs pull"):
        gpt2_jax.load(directory)


def test_a_file_that_a_file_manager_leaves_in_an_orbax_tree(tmp_path, flat):
    gpt2_jax.save(tmp_path / "model", CONFIG, forms.nested(flat), format="orbax")
    (tmp_path / "model" / "params" / ".DS_Store").write_bytes(b"\0\7")
    assert forms.difference(gpt2_jax.load(tmp_path / "model")[1], flat) == ""


def test_an_index_of_something_else_is_no_second_model(tmp_path, flat):
    directory = forms.write_huggingface(tmp_path / "model", CONFIG, forms.hf_tensors(flat))
    (directory / "faiss.index").write_bytes(b"\7")
    forms.assert_loads_as(directory, CONFIG, flat)


@pytest.mark.parametrize("files", [("vocab.json", "merges.txt", "added_tokens.json"), ("tokenizer.json",)])
def test_a_fine_tune_with_an_added_token(tmp_path, model_dir, tokenizer, files):
    """Weights with one more row, and its token in Hugging Face's file for added tokens."""
    config = CONFIG.replace(n_vocab=1282)
    flat = forms.random_model(config)
    directory = forms.write_huggingface(tmp_path / "model", config, forms.hf_tensors(flat))
    if files == ("tokenizer.json",):
        forms.write_tokenizer_json(directory / "tokenizer.json", model_dir)
        fields = json.loads((directory / "tokenizer.json").read_text())
        fields["added_tokens"].append(fields["added_tokens"][0] | {"id": 1281, "content": "[PAD]"})
        (directory / "tokenizer.json").write_text(json.dumps(fields))
    else:
        tokenizer.to_files(directory / "vocab.json", directory / "merges.txt")
        (directory / "added_tokens.json").write_text('{"[PAD]": 1281}')
    found = gpt2_jax.load_tokenizer(directory)
    assert found.added == {"<|endoftext|>": 1280, "[PAD]": 1281}
    for format in FORMATS:
        gpt2_jax.save(tmp_path / format, config, forms.nested(flat), format=format, tokenizer=found)
        again = gpt2_jax.load_tokenizer(tmp_path / format)
        assert (again.tokens, again.merges, again.added) == (found.tokens, found.merges, found.added)


def test_warnings_say_what_became_of_which_values(tmp_path, flat):
    flat["h1/mlp/c_fc/b"][3] = 1e38
    export(tmp_path / "large", flat)
    with pytest.warns(UserWarning, match=r"too large for float16 have become infinite: h1/mlp/c_fc/b \(1\)") as told:
        gpt2_jax.load(tmp_path / "large", dtype="float16")
    assert told[0].filename == __file__
    flat["h1/mlp/c_fc/b"][3] = np.nan
    export(tmp_path / "nan", flat)
    with pytest.warns(UserWarning, match=r"these weights hold NaN or infinite values: h1/mlp/c_fc/b \(1\)") as told:
        gpt2_jax.load(tmp_path / "nan", dtype=ml_dtypes.bfloat16)
    assert told[0].filename == __file__


def test_without_a_home_a_model_loads_all_the_same(tmp_path, flat, monkeypatch):
    """As in containers whose user id has no name. The load works, but no copy can be kept."""
    directory = forms.write_tensorflow(tmp_path / "model", CONFIG, flat)
    monkeypatch.delenv("GPT2_JAX_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(copies.cache_dir.__globals__["Path"], "home", no_home)
    with pytest.warns(UserWarning, match="no home folder .* GPT2_JAX_CACHE"):
        _, params = gpt2_jax.load(directory)
    assert forms.difference(params, flat) == ""


def test_a_copy_that_may_not_be_read_is_done_without(tmp_path, flat, monkeypatch):
    directory = forms.write_tensorflow(tmp_path / "model", CONFIG, flat)
    gpt2_jax.load(directory)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(reader, "read_header", refuse)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _, params = gpt2_jax.load(directory)
    assert "Permission denied" in str(told[0].message)
    assert forms.difference(params, flat) == ""


def test_the_config_is_that_of_the_checkpoint_pointed_to(tmp_path, flat):
    """gpt-2-simple leaves several checkpoints in one folder. Only the named one is read."""
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in flat.items()}
    for step in (1000, 2000):
        forms.write_tensorflow(tmp_path, CONFIG, half, prefix=f"model-{step}")
    assert gpt2_jax.load_config(tmp_path) == gpt2_jax.load(tmp_path)[0] == CONFIG.replace(param_dtype="bfloat16")


def test_a_size_may_be_given_as_a_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert gpt2_jax.load_config(tmp_path.relative_to(tmp_path) / "gpt2-xl") == gpt2_jax.SIZES["1558M"]


def test_a_tree_of_shardings_must_be_whole(tmp_path, flat):
    import jax

    export(tmp_path / "model", flat)
    with pytest.raises(ValueError, match=r"sharding must have the structure of the params: h0/attn"):
        gpt2_jax.load(tmp_path / "model", sharding={"wte": jax.devices()[0]})
