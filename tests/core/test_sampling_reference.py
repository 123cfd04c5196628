"""The filters against a plain reading of their rules in float64, on random logits with and without ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_reference import reference_filter

from gpt2_jax import sampling
from gpt2_jax.sampling import FILTERED, Sampling

filter_logits = jax.jit(sampling.filter_logits)
threshold = jax.jit(sampling._threshold)


def some_logits(seed, n_rows, n_vocab, ties):
    logits_BV = np.random.default_rng(seed).normal(scale=3, size=(n_rows, n_vocab))
    return np.round(logits_BV) if ties else logits_BV


def assert_kept_within(logits_BV, band, **knobs):
    """The kept tokens are between those of the rules at p - band and p + band. Kept logits are unchanged."""
    dtype = logits_BV.dtype
    got_BV = np.asarray(
        filter_logits(
            logits_BV,
            Sampling(
                np.float32(1),
                np.int32(knobs["top_k"]),
                np.float32(knobs["top_p"]),
                np.float32(knobs["min_p"]),
                keep_crossing=np.bool_(knobs["rule"] == "common"),
            ),
        )
    )
    assert got_BV.dtype == dtype
    for logits_V, got_V in zip(logits_BV, got_BV, strict=True):
        fewer, more = dict(knobs), dict(knobs)
        if knobs["top_p"] < 1:
            fewer["top_p"], more["top_p"] = (knobs["top_p"] - band, min(knobs["top_p"] + band, 1 - 1e-15))
        fewer["min_p"], more["min_p"] = knobs["min_p"] * (1 + band), knobs["min_p"] * (1 - band)
        if knobs["min_p"] == 1:
            fewer["min_p"] = 1
        keep_V = got_V > FILTERED
        assert keep_V[logits_V == logits_V.max()].all()
        assert (reference_filter(logits_V, **fewer) <= keep_V).all()
        assert (keep_V <= reference_filter(logits_V, **more)).all()
        np.testing.assert_array_equal(got_V[keep_V], logits_V[keep_V])


KNOBS = {
    "seed": st.integers(0, 2**31),
    "top_k": st.just(0) | st.integers(0, 140),
    "top_p": st.just(1.0) | st.floats(2**-5, 1, width=32),
    "min_p": st.just(0.0) | st.floats(2**-20, 1, width=32),
    "rule": st.sampled_from(["original", "common"]),
    "ties": st.booleans(),
}


@given(**KNOBS)
def test_filters_keep_what_the_rules_keep(seed, ties, **knobs):
    """Float32 may change tokens within 1e-6 of p. Measured for p next to a sum: at most 3.5e-7, min_p 4.6e-7."""
    assert_kept_within(some_logits(seed, 3, 131, ties).astype(np.float32), 1e-6, **knobs)


@settings(max_examples=7)
@given(**KNOBS)
def test_filters_keep_what_the_rules_keep_of_a_whole_vocabulary(seed, ties, **knobs):
    """The same with GPT-2's 50,257 tokens."""
    assert_kept_within(some_logits(seed, 2, 50257, ties).astype(np.float32), 1e-6, **knobs)


@settings(max_examples=50)
@given(**KNOBS)
def test_filters_are_exact_in_float64(seed, ties, **knobs):
    with jax.enable_x64(True):
        assert_kept_within(some_logits(seed, 3, 131, ties), 1e-14, **knobs)


# ---- the search for a threshold

FLOATS = st.floats(width=32, allow_nan=False, allow_subnormal=False)  # XLA treats subnormals as zeros


def smallest_with_less_above(x, mass, limit):
    return min((t for t in x if mass[x > t].sum() < limit), default=max(x))


@given(st.lists(FLOATS, min_size=1, max_size=13), st.integers(1, 13), st.integers(0, 2**31))
def test_threshold_is_the_smallest_element_with_less_above(values, limit, seed):
    """Over all floats, with infinities and zeros of both signs. -inf is not an element unless there is nothing else."""
    x = np.resize(np.array(values, np.float32), 13)  # repeated: ties
    mass = np.random.default_rng(seed).integers(1, 4, 13).astype(np.int32)
    got = float(threshold(x[None], mass[None], jnp.int32(limit), x.max(keepdims=True)[None])[0, 0])
    expected = smallest_with_less_above(x[x > -np.inf], mass[x > -np.inf], limit) if x.max() > -np.inf else -np.inf
    assert got == expected


@given(st.lists(FLOATS, min_size=2, max_size=30))
def test_floats_as_whole_numbers_keep_their_order(values):
    x = np.sort(np.array(values, np.float32))
    i = np.asarray(sampling._as_int(jnp.asarray(x)))
    assert i.dtype == np.int32
    np.testing.assert_array_equal(np.asarray(sampling._as_float(jnp.asarray(i), jnp.dtype("float32"))), x)
    assert (i[1:] > i[:-1])[x[1:] > x[:-1]].all()
    assert (i[1:] == i[:-1])[(x[1:] == x[:-1]) & (x[1:] != 0)].all()


@given(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1))
def test_the_middle_never_overflows(low, high):
    low, high = min(low, high), max(low, high)
    assert int(sampling._middle(jnp.int32(low), jnp.int32(high))) == (low + high) // 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_neighbouring_floats_are_told_apart(dtype):
    """The search ends at the exact float: the k-th and the next float below it are different tokens."""
    with jax.enable_x64(dtype == "float64"):
        x = np.array([3.0], dtype)
        for _ in range(9):
            x = np.append(x, np.nextafter(x[-1], x.dtype.type(0)))
        for k in range(1, 10):
            got = filter_logits(x[None], Sampling(np.float32(1), np.int32(k)))
            assert (np.asarray(got)[0] > FILTERED).tolist() == [True] * k + [False] * (10 - k)
