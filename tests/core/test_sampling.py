"""sampling.py on cases worked out by hand: what each rule keeps, the greedy choice, the penalty, what compiles."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from measures import COMPILATIONS, equations
from sampling_reference import keys, knobs
from strength import campaign

from gpt2_jax import sampling
from gpt2_jax.sampling import FILTERED, NO_LOGITS

filter_logits = jax.jit(sampling.filter_logits)
pick = jax.jit(sampling.pick)


def kept(probabilities, **settings):
    """Return the ids that the filters keep, after checking that their logits are unchanged."""
    with np.errstate(divide="ignore"):
        logits_1V = np.log(np.asarray([probabilities], np.float32))
    got_V = np.asarray(filter_logits(logits_1V, knobs(**settings)))[0]
    ids = np.flatnonzero(got_V > FILTERED)
    np.testing.assert_array_equal(got_V[ids], logits_1V[0, ids])
    return ids.tolist()


# ---- which tokens stay

EVERYONE = [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("top_k", "top_p", "original", "common"),
    [
        (0, 1.0, EVERYONE, EVERYONE),
        (1, 1.0, [2], [2]),
        (2, 1.0, [1, 2], [1, 2]),
        (3, 1.0, [0, 1, 2, 3], [0, 1, 2, 3]),  # 0 and 3 tie with the third
        (4, 1.0, [0, 1, 2, 3], [0, 1, 2, 3]),
        (5, 1.0, EVERYONE, EVERYONE),
        (99, 1.0, EVERYONE, EVERYONE),
        (0, 1e-30, [2], [2]),  # at least one token
        (0, 0.01, [2], [2]),
        (0, 0.39, [2], [2]),
        (0, 0.41, [2], [1, 2]),  # the token that crosses p: 0.40, then 0.65
        (0, 0.64, [2], [1, 2]),
        (0, 0.66, [1, 2], [0, 1, 2, 3]),  # 0.40, 0.65, 0.79, 0.93: the fourth ties with the third and stays
        (0, 0.78, [1, 2], [0, 1, 2, 3]),
        (0, 0.80, [0, 1, 2, 3], [0, 1, 2, 3]),
        (0, 0.92, [0, 1, 2, 3], [0, 1, 2, 3]),
        (0, 0.94, [0, 1, 2, 3], EVERYONE),
        (0, 0.999, [0, 1, 2, 3], EVERYONE),
        (2, 0.50, [2], [2]),  # top-k first: 0.40 and 0.25 are 0.615 and 0.385 of the rest
        (2, 0.61, [2], [2]),
        (2, 0.62, [2], [1, 2]),
        (3, 0.42, [2], [2]),  # the four that top-k 3 keeps: 0.430, 0.269, 0.151, 0.151
        (3, 0.44, [2], [1, 2]),
        (3, 0.71, [1, 2], [0, 1, 2, 3]),
        (1, 0.99, [2], [2]),
    ],
)
def test_top_k_and_top_p_on_a_distribution_worked_out_by_hand(top_k, top_p, original, common):
    probabilities = [0.14, 0.25, 0.40, 0.14, 0.07]
    assert kept(probabilities, top_k=top_k, top_p=top_p) == original
    assert kept(probabilities, top_k=top_k, top_p=top_p, rule="common") == common


@pytest.mark.parametrize(
    ("others", "min_p", "expected"),
    [
        ({}, 1e-30, EVERYONE),
        ({}, 0.17, EVERYONE),  # 0.07 / 0.40 = 0.175
        ({}, 0.18, [0, 1, 2, 3]),
        ({}, 0.34, [0, 1, 2, 3]),  # 0.14 / 0.40 = 0.35: both
        ({}, 0.36, [1, 2]),
        ({}, 0.62, [1, 2]),
        ({}, 0.63, [2]),
        ({}, 1.0, [2]),
        ({"top_k": 2}, 0.34, [1, 2]),
        ({"top_p": 0.70}, 0.34, [1, 2]),
        ({"top_p": 0.70, "rule": "common"}, 0.34, [0, 1, 2, 3]),
        ({"top_p": 0.70, "rule": "common"}, 0.36, [1, 2]),
        ({"top_p": 0.70, "top_k": 3}, 0.63, [2]),
    ],
)
def test_min_p_on_a_distribution_worked_out_by_hand(others, min_p, expected):
    assert kept([0.14, 0.25, 0.40, 0.14, 0.07], min_p=min_p, **others) == expected


@pytest.mark.parametrize(
    ("p", "below", "at", "above"),
    [
        (0.5, ([0], [0]), ([0], [0]), ([0], [0, 1])),
        (0.75, ([0], [0, 1]), ([0, 1], [0, 1]), ([0, 1], [0, 1, 2, 3])),
        (0.875, ([0, 1], [0, 1, 2, 3]), ([0, 1, 2, 3], [0, 1, 2, 3]), ([0, 1, 2, 3], [0, 1, 2, 3])),
    ],
)
def test_top_p_to_the_last_bit_where_sums_are_exact(p, below, at, above):
    """Probabilities of halves and eighths: a sum of exactly p is at most p (original), and not less than p (common)."""
    probabilities = np.array([0.5, 0.25, 0.125, 0.125], np.float32)
    logits = jnp.log(probabilities)
    if (jax.jit(jnp.exp)(logits - logits[0]) != 2 * probabilities).any():
        pytest.skip("this device's exp rounds these")
    for top_p, expected in ((np.nextafter(np.float32(p), 0), below), (p, at), (np.nextafter(np.float32(p), 1), above)):
        rules = [kept(probabilities, top_p=top_p, rule=rule) for rule in ("original", "common")]
        assert rules == list(expected), top_p


@pytest.mark.parametrize("rule", ["original", "common"])
@pytest.mark.parametrize(
    ("probabilities", "settings", "expected"),
    [
        ([1.0], {"top_k": 1, "top_p": 0.5, "min_p": 0.5}, [0]),  # one token
        ([1.0], {"top_k": 9, "top_p": 1e-9, "min_p": 1.0}, [0]),
        ([0.25] * 4, {"top_k": 1}, [0, 1, 2, 3]),  # all tie
        ([0.25] * 4, {"top_p": 0.1}, [0, 1, 2, 3]),
        ([0.25] * 4, {"min_p": 1.0}, [0, 1, 2, 3]),
        ([0.0, 0.7, 0.3, 0.0], {"top_k": 3}, [1, 2]),  # -inf is not a token, for any k
        ([0.0, 0.7, 0.3, 0.0], {"top_p": 0.6}, [1]),
        ([0.0, 0.7, 0.3, 0.0], {"top_k": 1, "top_p": 0.9}, [1]),
    ],
)
def test_corners(rule, probabilities, settings, expected):
    assert kept(probabilities, **settings, rule=rule) == expected


def test_zeros_of_both_signs_tie():
    """0.0 and -0.0 are two neighbors for the bisection, but one logit."""
    for zeros in ([0.0, -0.0], [-0.0, 0.0]):
        logits_1V = np.array([[-3.0, *zeros, -1.0]], np.float32)
        for settings in ({"top_k": 1}, {"top_p": 0.1}, {"top_p": 0.1, "rule": "common"}, {"min_p": 1.0}):
            assert (np.asarray(filter_logits(logits_1V, knobs(**settings)))[0] > FILTERED).tolist() == [0, 1, 1, 0]


def test_what_is_filtered_already_stays_so():
    logits_1V = np.array([[1.0, FILTERED, 0.5, FILTERED, 0.0]], np.float32)
    for settings in ({"top_k": 3}, {"top_k": 4}, {"top_p": 0.95}, {"top_p": 0.95, "rule": "common"}, {"min_p": 0.01}):
        got_V = np.asarray(filter_logits(logits_1V, knobs(**settings)))[0]
        assert (got_V[[1, 3]] == FILTERED).all()
        assert got_V[0] == 1


def test_each_row_has_its_own_threshold():
    probabilities = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7], [0.25] * 4, [0.05, 0.9, 0.03, 0.02]])
    got_BV = filter_logits(np.log(probabilities).astype(np.float32), knobs(top_p=0.75))
    assert (np.asarray(got_BV) > FILTERED).tolist() == [[1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 0, 0]]


# ---- the greedy choice, and unusual logits


def test_temperature_zero_takes_the_most_likely_and_the_lowest_id_of_a_tie():
    logits_BV = jnp.asarray([[0.0, 3.0, 3.0], [2.0, 1.0, -1.0]])
    assert pick(logits_BV, keys(2), knobs(temperature=0)).tolist() == [1, 0]
    assert pick(logits_BV, keys(2), knobs(temperature=1e-30)).tolist()[1] == 0  # no overflow on the way down


def test_greedy_is_argmax():
    logits_BV = np.random.default_rng(0).normal(size=(7, 1733)).round(1).astype(np.float32)
    got = pick(logits_BV, keys(7), knobs(temperature=0, top_k=3, top_p=0.5, min_p=0.5))
    assert got.dtype == np.int32
    assert got.tolist() == logits_BV.argmax(-1).tolist()


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"top_p": 0.5, "rule": "common", "min_p": 0.1}],
    ids=str,
)
def test_nan_is_told_apart_in_its_row_alone(settings):
    nan = jnp.nan
    logits_BV = jnp.asarray([[0.0, nan, 3.0], [2.0, 1.0, -1.0], [nan, nan, nan], [nan, 1.0, 2.0], [-nan, 0.0, 1.0]])
    token_B = pick(logits_BV, keys(5), knobs(**settings)).tolist()
    assert token_B.pop(1) in range(3)
    assert token_B == [NO_LOGITS] * 4


# XLA's max over an axis keeps NaN below 4,096 elements on a CPU, and skips it from there on.
SIZES = [(1, 37), (1, 4095), (3, 4095), (1, 4096), (1, 50304), (3, 50257)]
NO_SOFTMAX = {
    "nan": ([0, 0.5, 1], np.nan), "nan with its sign set": ([0.5], -np.nan), "all nan": (slice(None), np.nan),
    "inf": ([0, 0.5, 1], np.inf), "all inf": (slice(None), np.inf), "all -inf": (slice(None), -np.inf),
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", campaign(["float32"], ["float32", "float64"]))
def test_logits_without_probabilities_are_found_at_every_size(size, dtype):
    """Wherever the value is, for each way to choose. The other rows are not affected."""
    n_rows, n_vocab = size
    with jax.enable_x64(dtype == "float64"):
        plain_BV = np.random.default_rng(3).normal(size=size).astype(dtype)
        for places, value in NO_SOFTMAX.values():
            for place in [places] if isinstance(places, slice) else [round(at * (n_vocab - 1)) for at in places]:
                logits_BV, seen_BV = plain_BV.copy(), np.ones(size, bool)
                logits_BV[-1, place] = value
                for settings in EACH_WAY:
                    token_B = pick(logits_BV, keys(n_rows), knobs(**settings), seen_BV).tolist()
                    assert token_B.pop() == NO_LOGITS, (value, place, settings)
                    assert all(0 <= token < n_vocab for token in token_B)


EACH_WAY = [
    {"temperature": 0}, {}, {"top_k": 40}, {"top_p": 0.5, "rule": "common"}, {"min_p": 0.1},
    {"temperature": 0, "repetition_penalty": 1.3}, {"repetition_penalty": 0.8, "top_p": 0.9},
]  # fmt: skip


@pytest.mark.parametrize("n_vocab", [37, 50304])
def test_ids_from_n_ids_on_are_never_chosen(n_vocab):
    """Even if their logits are the largest. The choice is that among the first n_ids logits alone."""
    n_ids = n_vocab - 5
    logits_BV = np.random.default_rng(4).normal(size=(3, n_vocab)).astype(np.float32)
    logits_BV[:, n_ids:] = 99
    seen_BV = logits_BV > 1
    for settings in EACH_WAY:
        fewer = dataclasses.replace(knobs(**settings), n_ids=np.int32(n_ids))
        chosen_B = np.asarray(pick(logits_BV, keys(3), fewer, seen_BV))
        assert (chosen_B < n_ids).all()
        hidden_BV = np.where(np.arange(n_vocab) < n_ids, logits_BV, -np.inf)
        np.testing.assert_array_equal(chosen_B, pick(hidden_BV, keys(3), knobs(**settings), seen_BV))
    for wrong in (np.nan, np.inf):
        logits_BV[1, -1] = wrong
        assert (np.asarray(pick(logits_BV, keys(3), fewer, seen_BV)) == NO_LOGITS).tolist() == [False, True, False]


@pytest.mark.parametrize("temperature", [0, 1e-38, 1e-45, 1, 3e38])
def test_infinite_logits_are_no_other_tokens(temperature):
    inf = jnp.inf
    logits_BV = jnp.asarray([[0.0, -inf, -80.0], [-inf, -inf, 1.0], [0.0, inf, 3.0], [-inf, -inf, -inf]])
    for settings in ({}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.5}):
        token_B = pick(logits_BV, keys(4), knobs(min(temperature, 1), **settings)).tolist()
        assert token_B == [0, 2, NO_LOGITS, NO_LOGITS], settings
        assert pick(logits_BV, keys(4), knobs(temperature, **settings)).tolist()[1:] == token_B[1:]


@pytest.mark.parametrize("temperature", [1e-38, 1e-20, 1e-5])
def test_next_to_zero_the_draw_is_greedy(temperature):
    logits_BV = np.random.default_rng(2).normal(size=(11, 131)).astype(np.float32)
    for settings in ({}, {"top_k": 5, "top_p": 0.9}, {"top_p": 0.9, "rule": "common"}, {"min_p": 0.1}):
        assert pick(logits_BV, keys(11), knobs(temperature, **settings)).tolist() == logits_BV.argmax(-1).tolist()


# ---- the penalty


def penalised_choice(logits, seen, penalty, **settings):
    return pick(
        jnp.asarray([logits]), keys(1), knobs(0, repetition_penalty=penalty, **settings), jnp.asarray([seen])
    ).tolist()[0]


@pytest.mark.parametrize(
    ("logits", "seen", "penalty", "expected"),
    [
        ([2.0, 1.5, 1.0], [True, False, False], 1.0, 0),
        ([2.0, 1.5, 1.0], [True, False, False], 1.3, 0),  # 1.54
        ([2.0, 1.5, 1.0], [True, False, False], 1.4, 1),  # 1.43
        ([2.0, 1.5, 1.0], [True, True, False], 2.1, 2),  # 0.95 and 0.71
        ([2.0, 1.5, 1.0], [True, True, True], 9.0, 0),  # all alike: the order stays
        ([-1.0, -1.5, -2.0], [True, False, False], 1.4, 0),  # -1.4: a negative one is multiplied
        ([-1.0, -1.5, -2.0], [True, False, False], 1.6, 1),
        ([-1.0, -1.5, -2.0], [False, False, True], 0.4, 2),  # below 1 it makes a token more likely: -0.8
        ([2.0, 1.5, 1.0], [False, False, True], 0.4, 2),  # 2.5
        ([0.0, -0.5, -1.0], [True, False, False], 99.0, 0),  # 0 stays 0
        ([2.0, -1.5, 1.0], [True, True, True], 1e30, 0),
    ],
)
def test_penalty_by_hand(logits, seen, penalty, expected):
    assert penalised_choice(logits, seen, penalty) == expected


@pytest.mark.parametrize("penalty", [1.2e-38, 3e38])
@pytest.mark.parametrize("temperature", [0, 1])
def test_no_penalty_makes_a_logit_infinite_or_nan(penalty, temperature):
    logits_BV = jnp.asarray([[50.0, 40.0, -30.0], [-50.0, -40.0, -30.0]])
    for seen in (True, False):
        settings = knobs(temperature, top_k=2, top_p=0.9, repetition_penalty=penalty)
        token_B = pick(logits_BV, keys(2), settings, jnp.full((2, 3), seen))
        assert all(token in range(3) for token in token_B.tolist())


def test_penalty_comes_before_the_filters():
    """The most likely token, once seen, is third: top-k 2 drops it. Top-k before the penalty would keep it."""
    logits_BV = jnp.broadcast_to(jnp.asarray([3.0, 2.0, 1.9, -5.0]), (997, 4))
    seen_BV = jnp.broadcast_to(jnp.asarray([True, False, False, False]), (997, 4))
    drawn = pick(logits_BV, keys(997), knobs(top_k=2, repetition_penalty=2.0), seen_BV)
    assert set(drawn.tolist()) == {1, 2}


def test_penalty_is_not_in_force_at_one():
    logits_BV = np.random.default_rng(4).normal(size=(13, 131)).astype(np.float32)
    seen_BV = np.random.default_rng(5).random((13, 131)) < 0.5
    for settings in ({}, {"top_p": 0.7}, {"temperature": 0}):
        with_seen = pick(logits_BV, keys(13), knobs(**settings), seen_BV)
        assert with_seen.tolist() == pick(logits_BV, keys(13), knobs(**settings)).tolist()


# ---- what compiles, and what runs

SETTINGS = [
    {"temperature": 0}, {"temperature": 0.7}, {"temperature": 3}, {"top_k": 1}, {"top_k": 40}, {"top_k": 999},
    {"top_p": 0.9}, {"top_p": 0.9, "rule": "common"}, {"min_p": 0.1}, {"repetition_penalty": 1.3},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 0.9, "rule": "common"},
]  # fmt: skip


def test_knobs_compile_nothing():
    """Without a kind, all settings share one program. With the narrowest kind of each, there are two more."""
    logits_BV = np.random.default_rng(6).normal(size=(3, 137)).astype(np.float32)
    seen_BV, key_B = np.zeros((3, 137), bool), keys(3)
    before = len(COMPILATIONS)
    pick(logits_BV, key_B, knobs(), seen_BV)
    assert len(COMPILATIONS) > before  # the counter counts
    before = len(COMPILATIONS)
    for settings in SETTINGS:
        pick(logits_BV, key_B, knobs(**settings), seen_BV)
    assert len(COMPILATIONS) == before
    for settings in SETTINGS:
        pick(logits_BV, key_B, narrow(knobs(**settings), 137), seen_BV)
    assert len(COMPILATIONS) == before + 2


def narrow(settings, n_vocab):
    return dataclasses.replace(settings, kind=sampling.narrowest_kind(settings, n_vocab))


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"temperature": 0}, "greedy"),
        ({"temperature": 0, "top_k": 3, "top_p": 0.5}, "greedy"),
        ({}, "draw"),
        ({"min_p": 0.5, "repetition_penalty": 2}, "draw"),
        ({"top_k": 137}, "draw"),
        ({"top_k": 136}, "filtered"),
        ({"top_k": 1}, "filtered"),
        ({"top_p": 0.999}, "filtered"),
        ({"top_p": 1 - 2**-30}, "draw"),  # 1 as float32
    ],
)
def test_the_narrowest_kind_of_settings(settings, kind):
    assert sampling.narrowest_kind(knobs(**settings), 137) == kind


@pytest.mark.parametrize("n_vocab", [37, 4099])
def test_a_narrower_kind_picks_the_same(n_vocab):
    """For all settings that it is for, with ties, -inf, NaN and inf, bit for bit."""
    rng = np.random.default_rng(8)
    logits_BV = rng.normal(scale=3, size=(23, n_vocab)).astype(np.float32)
    logits_BV[:9] = logits_BV[:9].round()
    logits_BV[7:, 3], logits_BV[20, 5], logits_BV[21, 7], logits_BV[22] = -np.inf, np.nan, np.inf, -np.inf
    seen_BV = rng.random(logits_BV.shape) < 0.3
    for number, settings in enumerate(
        [*SETTINGS, {"temperature": 0, "repetition_penalty": 1.3}, {"temperature": 1e-45}]
    ):
        for n_ids in (n_vocab - 5, n_vocab):
            general = dataclasses.replace(knobs(**settings), n_ids=np.int32(n_ids))
            token_B = pick(logits_BV, keys(23, number), general, seen_BV)
            np.testing.assert_array_equal(pick(logits_BV, keys(23, number), narrow(general, n_vocab), seen_BV), token_B)
            assert token_B.tolist()[-3:] == [NO_LOGITS] * 3


@pytest.mark.parametrize(
    ("settings", "n_noise", "passes"),
    [({"temperature": 0, "top_k": 3}, 0, []), ({"min_p": 0.1}, 1, []), ({"top_k": 40}, 1, [16, 16])],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_is_sorted_and_each_kind_runs_only_its_part(settings, n_noise, passes, dtype):
    """No conditional, no search of unknown length. Two thresholds are searched with half as many passes as bits."""
    with jax.enable_x64(dtype == "float64"):
        logits_BV, seen_BV = np.zeros((3, 137), dtype), np.zeros((3, 137), bool)
        how = narrow(knobs(**settings), 137)
        found = list(equations(jax.make_jaxpr(sampling.pick)(logits_BV, keys(3), how, seen_BV).jaxpr))
    names = [equation.primitive.name for equation in found]
    assert not set(names) & {"sort", "top_k", "cumsum", "cond", "while"}
    assert names.count("random_bits") == n_noise
    factor = np.dtype(dtype).itemsize // 4
    lengths = [equation.params["length"] for equation in found if equation.primitive.name == "scan"]
    assert lengths == [factor * n for n in passes]
