"""sampling.py against the original's rules, worked out in NumPy and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax import sampling
from gpt2_jax.sampling import FILTERED, Sampling

filter_logits = jax.jit(sampling.filter_logits)
pick = jax.jit(sampling.pick)


def knobs(temperature=1.0, top_k=0, top_p=1.0):
    return Sampling(np.float32(temperature), np.int32(top_k), np.float32(top_p))


def kept(probabilities, top_k=0, top_p=1.0):
    logits = jnp.log(jnp.asarray([probabilities], jnp.float32))
    return np.flatnonzero(np.asarray(filter_logits(logits, np.int32(top_k), np.float32(top_p)))[0] > FILTERED).tolist()


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (0, 1.0, [0, 1, 2, 3, 4]),
        (1, 1.0, [2]),
        (2, 1.0, [1, 2]),
        (3, 1.0, [0, 1, 2, 3]),  # 0 and 3 tie with the third
        (5, 1.0, [0, 1, 2, 3, 4]),
        (99, 1.0, [0, 1, 2, 3, 4]),
        (0, 0.01, [2]),  # at least one token
        (0, 0.55, [2]),  # the token that crosses p stays out: 0.40, then 0.65
        (0, 0.70, [1, 2]),
        (0, 0.80, [0, 1, 2, 3]),  # 0.40, 0.65, 0.79, 0.93: the third ties with the fourth, which stays
        (0, 0.94, [0, 1, 2, 3]),
        (2, 0.50, [2]),  # top-k first: 0.40 and 0.25 are 0.615 and 0.385 of what is left
        (2, 0.62, [2]),
        (1, 0.99, [2]),
    ],
)
def test_filters_on_a_distribution_worked_out_by_hand(top_k, top_p, expected):
    assert kept([0.14, 0.25, 0.40, 0.14, 0.07], top_k, top_p) == expected


def test_top_p_keeps_a_prefix_of_exactly_p():
    """At most p, and not less than p: p is the very float32 sum that the first two of these add up to."""
    logits_V = jnp.asarray([0.0, 1.0, 2.0, -1.0])
    exact = float(jnp.cumsum(jax.nn.softmax(-jnp.sort(-logits_V)))[1])
    below = float(np.nextafter(np.float32(exact), np.float32(0)))
    assert (np.asarray(filter_logits(logits_V[None], np.int32(0), np.float32(exact)))[0] > FILTERED).sum() == 2
    assert (np.asarray(filter_logits(logits_V[None], np.int32(0), np.float32(below)))[0] > FILTERED).sum() == 1


def original_filter(logits, top_k, top_p):
    """Apply the two filters of one row as FACTS of the original's sample.py have it, in float64."""
    logits = logits.astype(np.float64)
    if top_k:
        logits = np.where(logits < np.sort(logits)[-min(top_k, len(logits))], -1e10, logits)
    if top_p < 1:
        ordered = np.sort(logits)[::-1]
        exps = np.exp(ordered - ordered[0])
        n_kept = max(int((np.cumsum(exps / exps.sum()) <= top_p).sum()), 1)
        logits = np.where(logits < ordered[n_kept - 1], -1e10, logits)
    return logits > -1e10


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 140), st.floats(0.05, 1), st.booleans())
def test_filters_keep_what_the_original_keeps(seed, top_k, top_p, ties):
    rng = np.random.default_rng(seed)
    logits_BV = rng.normal(scale=3, size=(3, 131)).astype(np.float32)
    if ties:
        logits_BV = np.round(logits_BV)
    top_p = float(np.float32(top_p))
    got_BV = np.asarray(filter_logits(jnp.asarray(logits_BV), np.int32(top_k), np.float32(top_p)))
    for logits_V, got_V in zip(logits_BV, got_BV, strict=True):
        low = original_filter(logits_V, top_k, top_p - 2e-6) if top_p < 1 else original_filter(logits_V, top_k, 1)
        high = original_filter(logits_V, top_k, top_p + 2e-6) if top_p < 1 else low
        keep_V = got_V > FILTERED
        assert (low <= keep_V).all()  # between the two lies what float32's cumulative sum can round either way
        assert (keep_V <= high).all()
        np.testing.assert_array_equal(got_V[keep_V], logits_V[keep_V])


def test_temperature_zero_takes_the_most_likely_and_the_lowest_id_of_a_tie():
    logits_BV = jnp.asarray([[0.0, 3.0, 3.0], [2.0, 1.0, -1.0]])
    key_B = jax.random.split(jax.random.key(0), 2)
    assert pick(logits_BV, key_B, knobs(temperature=0)).tolist() == [1, 0]
    assert pick(logits_BV, key_B, knobs(temperature=1e-30)).tolist()[1] == 0  # no overflow on the way down


def test_nan_is_told_apart_in_its_row_alone():
    logits_BV = jnp.asarray([[0.0, jnp.nan, 3.0], [2.0, 1.0, -1.0]])
    key_B = jax.random.split(jax.random.key(0), 2)
    for temperature in (0, 1):
        token_B = pick(logits_BV, key_B, knobs(temperature))
        assert token_B[0] == -1
        assert token_B[1] >= 0


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.9, 5, 1.0), (1.0, 0, 0.8), (1.3, 7, 0.6)]
)
def test_frequencies_are_those_of_the_distribution(temperature, top_k, top_p):
    """Chi-square over 20,011 draws from eleven tokens; fixed seed, so it passes always or never."""
    logits_V = np.random.default_rng(1).normal(scale=1.5, size=11).astype(np.float32)
    n_draws = 20_011
    key_B = jax.random.split(jax.random.key(7), n_draws)
    token_B = pick(jnp.broadcast_to(logits_V, (n_draws, 11)), key_B, knobs(temperature, top_k, top_p))
    keep_V = original_filter(logits_V / temperature, top_k, top_p)
    p_V = np.where(keep_V, np.exp(logits_V / temperature), 0)
    p_V = p_V / p_V.sum()
    counts_V = np.bincount(np.asarray(token_B), minlength=11)
    assert (counts_V[~keep_V] == 0).all()
    expected_V = n_draws * p_V[keep_V]
    chi_square = ((counts_V[keep_V] - expected_V) ** 2 / expected_V).sum()
    assert chi_square < 29.6  # the 0.1 % point of chi-square with 10 degrees of freedom, the most there can be
