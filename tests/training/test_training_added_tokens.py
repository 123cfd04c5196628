"""A run whose recipe adds tokens to the vocabulary."""

import dataclasses

import jax
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax import training
from gpt2_jax.params import flatten
from gpt2_jax.recipe import from_dict

TOKENS = ("<|user|>", "<|bot|>")
FIELDS = {
    "steps": 2,
    "batch_size": 2,
    "model": {"dropout": 0.0},
    "data": {"n_tokens": 24, "add_tokens": TOKENS},
    "mesh": {"data": 1},
    "monitor": {"evaluate_every": 2, "sample_every": 0, "tensorboard": False},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small model with the embedded vocabulary."""
    folder = tmp_path_factory.mktemp("source") / "model"
    config = gpt2_jax.GPT2Config(1281, 32, 12, 3, 1)
    params = gpt2_jax.init_params(config, jax.random.key(0))
    gpt2_jax.save(folder, config, params, "orbax", gpt2_jax.load_tokenizer("shakespeare"))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("".join(f"<|user|>What of {i}?\n<|bot|>Nay, {i * i}.\n" for i in range(40)), encoding="utf-8")
    return path


def recipe_of(source, text, **changes):
    data = FIELDS["data"] | {"path": str(text)} | changes.pop("data", {})
    return from_dict(
        training.Recipe, FIELDS | {"model": {"source": str(source), "dropout": 0.0}, "data": data} | changes
    )


def fitted(recipe, folder):
    tokenizer = training.start_tokenizer(recipe, folder)
    data = training.start_data(recipe, tokenizer, folder / "data")
    plan, params, tokenizer = training.start_model(recipe, folder, data)
    first = None if params is None else {name: np.asarray(leaf) for name, leaf in flatten(params).items()}
    return first, training.fit(plan, params, data, folder, tokenizer), data


def test_the_tokens_are_in_the_text_the_model_and_the_run(source, text, tmp_path):
    recipe = recipe_of(source, text)
    first, result, data = fitted(recipe, tmp_path / "run")
    old, tokenizer = gpt2_jax.load_tokenizer("shakespeare"), gpt2_jax.load_tokenizer(tmp_path / "run")
    new_ids = [tokenizer.tokens[token] for token in TOKENS]
    assert new_ids == [1281, 1282]
    ids, _ = data.train.read(0, data.train.n_tokens)
    assert np.isin(new_ids, ids).all()
    wte = np.asarray(gpt2_jax.load(source)[1]["wte"])
    for token, i in zip(TOKENS, new_ids, strict=True):
        np.testing.assert_allclose(
            first["wte"][i], wte[np.asarray(old.encode(token))].mean(0), atol=1e-8
        )  # measured: 2e-9
    np.testing.assert_array_equal(first["wte"][:1281], wte)

    config, params = gpt2_jax.load(tmp_path / "run")
    assert config.n_vocab == 1283
    assert result.params["wte"].shape == (1283, 12)
    assert not np.array_equal(np.asarray(params["wte"])[1281:], first["wte"][1281:])  # they are trained
    assert len(gpt2_jax.generate(config, params, [tokenizer.encode("<|user|>What")], 3)[0]) == 3


def test_it_resumes_bit_for_bit(source, text, tmp_path):
    recipe = recipe_of(source, text, steps=3)
    _, whole, _ = fitted(recipe, tmp_path / "whole")
    fitted(dataclasses.replace(recipe, steps=1), tmp_path / "parts")
    first, resumed, _ = fitted(recipe, tmp_path / "parts")
    assert first is None
    for name, leaf in flatten(whole.params).items():
        np.testing.assert_array_equal(leaf, flatten(resumed.params)[name], err_msg=name)


def test_with_lora_the_new_rows_are_kept_and_may_be_trained(source, text, tmp_path):
    lora = {"rank": 2, "targets": "c_attn/w$", "full": "^wte$"}
    first, result, _ = fitted(recipe_of(source, text, lora=lora), tmp_path / "run")
    loaded = gpt2_jax.load(tmp_path / "run" / "checkpoints" / "2")[1]
    np.testing.assert_array_equal(loaded["wte"], result.params["wte"])
    assert not np.array_equal(loaded["wte"], first["wte"])
    np.testing.assert_array_equal(loaded["wpe"], first["wpe"])


def test_a_token_that_has_a_row_is_refused(source, text, tmp_path):
    recipe = recipe_of(source, text, data={"add_tokens": ["<|endoftext|>"]})
    with pytest.raises(ValueError, match=r"'<\|endoftext\|>' is a token of the vocabulary already, with the id 1280"):
        training.start_model(recipe, tmp_path / "run")
