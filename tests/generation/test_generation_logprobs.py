"""generate(logprobs=k): the model's own log-probabilities of chosen and k most likely tokens, at any settings."""

import dataclasses

import jax
import jax.numpy as jnp
import naive_generation as naive
import numpy as np
import pytest
from fake_models import N_SAID, TEXT_CONFIG
from scipy.special import log_softmax
from strength import campaign
from tiny_models import CONFIG, chosen_logits, random_params

import gpt2_jax

PROMPTS = [[5], [3, 1, 4, 1, 5], [36, 0], [7] * 19, [2, 7, 1], [0], list(range(23))]
UNTOUCHED = {"wte": object()}  # JAX cannot trace this: any attempt raises TypeError
KNOBS = [
    {"temperature": 0},
    {"seed": 3},
    {"seed": 4, "temperature": 2.0, "top_k": 9, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.5},
    {"temperature": 0, "repetition_penalty": 1.5},
    {"seed": 5, "temperature": 1e-3},
]


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0)


def expected(config, params, prompt, ids):
    """[n, V] float64: log-probabilities before each new token, from whole forward passes."""
    return log_softmax(naive.logits_before(config, params, prompt, ids), axis=-1)


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_logprobs_are_those_of_whole_forward_passes(params, knobs):
    """Chosen and most likely tokens of a ragged batch: temperature 1, no filter, no penalty, at any sampling settings.

    The error against float64 is 7.2e-6 at most.
    """
    rows, logprobs = gpt2_jax.generate(CONFIG, params, PROMPTS, 17, logprobs=5, **knobs)
    for prompt, ids, row in zip(PROMPTS, rows, logprobs, strict=True):
        logprobs_nV = expected(CONFIG, params, prompt, ids)
        chosen = np.take_along_axis(logprobs_nV, np.array(ids)[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(row.chosen, chosen, rtol=0, atol=1.5e-5)
        np.testing.assert_allclose(row.top, -np.sort(-logprobs_nV)[:, :5], rtol=0, atol=1.5e-5)
        np.testing.assert_array_equal(row.top_ids, np.argsort(-logprobs_nV, axis=1, kind="stable")[:, :5])


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_asking_for_logprobs_changes_no_id(params, knobs):
    rows, _ = gpt2_jax.generate(CONFIG, params, PROMPTS, 17, logprobs=5, **knobs)
    assert rows == gpt2_jax.generate(CONFIG, params, PROMPTS, 17, **knobs)


def test_greedy_chooses_the_first_of_the_most_likely(params):
    """At temperature 0 the chosen token is the first alternative, with the same id and log-probability bit for bit."""
    rows, logprobs = gpt2_jax.generate(CONFIG, params, PROMPTS, 17, temperature=0, logprobs=5)
    for ids, row in zip(rows, logprobs, strict=True):
        assert row.top_ids[:, 0].tolist() == ids
        np.testing.assert_array_equal(row.top[:, 0], row.chosen)


def test_shapes_and_types(params):
    """One dataclass of NumPy arrays per row: chosen [n] float32, top_ids [n, k] int32, top [n, k] float32."""
    for k, n in ((0, 1), (5, 17)):
        rows, logprobs = gpt2_jax.generate(CONFIG, params, PROMPTS, n, logprobs=k)
        assert len(rows) == len(logprobs) == len(PROMPTS)
        for row in logprobs:
            assert dataclasses.is_dataclass(row)
            assert all(isinstance(array, np.ndarray) for array in (row.chosen, row.top_ids, row.top))
            assert (row.chosen.shape, row.chosen.dtype) == ((n,), np.float32)
            assert (row.top_ids.shape, row.top_ids.dtype) == ((n, k), np.int32)
            assert (row.top.shape, row.top.dtype) == ((n, k), np.float32)


def test_no_new_tokens_have_no_logprobs(params):
    rows, logprobs = gpt2_jax.generate(CONFIG, params, PROMPTS[:2], 0, logprobs=3)
    assert rows == [[], []]
    assert [(row.chosen.shape, row.top.shape, row.top_ids.shape) for row in logprobs] == [((0,), (0, 3), (0, 3))] * 2


def test_all_alternatives_add_up_to_one(params):
    """k may be the whole vocabulary. Then all probabilities are returned."""
    _, logprobs = gpt2_jax.generate(CONFIG, params, PROMPTS, 1, logprobs=CONFIG.n_vocab)
    for row in logprobs:
        np.testing.assert_allclose(np.exp(row.top.astype(np.float64)).sum(axis=1), 1, rtol=0, atol=3e-6)
        np.testing.assert_array_equal(np.sort(row.top_ids, axis=1), [range(CONFIG.n_vocab)])
        assert (np.diff(row.top, axis=1) <= 0).all()


def test_a_tie_goes_to_the_lower_id():
    config, params = chosen_logits([1.0, 2.0, 0.5, 2.0, 1.0])
    _, [row] = gpt2_jax.generate(config, params, [[0]], 1, logprobs=5)
    assert row.top_ids.tolist() == [[1, 3, 0, 4, 2]]


def test_logprobs_end_with_their_row(params, tokenizer):
    """Rows that stopped have as many log-probabilities as ids. They are the same as without the stop."""
    whole, whole_logprobs = gpt2_jax.generate(CONFIG, params, PROMPTS, 17, seed=6, logprobs=5)
    stops = {whole[0][3]}
    rows, logprobs = gpt2_jax.generate(CONFIG, params, PROMPTS, 17, seed=6, logprobs=5, stop_ids=stops)
    assert rows == [naive.cut_at_ids(row, stops) for row in whole]
    assert_begins(logprobs, rows, whole_logprobs)
    text_params = random_params(TEXT_CONFIG, 1, scale=0.2)
    knobs = {"seed": 6, "logprobs": 2}
    whole, whole_logprobs = gpt2_jax.generate(TEXT_CONFIG, text_params, [[5]], N_SAID, **knobs)
    knobs |= {"stop_strings": ["zz", tokenizer.decode(whole[0][40:42]).strip("\ufffd")], "tokenizer": tokenizer}
    rows, logprobs = gpt2_jax.generate(TEXT_CONFIG, text_params, [[5]], N_SAID, **knobs)
    assert len(rows[0]) <= 41
    assert_begins(logprobs, rows, whole_logprobs)


def assert_begins(logprobs, rows, whole_logprobs):
    for row, ids, whole in zip(logprobs, rows, whole_logprobs, strict=True):
        for name in ("chosen", "top_ids", "top"):
            np.testing.assert_array_equal(getattr(row, name), getattr(whole, name)[: len(ids)])


def test_logprobs_while_sliding(params):
    """Beyond n_ctx they are those of the row's window. The error against float64 is 1.4e-5 at most."""
    rows, logprobs = gpt2_jax.generate(CONFIG, params, PROMPTS, 71, seed=7, overflow="slide", logprobs=5)
    for prompt, ids, row in zip(PROMPTS, rows, logprobs, strict=True):
        logprobs_nV = expected(CONFIG, params, prompt, ids)
        chosen = np.take_along_axis(logprobs_nV, np.array(ids)[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(row.chosen, chosen, rtol=0, atol=3e-5)


# ---- real text, and bfloat16


@pytest.fixture(scope="module")
def after_real_text(shakespeare, reference):
    """The embedded model's first token after 24 or 64 prompts, all its log-probabilities, and the same in bfloat16."""
    prompts = [row[:n].tolist() for row in reference["tokens"] for n in range(66, 97, campaign(6, 2))]
    config, params = shakespeare
    half = config.replace(param_dtype="bfloat16", compute_dtype="bfloat16")
    half_params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    settings = {"max_new_tokens": 1, "temperature": 0, "logprobs": config.n_vocab}
    return (
        prompts,
        gpt2_jax.generate(config, params, prompts, **settings),
        gpt2_jax.generate(half, half_params, prompts, **settings),
    )


def test_logprobs_of_the_embedded_model(shakespeare, after_real_text):
    """All 1,281 log-probabilities after real text, against float64.

    The difference is the rounding of the logits. Relative to the largest, 16.9, it is 2.3e-7 with jax 0.10 and 7.1e-7
    with jax 0.12; the bound is 1.8e-6.
    """
    prompts, (rows, logprobs), _ = after_real_text
    for i in range(0, len(prompts), 7):
        [logprobs_V] = expected(*shakespeare, prompts[i], rows[i])
        [ids_V] = logprobs[i].top_ids
        np.testing.assert_allclose(logprobs[i].top[0], logprobs_V[ids_V], rtol=0, atol=3e-5)  # measured 1.2e-5
        assert rows[i] == [np.argmax(logprobs_V)] == [ids_V[0]]


def test_bfloat16_mostly_chooses_as_float32(after_real_text):
    """Weights and compute in bfloat16 choose what float32 chooses after real text: measured, all of 64 tokens."""
    _, (rows, _), (half_rows, _) = after_real_text
    assert np.mean(np.ravel(rows) == np.ravel(half_rows)) > 0.95


def test_bfloat16_normalises_in_float32(after_real_text):
    """Logits and softmax stay float32: probabilities sum to 1 far more exactly than bfloat16's 1/256, and bfloat16
    cannot hold most of their logarithms."""
    _, _, (_, logprobs) = after_real_text
    for row in logprobs:
        assert row.top.dtype == np.float32
        np.testing.assert_allclose(np.exp(row.top.astype(np.float64)).sum(), 1, rtol=0, atol=1e-5)
    top = np.concatenate([row.top[0] for row in logprobs])
    assert np.mean(top == top.astype(jnp.bfloat16).astype(np.float32)) < 0.01


def test_bfloat16_decodes_and_slides():
    """Prefill, decoding, merging and sampling run in bfloat16 too."""
    config = CONFIG.replace(param_dtype="bfloat16", compute_dtype="bfloat16", n_layer=1)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(config, 0))
    [row] = gpt2_jax.generate(config, params, [[7] * 19], 71, overflow="slide", seed=2, top_p=0.9)
    assert len(row) == 71
    assert all(0 <= i < config.n_vocab for i in row)
    assert len(set(row)) > 5


# ---- rejected arguments


@pytest.mark.parametrize("k", [-1, 2.5, 3.0, "3", True, CONFIG.n_vocab + 1, 10**9])
def test_wrong_numbers_of_alternatives_are_refused(k):
    """One sentence with the argument and the value, before anything is traced; k may not exceed the vocabulary."""
    with pytest.raises(ValueError, match="logprobs") as caught:
        gpt2_jax.generate(CONFIG, UNTOUCHED, [[1]], 3, logprobs=k)
    assert str(k) in str(caught.value)
    assert "\n" not in str(caught.value)
