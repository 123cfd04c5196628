"""What pick draws: the frequencies under each rule. Draws depend only on a row's own key and logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from measures import chi_square_p
from sampling_reference import keys, knobs, reference_filter

from gpt2_jax import sampling

pick = jax.jit(sampling.pick)

N_DRAWS = 20_011
LOGITS = np.random.default_rng(1).normal(scale=1.5, size=11).astype(np.float32)
SEEN = np.random.default_rng(2).random(11) < 0.5

RULES = {
    "plain": {},
    "cold": {"temperature": 0.7},
    "hot": {"temperature": 2.5},
    "top-k": {"top_k": 4},
    "top-p": {"top_p": 0.8},
    "common top-p": {"top_p": 0.8, "rule": "common"},
    "min-p": {"min_p": 0.15},
    "penalty": {"repetition_penalty": 1.7},
    "reward": {"repetition_penalty": 0.6},
    "hot, top-k": {"temperature": 1.9, "top_k": 5},
    "hot, top-k, top-p": {"temperature": 1.3, "top_k": 7, "top_p": 0.6},
    "hot, top-k, common top-p": {"temperature": 1.3, "top_k": 7, "top_p": 0.6, "rule": "common"},
    "hot, min-p": {"temperature": 1.6, "min_p": 0.3},
    "top-p, min-p": {"top_p": 0.97, "min_p": 0.1},
    "penalty, cold": {"repetition_penalty": 1.4, "temperature": 0.6},
    "all": {"temperature": 1.5, "top_k": 8, "top_p": 0.9, "min_p": 0.12, "repetition_penalty": 1.4, "rule": "common"},
}


def probabilities(logits, seen, temperature=1.0, repetition_penalty=1.0, **filters):
    """The distribution that the rules give, in float64."""
    logits = np.asarray(logits, np.float64)
    penalised = np.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
    logits = np.where(seen, penalised, logits) / temperature
    p = np.where(reference_filter(logits, **filters), np.exp(logits - logits.max()), 0)
    return p / p.sum()


def fit(token_B, p_V) -> float:
    """The p-value of the draws."""
    return chi_square_p(np.bincount(token_B, minlength=len(p_V)), len(token_B) * p_V)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_frequencies_are_those_of_the_rule(rule):
    """Chi-square over 20,011 draws from eleven tokens. The seed is fixed, so it always passes or always fails."""
    key_B = keys(N_DRAWS, seed=7)
    logits_BV, seen_BV = (jnp.broadcast_to(array, (N_DRAWS, 11)) for array in (LOGITS, SEEN))
    token_B = np.asarray(pick(logits_BV, key_B, knobs(**rule), seen_BV))
    p_V = probabilities(LOGITS, SEEN, **rule)
    assert (p_V > 0).sum() > 1
    assert fit(token_B, p_V) > 1e-3


def test_the_rules_differ():
    """The probabilities of any two rules differ enough for the test above to tell the rules apart."""
    p_RV = np.array([probabilities(LOGITS, SEEN, **rule) for rule in RULES.values()])
    gaps = np.abs(p_RV[:, None] - p_RV[None]).sum(-1) + np.eye(len(RULES))
    assert gaps.min() > 0.04  # 0.04 from 1/11 each is a chi-square of some 50 at these counts


def test_draws_of_a_float64_row():
    with jax.enable_x64(True):
        logits_BV = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float64), (N_DRAWS, 11))
        rule = RULES["hot, top-k, top-p"]
        token_B = np.asarray(pick(logits_BV, keys(N_DRAWS, seed=3), knobs(**rule)))
    assert fit(token_B, probabilities(LOGITS, SEEN, **rule)) > 1e-3


@pytest.mark.parametrize("n_vocab", [1, 7, 8, 9, 997])
def test_every_id_is_drawn_alike(n_vocab):
    """The noise covers all ids, at sizes near a multiple of the eight parts that it is drawn in."""
    token_B = np.asarray(pick(jnp.zeros((N_DRAWS, n_vocab)), keys(N_DRAWS, seed=5), knobs()))
    assert fit(token_B, np.full(n_vocab, 1 / n_vocab)) > 1e-3


def test_a_row_depends_on_its_own_key_and_logits_alone():
    logits_BV = np.random.default_rng(3).normal(scale=2, size=(23, 1733)).astype(np.float32)
    seen_BV = np.random.default_rng(4).random((23, 1733)) < 0.1
    key_B = keys(23)
    for rule in ("plain", "top-k", "top-p", "all"):
        settings = knobs(**RULES[rule])
        token_B = pick(logits_BV, key_B, settings, seen_BV).tolist()
        for b in (0, 11, 22):
            assert pick(logits_BV[b : b + 1], key_B[b : b + 1], settings, seen_BV[b : b + 1]).tolist() == [token_B[b]]
        turned = pick(logits_BV[::-1], key_B[::-1], settings, seen_BV[::-1]).tolist()
        assert turned == token_B[::-1]


def test_a_change_in_the_last_bits_changes_no_draw():
    """A logit's last bits depend on the batch size; draws must not. (One in 1,000 may differ, by chance.)"""
    logits_BV = np.random.default_rng(6).normal(scale=2, size=(1009, 1733)).astype(np.float32)
    jitter = np.random.default_rng(7).choice(np.float32([1 - 2e-7, 1, 1 + 2e-7]), logits_BV.shape)
    key_B = keys(1009)
    changed = pick(logits_BV, key_B, knobs()) != pick(logits_BV * jitter, key_B, knobs())
    assert int(changed.sum()) <= 1  # measured 0
