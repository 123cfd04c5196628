"""Models with more rows of wte than the tokenizer has ids (50,304 and 50,257 at Megatron and nanoGPT), or fewer."""

import numpy as np
import pytest
from fake_models import N_SAID, TEXT_CONFIG
from measures import COMPILATIONS
from numpy_reference import row
from tiny_models import random_params

import gpt2_jax
from gpt2_jax.generation import Settings, complete

PADDED = TEXT_CONFIG.replace(n_vocab=1344)  # the tokenizer has 1,281 ids
PROMPTS = [[1, 2, 3], [1280]]


@pytest.fixture(scope="module")
def params():
    """The rows of wte after the tokenizer's ids give the largest logits."""
    params = random_params(PADDED, 5, scale=0.2)
    params["ln_f"]["b"] = params["ln_f"]["b"].at[0].set(3.0)
    return params | {"wte": params["wte"].at[1281:, 0].set(9.0)}


def test_rows_after_the_tokenizers_ids_are_never_chosen(params, tokenizer):
    every_row = gpt2_jax.generate(PADDED, params, PROMPTS, 20)
    assert min(map(min, every_row)) >= 1281  # without a tokenizer all rows count
    for settings in ({}, {"temperature": 0}, {"top_k": 5}, {"top_p": 0.5, "repetition_penalty": 1.3}):
        rows = gpt2_jax.generate(PADDED, params, PROMPTS, 20, tokenizer=tokenizer, **settings)
        assert rows == gpt2_jax.generate(PADDED, params, PROMPTS, 20, n_ids=1281, **settings)
        assert max(map(max, rows)) < 1281
        texts = [one.text for one in complete(PADDED, params, PROMPTS, tokenizer, Settings(20, **settings))]
        assert texts == [tokenizer.decode(row) for row in rows]
        assert "".join(gpt2_jax.stream(PADDED, params, PROMPTS[0], tokenizer, 20, **settings)) == texts[0]


def test_log_probabilities_count_all_rows_and_alternatives_do_not(params, tokenizer):
    (ids,), (logprobs,) = gpt2_jax.generate(PADDED, params, PROMPTS[:1], 5, 0, tokenizer=tokenizer, logprobs=3)
    logits_nV = row({k: _float64(v) for k, v in params.items()}, np.array([*PROMPTS[0], *ids[:-1]]), PADDED.n_head)[2:]
    assert ids == logits_nV[:, :1281].argmax(-1).tolist()
    shifted_nV = logits_nV - logits_nV.max(-1, keepdims=True)
    expected_nV = shifted_nV - np.log(np.exp(shifted_nV).sum(-1, keepdims=True))
    np.testing.assert_allclose(
        logprobs.chosen, expected_nV[range(5), ids], rtol=0, atol=6e-5
    )  # measured 1.7e-5, of logprobs down to -32
    assert logprobs.top_ids.tolist() == np.argsort(-logits_nV[:, :1281], axis=-1)[:, :3].tolist()
    assert np.exp(logprobs.top).sum() < 0.01  # almost all probability is in the padding


def _float64(tree):
    return {k: _float64(v) for k, v in tree.items()} if isinstance(tree, dict) else np.asarray(tree, np.float64)


def test_other_n_ids_compile_nothing(params):
    gpt2_jax.generate(PADDED, params, PROMPTS, 20)
    compiled = len(COMPILATIONS)
    for n_ids in (1, 2, 1281, 1344):
        assert max(map(max, gpt2_jax.generate(PADDED, params, PROMPTS, 20, n_ids=n_ids))) < n_ids
    assert len(COMPILATIONS) == compiled


@pytest.mark.parametrize("n_ids", [0, -1, 1345, 1.5, True, "all"])
def test_a_wrong_n_ids_is_refused(params, n_ids):
    with pytest.raises(ValueError, match="n_ids must be a whole number, from 1 to 1344, not "):
        gpt2_jax.generate(PADDED, params, PROMPTS, n_ids=n_ids)


def test_ids_that_the_tokenizer_lacks_are_not_asked_for(params, tokenizer):
    """Otherwise decoding them fails in the middle of a text."""
    for call in (
        lambda: gpt2_jax.generate(PADDED, params, PROMPTS, 3, tokenizer=tokenizer, n_ids=1282),
        lambda: gpt2_jax.stream(PADDED, params, PROMPTS[0], tokenizer, 3, n_ids=1282),
        lambda: complete(PADDED, params, PROMPTS, tokenizer, Settings(3, n_ids=1282)),
    ):
        with pytest.raises(ValueError, match="n_ids must be at most 1281, the number of the tokenizer's ids, not"):
            call()
    assert Settings(n_ids=1281).check(PADDED, tokenizer).n_ids == 1281


def test_more_alternatives_than_ids_are_refused(params, tokenizer):
    with pytest.raises(ValueError, match="logprobs must be a whole number, from 0 to 1281, not 1282"):
        gpt2_jax.generate(PADDED, params, PROMPTS, tokenizer=tokenizer, logprobs=1282)


def test_an_id_that_the_model_lacks_is_refused_only_where_it_is_used(tokenizer):
    """A [PAD] was added to the vocabulary, and the embedding kept its size (huggingface/transformers#29899)."""
    config = TEXT_CONFIG.replace(n_vocab=1280)
    params = random_params(config, 5, scale=0.2)
    assert Settings().check(config, tokenizer).n_ids == 1280
    assert len("".join(gpt2_jax.stream(config, params, [1, 2], tokenizer, N_SAID))) > 0
    with pytest.raises(ValueError, match="prompt holds the id 1280, outside the vocabulary of 1280 ids"):
        gpt2_jax.stream(config, params, [1, tokenizer.eot], tokenizer)
    with pytest.raises(ValueError, match=r"stop_ids\[0\] must be a whole number, from 0 to 1279, not 1280"):
        gpt2_jax.stream(config, params, [1], tokenizer, stop_ids=[tokenizer.eot])


def test_prompts_may_hold_ids_of_padding(params, tokenizer):
    """They have rows of wte, so the model can read them."""
    (row,) = gpt2_jax.generate(PADDED, params, [[1300]], 5, tokenizer=tokenizer)
    assert max(row) < 1281
