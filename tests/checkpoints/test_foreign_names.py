"""Weights and configs in the words of nanoGPT, Flax and the build-an-LLM book: logits equal NumPy's."""

import json
import re
import warnings

import checkpoint_forms as forms
import foreign_models as foreign
import forward
import numpy as np
import peer_models
import pytest
from checkpoint_forms import assert_loads_as, hf_config, hf_tensors, write_huggingface
from flax import serialization
from foreign_models import BOOK, CONFIG, NANOGPT, TOKENS

import gpt2_jax
from gpt2_jax.commands._model import Mesh
from gpt2_jax.commands._speaker import Model

BOUND = 2e-6  # the largest error measured is 6e-7 of the largest logit

pytestmark = pytest.mark.usefixtures("own_cache")


def assert_speaks_as(path, expected, **options):
    """Load, and compare the logits with a reference in float64."""
    config, params = gpt2_jax.load(path, **options)
    found = forward.logits_of(config, params, TOKENS[None])[0]
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < BOUND, error
    assert gpt2_jax.load_config(path) == config
    return config, params


# ---- nanoGPT (karpathy/nanoGPT)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_nanogpt(tmp_path, bias, prefix):
    """nn.Linear is (out, in), GELU is the exact one, and bias=False leaves out all biases."""
    state = foreign.nanogpt(bias)
    tensors = {prefix + key: array for key, array in state.items()}
    tensors |= {f"{prefix}transformer.h.{i}.attn.bias": np.tri(11)[None, None] for i in range(2)}  # the causal mask
    expected = peer_models.nanogpt_logits(state, TOKENS, CONFIG.n_head)
    with pytest.warns(UserWarning, match="does not name activation_function.* gelu is assumed"):
        config, _ = assert_speaks_as(foreign.write(tmp_path, NANOGPT | {"bias": bias}, tensors), expected)
    assert (config.activation_function, config.resid_pdrop) == ("gelu", 0)


WORDS = {name: value for name, value in NANOGPT.items() if name not in ("bias", "dropout")}


@pytest.mark.parametrize(
    ("fields", "assumed", "guessed"),
    [
        (hf_config(CONFIG, activation_function=...), "gelu_new", True),
        (hf_config(CONFIG, activation_function="gelu"), "gelu", False),
        (NANOGPT, "gelu", True),
        (NANOGPT | {"activation_function": "gelu_new"}, "gelu_new", False),
        (WORDS | {"dropout": 0.0}, "gelu_new", True),  # nanoGPT before it had `bias`
        (WORDS, "gelu_new", False),  # build-nanogpt and minGPT, which have no other GELU
    ],
    ids=["hugging face", "named", "nanogpt", "nanogpt named", "nanogpt without bias", "build-nanogpt"],
)
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_gelu_that_is_only_assumed_is_named(tmp_path, fields, assumed, guessed, prefix):
    """nanoGPT has the exact GELU since karpathy/nanoGPT#274, and wrote the same settings before."""
    state = {prefix + key: array for key, array in foreign.nanogpt().items()}
    foreign.write(tmp_path, fields, state)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config, _ = gpt2_jax.load(tmp_path)
    assert config.activation_function == assumed
    assert len(caught) == guessed
    for warning in caught:
        said = str(warning.message)
        assert re.search(rf'config\.json does not name .* {assumed} is assumed; write "activation_function": ', said)
        assert warning.filename == __file__
        assert "\n" not in said


def test_a_warning_of_a_command_names_its_script_and_comes_once(tmp_path):
    """Also if the weights are a cached property, which the standard library calls."""
    model = Model(str(foreign.write(tmp_path, NANOGPT, foreign.nanogpt())), None, CONFIG, None, None, 1, Mesh())
    with pytest.warns(UserWarning, match="gelu is assumed") as caught:
        assert model.weights[0].activation_function == "gelu"
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("transposed", [False, True], ids=["Hugging Face", "mlx-lm"])
def test_the_gelu_of_other_programs_is_not_in_doubt(tmp_path, transposed):
    tensors = hf_tensors(forms.random_model(CONFIG), "model." if transposed else "transformer.")
    tensors = {k: a.T.copy() if transposed and ".c_" in k and a.ndim == 2 else a for k, a in tensors.items()}
    gpt2_jax.load(foreign.write(tmp_path, hf_config(CONFIG, activation_function=...), tensors))


def test_nanogpts_weights_beside_a_config_of_hugging_face(tmp_path):
    """The config says which GELU it is."""
    state = foreign.nanogpt()
    for activation, gelu in (("gelu", peer_models.numpy_reference.gelu_erf), ("gelu_new", None)):
        gelu = gelu or peer_models.numpy_reference.gelu_tanh
        fields = hf_config(CONFIG, activation_function=activation)
        expected = peer_models.nanogpt_logits(state, TOKENS, CONFIG.n_head, gelu)
        assert_speaks_as(foreign.write(tmp_path, fields, state), expected)


def test_one_layer_stored_the_other_way_round_is_refused(tmp_path):
    state = foreign.nanogpt()
    state["transformer.h.1.mlp.c_fc.weight"] = state["transformer.h.1.mlp.c_fc.weight"].T
    with pytest.raises(ValueError, match=r"does not hold the GPT-2"):
        gpt2_jax.load(foreign.write(tmp_path, NANOGPT, state))


def test_a_missing_bias_is_refused(tmp_path):
    state = foreign.nanogpt()
    del state["transformer.h.1.mlp.c_fc.bias"]
    with pytest.raises(ValueError, match=r"missing: h\.1\.mlp\.c_fc\.bias"):
        gpt2_jax.load(foreign.write(tmp_path, NANOGPT, state))


# ---- Flax (transformers 4, modeling_flax_gpt2.py)


def test_flax_msgpack(tmp_path):
    tree = foreign.flax()
    expected = peer_models.flax_logits(tree, TOKENS, CONFIG.n_head)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(CONFIG)))
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.to_bytes(tree))
    assert_speaks_as(tmp_path, expected)


def test_flax_msgpack_in_several_files(tmp_path):
    tree = foreign.flax()
    (tmp_path / "config.json").write_text(json.dumps(hf_config(CONFIG)))
    halves = [
        {"transformer": {k: v for k, v in tree["transformer"].items() if (k == "h") == first}} for first in (1, 0)
    ]
    names = [f"flax_model-0000{i}-of-00002.msgpack" for i in (1, 2)]
    weight_map = {}
    for name, half in zip(names, halves, strict=True):
        (tmp_path / name).write_bytes(serialization.to_bytes(half))
        weight_map |= {key.replace(".", "/"): name for key in foreign.dotted(half)}
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_speaks_as(tmp_path, peer_models.flax_logits(tree, TOKENS, CONFIG.n_head))
    (tmp_path / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match=names[1]):
        gpt2_jax.load(tmp_path)


@pytest.mark.parametrize("separator", [".", "/"])
def test_safetensors_under_the_names_of_flax(tmp_path, separator):
    tree = foreign.flax()
    tensors = {key.replace(".", separator): array for key, array in foreign.dotted(tree).items()}
    expected = peer_models.flax_logits(tree, TOKENS, CONFIG.n_head)
    assert_speaks_as(foreign.write(tmp_path, hf_config(CONFIG), tensors), expected)


def test_an_untied_head_of_flax(tmp_path):
    tree = foreign.flax()
    head = peer_models.normal(np.random.default_rng(8), CONFIG.n_vocab, CONFIG.n_embd)
    tree["lm_head"] = {"kernel": np.ascontiguousarray(head.T)}
    (tmp_path / "config.json").write_text(json.dumps(hf_config(CONFIG, tie_word_embeddings=False)))
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.to_bytes(tree))
    config, params = gpt2_jax.load(tmp_path)
    assert not config.tie_word_embeddings
    assert np.array_equal(params["lm_head"], head)


@pytest.mark.parametrize("content", [b"", b"\x80", b"\xc1", b"x" * 99, b"\x81\xa1a\xc7\x03\x01abc"])
def test_a_msgpack_file_that_is_none(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(CONFIG)))
    (tmp_path / "flax_model.msgpack").write_bytes(content)
    with pytest.raises(ValueError, match=r"flax_model\.msgpack") as caught:
        gpt2_jax.load(tmp_path)
    assert forms.is_clear(caught.value), caught.value


# ---- the build-an-LLM book (rasbt/LLMs-from-scratch)


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_book(tmp_path, qkv_bias, tied):
    """Query, key and value are apart. The book's out_head is its own array after training."""
    state = foreign.book(qkv_bias, tied)
    tensors = foreign.in_torch_names(state, qkv_bias)
    expected = peer_models.book_logits(state, TOKENS, CONFIG.n_head)
    config, params = assert_speaks_as(foreign.write(tmp_path, BOOK | {"qkv_bias": qkv_bias}, tensors), expected)
    assert (config.qkv_bias, config.tie_word_embeddings) == (qkv_bias, tied)
    assert ("lm_head" in params) != tied


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({}, (0.1, 0.1, 0.1)),
        (
            {"drop_rate_emb": 0.2, "drop_rate_attn": 0.3, "drop_rate_shortcut": 0.4, "kv_window_size": 11},
            (0.2, 0.3, 0.4),
        ),
        ({"drop_rate_attn": 0.3, "kv_window_size": None}, (0.1, 0.3, 0.1)),
    ],
)
def test_the_books_words(tmp_path, changes, rates):
    """Exercise 4.2 has one dropout rate a place; the KV cache of chapter 4 has a size."""
    config = gpt2_jax.GPT2Config.from_book(BOOK | changes)
    assert (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) == rates
    path = foreign.write(tmp_path, BOOK | changes, foreign.in_torch_names(foreign.book()))
    assert gpt2_jax.load_config(path) == config
    whole = {"drop_rate_emb": 0.2, "drop_rate_attn": 0.3, "drop_rate_shortcut": 0.4}
    without = {word: value for word, value in BOOK.items() if word != "drop_rate"}
    assert gpt2_jax.GPT2Config.from_book(without | whole).attn_pdrop == 0.3


@pytest.mark.parametrize("changes", [{"kv_window_size": 4}, {"kv_window_size": "all"}, {"drop_rate_attn": 2}])
def test_words_of_the_book_that_are_refused(changes):
    with pytest.raises(ValueError, match=r"kv_window_size|attn_pdrop"):
        gpt2_jax.GPT2Config.from_book(BOOK | changes)


# ---- words of configs


@pytest.mark.parametrize(
    "words",
    [
        {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"},
        {"n_positions": "max_position_embeddings"},
        {"n_positions": "n_ctx"},
    ],
)
def test_the_synonyms_of_transformers(tmp_path, flat, words):
    fields = hf_config(CONFIG)
    fields |= {new: fields.pop(old) for old, new in words.items()}
    assert_loads_as(foreign.write(tmp_path, fields, hf_tensors(flat)), CONFIG, flat)


def test_two_words_for_one_field(tmp_path, flat):
    """transformers uses its synonym. A word of another program must agree."""
    write_huggingface(tmp_path, CONFIG, hf_tensors(flat), hidden_size=15, n_embd=18)
    assert_loads_as(tmp_path, CONFIG, flat)
    write_huggingface(tmp_path, CONFIG, hf_tensors(flat), emb_dim=18)
    with pytest.raises(ValueError, match=r"config\.json: emb_dim = 18 and n_embd = 15"):
        gpt2_jax.load(tmp_path)


def test_n_positions_counts_not_n_ctx(tmp_path, flat):
    """As in transformers, where n_ctx is a field without a meaning."""
    assert_loads_as(write_huggingface(tmp_path, CONFIG, hf_tensors(flat), n_ctx=7), CONFIG, flat)
