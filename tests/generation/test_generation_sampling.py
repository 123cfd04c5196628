"""What generate draws with each rule and with all of them, against probabilities computed by hand."""

import numpy as np
import pytest
from measures import chi_square_p
from strength import campaign, full_only
from tiny_models import CONFIG, chosen_logits

import gpt2_jax

UNTOUCHED = {"wte": object()}  # JAX cannot trace this: any attempt raises TypeError
N_ROWS = campaign(2003, 5003)
LOGITS = [0.7, 2.0, -0.4, 1.1, 0.0, -1.5, 1.6]
PROMPT = [3, 1]


def probabilities(
    logits, held, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, top_p_rule="original"
):
    """Apply the rules in order, in float64, to a row that contains the ids `held`."""
    logits = np.array(logits, np.float64)
    for i in set(held):
        logits[i] = logits[i] / repetition_penalty if logits[i] > 0 else logits[i] * repetition_penalty
    p = np.exp(logits / temperature - (logits / temperature).max())
    if top_k:
        p[p < np.sort(p)[-min(top_k, len(p))]] = 0
    p /= p.sum()
    if top_p < 1:
        descending = np.sort(p)[::-1]
        cumulative = np.cumsum(descending)
        n_kept = (cumulative <= top_p).sum() if top_p_rule == "original" else (cumulative < top_p).sum() + 1
        p[p < descending[max(n_kept, 1) - 1]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


RULES = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.9},
    {"top_k": 3},
    {"top_p": 0.7},
    {"top_p": 0.7, "top_p_rule": "common"},
    {"min_p": 0.25},
    {"repetition_penalty": 1.6},
    {"repetition_penalty": 0.6},
    {"temperature": 1.4, "top_k": 5},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "top_p_rule": "common"},
    {"top_p": 0.9, "min_p": 0.3},
    {"top_k": 4, "min_p": 0.1},
    {"temperature": 2.5, "repetition_penalty": 1.3, "top_k": 6, "top_p": 0.9, "min_p": 0.3},
    {"temperature": 1.7, "repetition_penalty": 2.0, "top_k": 6, "top_p": 0.8, "min_p": 0.1, "top_p_rule": "common"},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_pairs_follow_the_probabilities(rule):
    """The first two tokens of each row, drawn by prefill and by the loop; the penalty counts the first for the second.

    The seed is fixed, so this always passes or always fails.
    """
    config, params = chosen_logits(LOGITS)
    n_vocab = len(LOGITS)
    drawn_B2 = np.array(gpt2_jax.generate(config, params, [PROMPT] * N_ROWS, 2, seed=1, **rule))
    first = probabilities(LOGITS, PROMPT, **rule)
    second = np.stack([probabilities(LOGITS, [*PROMPT, i], **rule) for i in range(n_vocab)])
    counts = np.bincount(drawn_B2[:, 0] * n_vocab + drawn_B2[:, 1], minlength=n_vocab**2)
    assert chi_square_p(counts, (first[:, None] * second).ravel() * N_ROWS) > 1e-3


@full_only("test_pairs_follow_the_probabilities has each rule")
def test_rules_can_be_told_apart():
    """The test above can fail: the draws of one rule do not pass for those of another."""
    config, params = chosen_logits(LOGITS)
    n_vocab = len(LOGITS)
    for rule, other in zip(RULES, [*RULES[1:], RULES[0]], strict=True):
        drawn_B2 = np.array(gpt2_jax.generate(config, params, [PROMPT] * N_ROWS, 2, seed=1, **rule))
        first = probabilities(LOGITS, PROMPT, **other)
        second = np.stack([probabilities(LOGITS, [*PROMPT, i], **other) for i in range(n_vocab)])
        counts = np.bincount(drawn_B2[:, 0] * n_vocab + drawn_B2[:, 1], minlength=n_vocab**2)
        assert chi_square_p(counts, (first[:, None] * second).ravel() * N_ROWS) < 1e-6, (rule, other)


NEVER = -99.0  # fills up to seven tokens, so that all these models use one program
HALVES = [*np.log([0.125, 0.5, 0.25, 0.0625, 0.0625]), NEVER, NEVER]
TIES = [1.0, 2.0, 0.5, 1.0, 1.0, -3.0, NEVER]


@pytest.mark.parametrize(
    ("logits", "rule", "allowed"),
    [
        (HALVES, {"top_p": 0.70}, {1}),  # the original leaves out the token that crosses p: 0.5 + 0.25 > 0.7
        (HALVES, {"top_p": 0.70, "top_p_rule": "common"}, {1, 2}),  # the common rule keeps it
        (HALVES, {"top_p": 0.40}, {1}),  # at least one
        (HALVES, {"top_p": 0.40, "top_p_rule": "common"}, {1}),
        (HALVES, {"top_p": 0.80}, {1, 2}),
        (HALVES, {"top_p": 0.80, "top_p_rule": "common"}, {0, 1, 2}),
        (HALVES, {"top_p": 0.95}, {0, 1, 2, 3, 4}),  # 0.9375, the fourth, ties with the fifth
        (HALVES, {"top_p": 0.90, "top_p_rule": "common"}, {0, 1, 2, 3, 4}),  # the one that crosses ties with another
        (HALVES, {"top_k": 2, "top_p": 0.60, "top_p_rule": "common"}, {1}),  # after top-k they weigh 2/3 and 1/3
        (HALVES, {"top_k": 2, "top_p": 0.70, "top_p_rule": "common"}, {1, 2}),
        (HALVES, {"temperature": 2, "top_p": 0.60, "top_p_rule": "common"}, {0, 1, 2}),  # 0.343, 0.243, 0.172
        (HALVES, {"min_p": 0.6}, {1}),
        (HALVES, {"min_p": 0.4}, {1, 2}),
        (HALVES, {"min_p": 0.2}, {0, 1, 2}),
        (HALVES, {"min_p": 0.1}, {0, 1, 2, 3, 4}),
        (HALVES, {"min_p": 0.6, "temperature": 2}, {1, 2}),  # temperature applies before: 0.343 and 0.243
        (TIES, {"top_p": 0.5, "top_p_rule": "common"}, {0, 1, 3, 4}),  # 0.448 < 0.5: the second crosses, and two tie
        (TIES, {"min_p": 0.3}, {0, 1, 3, 4}),
        (TIES, {"top_k": 1, "repetition_penalty": 1.5}, {1}),  # 2 / 1.5 still leads
        (TIES, {"min_p": 1.0}, {1}),
    ],
)  # fmt: skip
def test_which_tokens_may_be_drawn(logits, rule, allowed):
    """The exact set that the rules leave: boundaries, ties, and the order in which they are applied."""
    config, params = chosen_logits(logits)
    n_new = 1 if "repetition_penalty" in rule else 3
    rows = gpt2_jax.generate(config, params, [[1]] * N_ROWS, n_new, seed=2, **rule)
    assert {i for row in rows for i in row} == allowed


def test_the_penalty_keeps_a_greedy_row_moving():
    """Each token that a row contains gets less likely: positive logits are divided, negative ones multiplied, once."""
    config, params = chosen_logits([4.0, 3.0, 2.5, -1.0, NEVER, NEVER, NEVER])
    rows = gpt2_jax.generate(config, params, [[3]] * N_ROWS, 5, temperature=0, repetition_penalty=1.5)
    assert rows == [[0, 1, 0, 0, 0]] * N_ROWS
    config, params = chosen_logits([-1.0, -1.2, -3.0, NEVER, NEVER, NEVER, NEVER])
    rows = gpt2_jax.generate(config, params, [[0]] * N_ROWS, 4, temperature=0, repetition_penalty=2)
    assert rows == [[1, 0, 0, 0]] * N_ROWS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_p", -0.1), ("min_p", 1.1), ("min_p", float("nan")), ("min_p", float("inf")), ("min_p", "x"),
        ("min_p", None), ("min_p", True),
        ("repetition_penalty", 0), ("repetition_penalty", -1.0), ("repetition_penalty", float("nan")),
        ("repetition_penalty", float("inf")), ("repetition_penalty", "x"), ("repetition_penalty", None),
        ("repetition_penalty", True), ("repetition_penalty", 1e39), ("repetition_penalty", 1e-50),
        ("top_p_rule", "Original"), ("top_p_rule", ""), ("top_p_rule", None), ("top_p_rule", True), ("top_p_rule", 1),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_settings_are_refused(name, value):
    """One sentence with the argument's name and the value, before anything is traced."""
    with pytest.raises(ValueError, match=name) as caught:
        gpt2_jax.generate(CONFIG, UNTOUCHED, [[1, 2]], 3, **{name: value})
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_are_keywords(tokenizer):
    """The settings after the seed are keyword-only, so that a new setting cannot shift them."""
    with pytest.raises(TypeError):
        gpt2_jax.generate(CONFIG, UNTOUCHED, [[1]], 3, 1.0, 0, 1.0, 0, 0.5)
