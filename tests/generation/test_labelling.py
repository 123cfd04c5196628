"""`classify`: a text gives in any company the probabilities that it gives alone, in a few compiled programs."""

import jax
import numpy as np
import pytest
import tiny_models

import gpt2_jax
from gpt2_jax.generation import labelling

CONFIG = gpt2_jax.GPT2Config(37, 101, 12, 3, 2, labels=("ham", "spam", "news"))


@pytest.fixture(scope="module")
def params():
    return tiny_models.random_params(CONFIG, 5, scale=0.3)


def texts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 37, n).tolist() for n in lengths]


@pytest.mark.parametrize("pooling", ["last", "mean", "first"])
def test_a_text_gives_what_it_gives_alone(params, pooling):
    """Of lengths 1 to n_ctx, in any order. Measured: 1.2e-7."""
    config = CONFIG.replace(pooling=pooling)
    texts = texts_of([1, 101, 40, 2, 33, 100, 31, 1, 64, 17])
    found = gpt2_jax.classify(config, params, texts)
    assert found.shape == (10, 3)
    np.testing.assert_allclose(found.sum(1), 1, rtol=0, atol=1e-6)
    for row, text in zip(found, texts, strict=True):
        logits = gpt2_jax.GPT2(config).apply({"params": params}, np.array([text]), method="classify")
        np.testing.assert_allclose(row, jax.nn.softmax(logits)[0], rtol=0, atol=2e-6)
    assert found.std(0).min() > 0.01  # the texts differ


def test_few_programs_are_compiled_for_many_lengths(params):
    labelling._probabilities.clear_cache()
    gpt2_jax.classify(CONFIG, params, texts_of(range(1, 102)))
    assert labelling._probabilities._cache_size() <= 12
    assert gpt2_jax.classify(CONFIG, params, []).shape == (0, 3)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([[1], []], r"texts\[1\] is empty"),
        ([[1] * 102], r"texts\[0\] has 102 tokens, but the model's n_ctx is 101"),
        ([[37]], r"texts\[0\] holds the id 37"),
        ("text", "texts must be a list of token-id lists"),
        ([["a"]], r"texts\[0\] must be a list of token ids"),
    ],
)
def test_what_is_no_text_is_refused(params, texts, message):
    with pytest.raises(ValueError, match=message):
        gpt2_jax.classify(CONFIG, params, texts)


def test_other_models_are_refused(params):
    with pytest.raises(ValueError, match="no classifier"):
        gpt2_jax.classify(CONFIG.replace(labels=()), params, [[1]])
    with pytest.raises(ValueError, match="missing: score/w"):
        gpt2_jax.classify(CONFIG, {name: leaf for name, leaf in params.items() if name != "score"}, [[1]])
    broken = params | {"score": {"w": params["score"]["w"] * np.nan}}
    with pytest.raises(ValueError, match=r"texts\[0\]: the logits are NaN"):
        gpt2_jax.classify(CONFIG, broken, [[1]])
