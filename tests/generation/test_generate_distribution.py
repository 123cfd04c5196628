"""What generate draws, against probabilities computed by hand from the original's rules."""

import jax.numpy as jnp
import numpy as np
import pytest
from measures import chi_square_p
from strength import campaign
from tiny_models import chosen_logits, random_params

import gpt2_jax


def openai_probabilities(logits, temperature, top_k, top_p):
    """softmax after temperature, then top-k with ties kept, then the longest prefix with cumulative <= p."""
    logits = np.asarray(logits, np.float64) / temperature
    if top_k:
        logits = np.where(logits < np.sort(logits)[-top_k], -np.inf, logits)
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    descending = np.sort(probs)[::-1]
    if top_p < 1:
        kept = max(np.sum(np.cumsum(descending) <= top_p), 1)
        probs = np.where(probs < descending[kept - 1], 0, probs)
    return probs / probs.sum()


KNOBS = [
    (1.0, 0, 1.0),
    (0.6, 0, 1.0),
    (1.9, 0, 1.0),
    (1.0, 3, 1.0),
    (1.0, 0, 0.6),
    (0.7, 5, 0.8),
    (1.4, 2, 0.9),
    (1.0, 7, 0.95),
    (2.5, 0, 0.7),
    (0.4, 0, 0.9),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), KNOBS)
def test_pairs_follow_the_probabilities(temperature, top_k, top_p):
    """The first two tokens of thousands of rows (drawn by prefill and by the loop) against probabilities by hand."""
    config = gpt2_jax.GPT2Config(n_vocab=7, n_ctx=5, n_embd=6, n_head=2, n_layer=2)
    params = random_params(config, 6, scale=0.4)
    prompt, rows = [3, 0, 6], campaign(2003, 5003)
    logits = gpt2_jax.GPT2(config).apply({"params": params}, jnp.array([[*prompt, v] for v in range(7)])).logits
    first = openai_probabilities(logits[0, 2], temperature, top_k, top_p)
    second = np.stack([openai_probabilities(logits[v, 3], temperature, top_k, top_p) for v in range(7)])
    drawn = np.array(
        gpt2_jax.generate(config, params, [prompt] * rows, 2, temperature, top_k=top_k, top_p=top_p, seed=1)
    )
    counts = np.bincount(drawn[:, 0] * 7 + drawn[:, 1], minlength=49)
    assert chi_square_p(counts, (first[:, None] * second).ravel() * rows) > 1e-3


LOGITS = {
    "halves": np.log([0.125, 0.5, 0.25, 0.0625, 0.0625]),
    "ties": [1.0, 2.0, 0.5, 1.0, 1.0, -3.0],
    "all equal": [0.25] * 5,
    "far apart": [0.0, 1e4, 1e4, -1e9],
    "far below": [-1e9, -2e9, -3e9],
}


@pytest.mark.parametrize(
    ("name", "temperature", "top_k", "top_p", "allowed"),
    [
        ("halves", 1, 0, 0.70, {1}),  # the token that crosses p is left out: 0.5 + 0.25 > 0.7
        ("halves", 1, 0, 0.80, {1, 2}),
        ("halves", 1, 0, 0.40, {1}),  # at least one
        ("halves", 1, 0, 0.99, {0, 1, 2, 3, 4}),  # the last kept ties with the one that crosses
        ("halves", 1, 0, 0.60, {1}),
        ("halves", 2, 0, 0.60, {1, 2}),  # temperature applies before top-p: 0.343 + 0.243
        ("halves", 0.5, 0, 0.95, {1, 2}),  # 0.744 + 0.186; without the temperature all five would stay
        ("halves", 1, 2, 0.70, {1}),  # after top-k the two weigh 2/3 and 1/3
        ("halves", 1, 2, 0.60, {1}),
        ("halves", 1, 3, 0.90, {1, 2}),  # 4/7 + 2/7 = 0.857
        ("halves", 1, 3, 0.85, {1}),
        ("ties", 1, 1, 1.0, {1}),
        ("ties", 1, 2, 1.0, {0, 1, 3, 4}),  # ties with the second stay
        ("ties", 1, 3, 1.0, {0, 1, 3, 4}),
        ("ties", 1, 5, 1.0, {0, 1, 2, 3, 4}),
        ("ties", 1, 6, 1.0, {0, 1, 2, 3, 4, 5}),
        ("ties", 1, 2, 0.70, {0, 1, 3, 4}),  # 0.475 + 0.175 <= 0.7: the kept one ties with two more
        ("all equal", 1, 1, 1.0, {0, 1, 2, 3, 4}),
        ("all equal", 1, 0, 0.1, {0, 1, 2, 3, 4}),
        ("far apart", 1, 0, 1.0, {1, 2}),
        ("far apart", 1, 0, 0.5, {1, 2}),
        ("far below", 1, 0, 1.0, {0}),
    ],
)
def test_which_tokens_may_be_drawn(name, temperature, top_k, top_p, allowed):
    """The exact set that top-k and top-p leave on chosen logits: boundaries, ties and the order of the steps."""
    logits = LOGITS[name]
    config, params = chosen_logits([*logits, *[-4e9] * (6 - len(logits))])  # all of six ids: one program
    prompts = [[1]] * campaign(503, 2003)
    rows = gpt2_jax.generate(config, params, prompts, 3, temperature, top_k=top_k, top_p=top_p, seed=2)
    assert {i for row in rows for i in row} == allowed


def test_masked_tokens_stay_masked_at_any_temperature():
    """What top-k removed stays below logits that a small temperature makes extreme."""
    config, params = chosen_logits([-2.0, -1.0, -3.0, -4.0])
    for temperature in (1e-5, 1e-20, 1e-37):
        rows = gpt2_jax.generate(config, params, [[0]] * 97, 3, temperature=temperature, top_k=2, top_p=0.9)
        assert rows == [[1] * 3] * 97
