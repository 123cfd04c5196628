"""Models with other arithmetic than OpenAI's go through every format without a loss, or are refused with the field."""

import json

import checkpoint_forms as forms
import numpy as np
import pytest
import variants
from checkpoint_forms import CONFIG, hf_tensors, write_huggingface

import gpt2_jax
from gpt2_jax.checkpoints.integrity import read_manifest, sealed, write_manifest

UNTIED = CONFIG.replace(tie_word_embeddings=False)


@pytest.fixture(params=variants.CASES)
def config(request):
    return CONFIG.replace(**variants.CASES[request.param])


# ---- our own exports


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("format", ["huggingface", "orbax"])
def test_a_saved_variant_is_loaded_to_the_bit(tmp_path, config, format, dtype):
    config = config.replace(param_dtype=dtype)
    flat = forms.random_bits(config, 7)
    gpt2_jax.save(tmp_path, config, forms.nested(flat), format=format)
    loaded, _ = forms.assert_loads_as(tmp_path, config, flat)
    assert loaded == config == gpt2_jax.load_config(tmp_path)


def test_openais_files_refuse_what_they_cannot_hold(tmp_path, config):
    """Nothing is lost silently: only reorder_and_upcast_attn, which changes no number, is left out."""
    params = forms.nested(forms.random_model(config))
    lost = [name for name in config.variants if name != "reorder_and_upcast_attn"]
    if not lost:
        gpt2_jax.save(tmp_path / "model", config, params)
        assert gpt2_jax.load(tmp_path / "model")[0] == CONFIG
        return
    with pytest.raises(ValueError, match="huggingface or orbax") as caught:
        gpt2_jax.save(tmp_path / "model", config, params)
    assert all(name in str(caught.value) for name in lost)
    assert not any(tmp_path.iterdir())


def test_config_json_names_every_field(tmp_path, config):
    gpt2_jax.save(tmp_path, config, forms.nested(forms.random_model(config)), format="huggingface")
    fields = json.loads((tmp_path / "config.json").read_text())
    for name in ("activation_function", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings"):
        assert fields[name] == getattr(config, name)
    assert fields["reorder_and_upcast_attn"] == config.reorder_and_upcast_attn


@pytest.mark.parametrize("field", ["activation_function", "scale_attn_by_inverse_layer_idx"])
def test_a_changed_field_of_our_export_is_damage(tmp_path, field):
    """The weights were made for the arithmetic in their manifest."""
    flat = forms.random_model()
    gpt2_jax.save(tmp_path, CONFIG, forms.nested(flat), format="huggingface")
    fields = json.loads((tmp_path / "config.json").read_text())
    fields[field] = {"activation_function": "relu", "scale_attn_by_inverse_layer_idx": True}[field]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"does not match.*{field}"):
        gpt2_jax.load(tmp_path)


@pytest.mark.parametrize("format", ["huggingface", "orbax", "tensorflow"])
def test_attention_is_not_saved(tmp_path, format):
    """Each program chooses its own. Earlier versions, which do not know the field, load the files."""
    params, files = forms.nested(forms.random_model(CONFIG)), {}
    for attention in ("auto", "plain"):
        gpt2_jax.save(tmp_path / attention, CONFIG.replace(attention=attention), params, format=format)
        assert gpt2_jax.load(tmp_path / attention)[0] == CONFIG
        paths = (path for path in (tmp_path / attention).rglob("*.json") if "params" not in path.parts)
        files[attention] = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
        for found in files[attention].values():
            found.pop("files", None)  # Orbax's files have times in them, which are hashed
            found.pop("digest", None)
    assert files["auto"] == files["plain"]
    assert "attention" not in {name for found in files["plain"].values() for name in found.get("config", found)}


def test_a_manifest_of_plain_gpt2_is_that_of_earlier_versions():
    """Earlier versions read it, and theirs, which have no such fields, are read."""
    manifest = json.loads(write_manifest(CONFIG, {}))
    known = {"n_vocab", "n_ctx", "n_embd", "n_head", "n_layer", "embd_pdrop", "attn_pdrop", "resid_pdrop"}
    assert manifest["config"].keys() == known | {"qkv_bias", "param_dtype"}
    assert read_manifest(json.dumps(manifest), "a file")[0] == CONFIG


def test_a_manifest_with_an_unknown_activation_function_is_an_error():
    manifest = json.loads(write_manifest(CONFIG, {}))
    manifest["config"]["activation_function"] = "cube"
    del manifest["digest"]
    with pytest.raises(ValueError, match="activation_function"):
        read_manifest(sealed(manifest), "a file")


# ---- other people's folders


def test_a_stored_head_stays_a_head_of_its_own_if_the_config_says_so(tmp_path):
    """Even if it is equal to wte: training it may change it."""
    flat = forms.random_model(UNTIED)
    flat["lm_head"] = flat["wte"].copy()
    write_huggingface(tmp_path, CONFIG, hf_tensors(flat), tie_word_embeddings=False)
    assert forms.assert_loads_as(tmp_path, UNTIED, flat)[0] == UNTIED


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("shards", [1, 3])
def test_another_head_than_the_config_says_is_loaded_with_a_warning(tmp_path, prefix, shards):
    """transformers 5 does the same: it does not tie two arrays that differ. One bit is enough."""
    flat = forms.random_model(UNTIED)
    flat["lm_head"] = flat["wte"].copy()
    flat["lm_head"][36, 14] = np.nextafter(flat["wte"][36, 14], 9)
    write_huggingface(tmp_path, CONFIG, hf_tensors(flat, prefix), shards=shards)
    for call in (lambda: forms.assert_loads_as(tmp_path, UNTIED, flat)[0], lambda: gpt2_jax.load_config(tmp_path)):
        with pytest.warns(UserWarning, match=r"lm_head.weight in .*is not equal to wte.weight") as caught:
            assert call() == UNTIED
        assert len(caught) == 1
    with pytest.warns(UserWarning, match="tied") as caught:
        gpt2_jax.load(tmp_path)
    assert caught[0].filename == __file__


def test_a_head_that_equals_wte_to_the_bit_is_tied(tmp_path):
    """Also if a value is NaN, which is not equal to itself as a number."""
    flat = forms.random_model()
    flat["wte"][36, 14] = np.nan
    write_huggingface(tmp_path, CONFIG, hf_tensors(flat) | {"lm_head.weight": flat["wte"].copy()})
    with pytest.warns(UserWarning, match="NaN") as caught:
        assert forms.assert_loads_as(tmp_path, CONFIG, flat)[0] == CONFIG
    assert len(caught) == 1


def test_an_untied_head_that_is_missing_is_named(tmp_path):
    write_huggingface(tmp_path, CONFIG, hf_tensors(forms.random_model()), tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"tie_word_embeddings = False.* has no lm_head.weight"):
        gpt2_jax.load(tmp_path)


OTHER_NAMES = {
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}


def test_the_general_names_of_transformers_are_read(tmp_path):
    """transformers reads these names through its attribute map; if both are there, they win."""
    flat = forms.random_model()
    values = {other: forms.hf_config(CONFIG)[name] for name, other in OTHER_NAMES.items()}
    write_huggingface(tmp_path / "only", CONFIG, hf_tensors(flat), **dict.fromkeys(OTHER_NAMES, ...), **values)
    write_huggingface(tmp_path / "both", CONFIG, hf_tensors(flat), **dict.fromkeys(OTHER_NAMES, 5), **values)
    for name in ("only", "both"):
        assert forms.assert_loads_as(tmp_path / name, CONFIG, flat)[0] == CONFIG


@pytest.mark.parametrize("name", ["gelu_fast", "gelu_accurate", "gelu_python_tanh", "gelu_pytorch_tanh"])
def test_other_names_of_the_tanh_gelu_are_read(tmp_path, name):
    flat = forms.random_model()
    write_huggingface(tmp_path, CONFIG, hf_tensors(flat), activation_function=name)
    assert forms.assert_loads_as(tmp_path, CONFIG, flat)[0] == CONFIG


# ---- the books


def test_the_books_nesting_refuses_an_untied_head():
    """Their load_weights_into_gpt would put wte into the head."""
    params = forms.nested(forms.random_model(UNTIED))
    with pytest.raises(ValueError, match="untied output head, lm_head"):
        gpt2_jax.to_blocks(params)
