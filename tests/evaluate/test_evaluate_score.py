"""What the evaluations need from `score`: which tokens greedy decoding chooses, scores from a token on, progress."""

import jax
import numpy as np
import pytest
from tiny_models import CONFIG, chosen_logits, random_params

import gpt2_jax
from gpt2_jax import evaluate
from gpt2_jax.generation.scoring import score

N = CONFIG.n_ctx
BOUND = 4e-5  # nats; as in test_scoring.py


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0)


def some_prompts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.n_vocab, n).tolist() for n in lengths]


@jax.jit
def all_logits(params, tokens_1T):
    return gpt2_jax.GPT2(CONFIG).apply({"params": params}, tokens_1T).logits[0]


def logits_of(params, prompt):
    """Return logits_TV of a forward pass. Padding to N makes one program for all lengths; no token sees the padding."""
    tokens_1T = np.zeros((1, N), np.int32)
    tokens_1T[0, : len(prompt)] = prompt
    return np.array(all_logits(params, tokens_1T))[: len(prompt)]


def most_likely(params, prompt, without=()):
    """Return the most likely token after each token except the last. Tokens in `without` are left out."""
    logits_TV = logits_of(params, prompt)
    logits_TV[:, list(without)] = -np.inf
    return logits_TV[:-1].argmax(-1)


def likely_prompt(params, length, without=()):
    """Return a random prompt in which every third token is the most likely one, without the tokens in `without`."""
    (prompt,) = some_prompts([length], seed=length)
    for t in range(1, length, 3):
        prompt[t] = int(most_likely(params, prompt[: t + 1], without)[-1])
    return prompt


@pytest.mark.parametrize("length", [2, 17, N])
def test_greedy_says_where_the_token_was_the_most_likely(params, length):
    prompt = likely_prompt(params, length)
    (got,) = score(CONFIG, params, [prompt])
    assert got.greedy.dtype == bool
    assert got.greedy_aside is None
    np.testing.assert_array_equal(got.greedy, most_likely(params, prompt) == prompt[1:])
    assert got.greedy[0::3].all()
    assert not got.greedy.all() or length == 2


def test_greedy_beyond_the_context(params):
    """The result is known for every window: this model always prefers tokens 2 and 4, which are equally likely."""
    config, fixed = chosen_logits([0.0, 1.0, 3.0, 2.0, 3.0])
    prompt = [0, 2, 4, 1, 3, 2, 2, 0, 4, 1, 2, 3, 4, 4, 0, 2, 1]
    assert len(prompt) > 2 * config.n_ctx
    for stride in (3, config.n_ctx):
        (got,) = score(config, fixed, [prompt], stride, aside=[2, 4])
        assert got.greedy.tolist() == [token in (2, 4) for token in prompt[1:]]
        assert got.greedy_aside.tolist() == [token in (2, 4, 3) for token in prompt[1:]]


@pytest.mark.parametrize("aside", [[5], [0, 3, 3, 36], list(range(20))])
def test_greedy_where_some_tokens_do_not_count(params, aside):
    prompt = likely_prompt(params, 31, without=aside)
    (got,) = score(CONFIG, params, [prompt], aside=aside)
    rivals = most_likely(params, prompt, without=aside)
    logits_TV = logits_of(params, prompt)[:-1]
    places = np.arange(len(rivals))
    expected = logits_TV[places, prompt[1:]] >= logits_TV[places, rivals]
    np.testing.assert_array_equal(got.greedy_aside, expected)
    assert got.greedy_aside[0::3].all()
    np.testing.assert_array_equal(got.greedy, most_likely(params, prompt) == prompt[1:])


@pytest.mark.parametrize("stride", [7, N])
def test_scores_from_a_token_on(params, stride):
    """They are those of the whole prompt, for a token in any window. Windows before the token are not read."""
    prompts = some_prompts([2, 23, N, N + 1, 3 * N + 5, 3 * N + 5, 2 * N])
    first = [1, 22, 5, N, 1, 2 * N + 3, 2 * N - 1]
    whole = score(CONFIG, params, prompts, stride, aside=[3])
    got = score(CONFIG, params, prompts, stride, first=first, aside=[3])
    for one, rest, start in zip(whole, got, first, strict=True):
        np.testing.assert_allclose(rest.logprobs, one.logprobs[start - 1 :], rtol=0, atol=BOUND)
        np.testing.assert_array_equal(rest.greedy, one.greedy[start - 1 :])
        np.testing.assert_array_equal(rest.greedy_aside, one.greedy_aside[start - 1 :])
        assert rest.sum == pytest.approx(rest.logprobs.sum(dtype=np.float64), rel=1e-12)
        assert rest.perplexity == pytest.approx(np.exp(-rest.logprobs.mean(dtype=np.float64)), rel=1e-12)
    read = []
    score(CONFIG, params, [prompts[4]], stride, first=[3 * N + 4], track=lambda batches: watched(batches, read))
    assert read == [1]


def watched(batches, seen):
    for _, windows in batches:
        seen.append(len(windows))
        yield _, windows


def test_track_sees_every_batch_once(params):
    prompts, seen = some_prompts([5, 23, N, 4 * N, 9]), []
    expected = [one.logprobs.tolist() for one in score(CONFIG, params, prompts, 11)]
    got = score(CONFIG, params, prompts, 11, track=lambda batches: watched(batches, seen))
    assert [one.logprobs.tolist() for one in got] == expected
    assert len(seen) > 1
    assert sum(seen) == 4 + len(range(0, 3 * N + 11, 11))


@pytest.mark.parametrize("first", [[0, 1], [1, 9], [1, 1.0], [True, 1], [1, None], [-1, 1]])
def test_wrong_places_are_refused(params, first):
    with pytest.raises(ValueError, match=r"first\[\d\] must be a whole number, from 1 to \d, not"):
        score(CONFIG, params, some_prompts([5, 9]), first=first)


def test_wrong_numbers_of_places_and_wrong_ids_are_refused(params):
    with pytest.raises(ValueError, match="first must hold a number for each of the 2 prompts, not "):
        score(CONFIG, params, some_prompts([5, 9]), first=[1])
    with pytest.raises(ValueError, match="aside holds the id 37"):
        score(CONFIG, params, some_prompts([5, 9]), aside=[37])


# ---- continuations


def test_continuations_are_given_the_tokens_before_them(params):
    """The model reads as many as it can. Of n_ctx + 1 tokens, the last one is only predicted."""
    context, rest = some_prompts([2 * N + 3, 5])
    cases = [(context[-3:], rest), (context[-1:], rest[:1]), (context[: N - 4], rest), (context, rest)]
    cases.append((context, context[:N]))
    got, n_cut = evaluate.score_continuations(CONFIG, params, cases, aside=[3])
    assert n_cut == 2
    for (before, after), one in zip(cases, got, strict=True):
        row = np.int32([*before, *after])[-N - 1 :]
        logprobs_TV = jax.nn.log_softmax(logits_of(params, row[:-1]))
        expected = np.asarray(logprobs_TV)[np.arange(len(row) - 1), row[1:]][-len(after) :]
        np.testing.assert_allclose(one.logprobs, expected, rtol=0, atol=BOUND)
        assert len(one.greedy_aside) == len(after)


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [1] * (N + 1))])
def test_continuations_that_cannot_be_scored_are_refused(params, pair):
    with pytest.raises(
        ValueError, match=rf"pairs\[1\] has {len(pair[0])} context tokens and {len(pair[1])} continuation"
    ):
        evaluate.score_continuations(CONFIG, params, [([1], [2]), pair])
