"""token_logprobs against NumPy in float64."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.sampling import token_logprobs

run = jax.jit(token_logprobs, static_argnames="n_top")
BOUND = 8e-6  # measured up to 2.9e-6, of logprobs down to -33: a unit and a half in the last place


def reference(logits_BV):
    logits_BV = logits_BV.astype(np.float64)
    shifted_BV = logits_BV - logits_BV.max(-1, keepdims=True)
    return shifted_BV - np.log(np.exp(shifted_BV).sum(-1, keepdims=True))


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.sampled_from([0, 1, 5, 131]), st.booleans())
def test_logprobs_equal_numpy(seed, n_top, ties):
    rng = np.random.default_rng(seed)
    logits_BV = rng.normal(scale=4, size=(3, 131)).astype(np.float32)
    logits_BV = np.round(logits_BV) + np.float32(0) if ties else logits_BV  # without -0.0, which is less than 0.0 here
    token_B = rng.integers(0, 131, 3)
    expected_BV = reference(logits_BV)
    chosen_B, top_id_BK, top_BK = map(np.asarray, run(logits_BV, token_B, n_top=n_top))
    assert (chosen_B.dtype, top_id_BK.dtype, top_BK.dtype) == (np.float32, np.int32, np.float32)
    np.testing.assert_allclose(chosen_B, expected_BV[np.arange(3), token_B], rtol=0, atol=BOUND)
    order_BV = np.argsort(-logits_BV, axis=-1, kind="stable")  # the lower id first in a tie
    assert top_id_BK.tolist() == order_BV[:, :n_top].tolist()
    np.testing.assert_allclose(top_BK, np.take_along_axis(expected_BV, top_id_BK, -1), rtol=0, atol=BOUND)


def test_likely_tokens_by_hand():
    logits_BV = np.log(np.array([[0.1, 0.4, 0.1, 0.4], [0.7, 0.1, 0.1, 0.1]], np.float32)) + 3
    chosen_B, top_id_BK, top_BK = run(logits_BV, np.array([2, 0]), n_top=3)
    np.testing.assert_allclose(np.exp(chosen_B), [0.1, 0.7], rtol=1e-6)
    assert top_id_BK.tolist() == [[1, 3, 0], [0, 1, 2]]
    np.testing.assert_allclose(np.exp(top_BK), [[0.4, 0.4, 0.1], [0.7, 0.1, 0.1]], rtol=1e-6)


@pytest.mark.parametrize("offset", [-1e4, 0, 1e4])
def test_large_logits_overflow_nothing(offset):
    logits_BV = np.array([[0.0, -1.0, -300.0]], np.float32) + np.float32(offset)
    chosen_B, _, top_BK = run(logits_BV, np.array([2]), n_top=3)
    expected_BV = reference(logits_BV)
    np.testing.assert_allclose(chosen_B, expected_BV[:, 2], rtol=2e-5)
    np.testing.assert_allclose(top_BK, expected_BV, rtol=2e-3)  # 1e4 has no more digits


def test_float64_logits_are_summed_in_float64():
    """The sum is computed in float64. Only the result is rounded to float32."""
    logits_BV = np.random.default_rng(0).normal(scale=4, size=(3, 131))
    with jax.enable_x64(True):
        chosen_B, _, top_BK = run(logits_BV, np.array([1, 5, 130]), n_top=4)
    assert chosen_B.dtype == top_BK.dtype == np.float32
    np.testing.assert_array_equal(chosen_B, reference(logits_BV)[np.arange(3), [1, 5, 130]].astype(np.float32))


def test_no_second_array_of_the_logits_size_is_kept():
    """The result is a few numbers per row, and the program makes no copy of the logits."""
    shape = jax.ShapeDtypeStruct((8, 50257), np.float32)
    lowered = jax.jit(functools.partial(token_logprobs, n_top=5)).lower(shape, jax.ShapeDtypeStruct((8,), np.int32))
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.1 * 8 * 50257 * 4


def test_ids_from_n_ids_on_are_no_alternatives_and_keep_their_probability():
    logits_BV = np.random.default_rng(7).normal(size=(3, 50304)).astype(np.float32)
    logits_BV[:, 50257:] = 9
    expected_BV = reference(logits_BV)
    chosen_B, top_id_BK, top_BK = map(np.asarray, run(logits_BV, np.array([3, 50256, 7]), 5, np.int32(50257)))
    assert top_id_BK.tolist() == np.argsort(-logits_BV[:, :50257], axis=-1, kind="stable")[:, :5].tolist()
    np.testing.assert_allclose(chosen_B, expected_BV[range(3), [3, 50256, 7]], rtol=0, atol=BOUND)
    np.testing.assert_allclose(top_BK, np.take_along_axis(expected_BV, top_id_BK, -1), rtol=0, atol=BOUND)
