"""Tokens that are added to a vocabulary, and the rows that they get in the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax import GPT2, GPT2Config
from gpt2_jax.model import init_params
from gpt2_jax.params import flatten
from gpt2_jax.research.surgery import resize_vocabulary
from gpt2_jax.tokenizer import Tokenizer

NEW = ["<|user|>", "<|assistant|>"]


@pytest.fixture(scope="module")
def model():
    return *gpt2_jax.load("shakespeare"), gpt2_jax.load_tokenizer("shakespeare")


def test_new_rows_are_means_and_nothing_else_changes(model):
    config, params, tokenizer = model
    larger, new_params, new_tokenizer = resize_vocabulary(config, params, tokenizer, NEW)
    assert (larger.n_vocab, new_tokenizer.n_vocab) == (config.n_vocab + 2, config.n_vocab + 2)
    text = "<|user|>Who is there?<|assistant|>Nay, answer me.<|endoftext|>"
    ids = new_tokenizer.encode(text)
    assert ids[0] == config.n_vocab
    assert ids.count(config.n_vocab + 1) == 1
    assert new_tokenizer.decode(ids) == text
    assert new_tokenizer.eot == tokenizer.eot
    assert tokenizer.eot not in ids
    assert tokenizer.n_vocab == config.n_vocab
    assert "<|user|>" not in tokenizer.tokens

    wte, new_wte = (np.asarray(tree["wte"]) for tree in (params, new_params))
    for i, token in enumerate(NEW):
        mean = wte[np.asarray(tokenizer.encode(token))].astype(np.float64).mean(0)
        np.testing.assert_allclose(new_wte[config.n_vocab + i], mean, rtol=0, atol=1e-7)  # measured: 2e-8
    np.testing.assert_array_equal(new_wte[: config.n_vocab], wte)
    others = [flatten(tree) for tree in (params, new_params)]
    assert all(others[0][name] is others[1][name] for name in others[0] if name != "wte")

    tokens = jnp.asarray([tokenizer.encode("First Citizen:\nBefore we proceed")])
    before = GPT2(config).apply({"params": params}, tokens).logits
    after = GPT2(larger).apply({"params": new_params}, tokens).logits
    np.testing.assert_allclose(after[..., : config.n_vocab], before, rtol=0, atol=2e-6)  # of 15; measured: 0


@pytest.mark.parametrize("format", ["tensorflow", "huggingface", "orbax"])
def test_the_tokens_come_back_from_every_format(model, tmp_path, format):
    larger, params, tokenizer = resize_vocabulary(*model, NEW)
    gpt2_jax.save(tmp_path / "model", larger, params, format, tokenizer)
    assert gpt2_jax.load_config(tmp_path / "model").n_vocab == larger.n_vocab
    again = gpt2_jax.load_tokenizer(tmp_path / "model")
    text = "say <|user|> and <|assistant|>\n"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.eot == tokenizer.eot


def tiny(**changes):
    config = GPT2Config(300, 8, 16, 2, 1, **changes)
    return config, init_params(config, jax.random.key(0))


def test_rows_of_padding_are_used_first_and_an_untied_head_grows_too(model):
    *_, tokenizer = model
    config = GPT2Config(tokenizer.n_vocab + 1, 8, 16, 2, 1, tie_word_embeddings=False, param_dtype="bfloat16")
    params = init_params(config, jax.random.key(0))
    larger, new_params, new_tokenizer = resize_vocabulary(config, params, tokenizer, NEW)
    assert larger.n_vocab == new_tokenizer.n_vocab == config.n_vocab + 1
    for name in ("wte", "lm_head"):
        assert new_params[name].dtype == jnp.bfloat16
        pieces = np.asarray(params[name], np.float32)[np.asarray(tokenizer.encode(NEW[0]))]
        row = np.asarray(new_params[name][tokenizer.n_vocab], np.float32)
        np.testing.assert_array_equal(row, np.asarray(jnp.asarray(pieces.mean(0)).astype(jnp.bfloat16), np.float32))


def test_jax_arrays_and_numpy_arrays_give_the_same(model):
    config, params, tokenizer = model
    host = jax.tree.map(np.asarray, params)
    on_host, on_device = (
        resize_vocabulary(config, tree, tokenizer, NEW)[1]["wte"] for tree in (host, jax.tree.map(jnp.asarray, params))
    )
    assert isinstance(on_host, np.ndarray)
    assert isinstance(on_device, jax.Array)
    np.testing.assert_allclose(on_host, on_device, rtol=0, atol=1e-7)  # measured: 1.5e-8
    assert host["wte"].shape == (config.n_vocab, config.n_embd)


def test_a_token_without_a_row_gets_one(model):
    config, params, tokenizer = model
    _, _, with_one = resize_vocabulary(config, params, tokenizer, NEW[:1])  # the model of it is left aside
    larger, new_params, same = resize_vocabulary(config, params, with_one, NEW[:1])
    assert larger.n_vocab == config.n_vocab + 1
    assert same.tokens == with_one.tokens
    mean = np.asarray(params["wte"])[np.asarray([i for letter in NEW[0] for i in tokenizer.encode(letter)])].mean(0)
    np.testing.assert_allclose(new_params["wte"][config.n_vocab], mean, rtol=0, atol=1e-7)  # measured: 0


def test_a_tokenizer_of_hugging_face(model):
    config, params, tokenizer = model
    other = Tokenizer.from_description(tokenizer.description())
    other.eot = tokenizer.eot
    larger, _, new_tokenizer = resize_vocabulary(config, params, other, NEW)
    assert new_tokenizer.encode("a<|assistant|>b") == [*other.encode("a"), larger.n_vocab - 1, *other.encode("b")]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<|endoftext|>"], "'<|endoftext|>' is a token of the vocabulary already, with the id 1280"),
        (["x", "x"], "must be different: x, x"),
        (["<|a|>", ""], "texts that are not empty"),
        ("<|a|>", "must be a list of texts"),
    ],
)
def test_bad_tokens_are_refused(model, tokens, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        resize_vocabulary(*model, tokens)


def test_params_of_another_config_are_refused(model):
    *_, tokenizer = model
    config, params = tiny()
    with pytest.raises(ValueError, match="params do not match the config"):
        resize_vocabulary(config.replace(n_vocab=299), params, tokenizer, NEW)
