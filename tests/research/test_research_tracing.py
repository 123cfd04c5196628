"""Causal tracing and attention knockout are compared with a forward pass for each of their runs."""

import functools

import jax
import numpy as np
import pytest
import tiny_models
from measures import COMPILATIONS

from gpt2_jax import research
from gpt2_jax.research import add, forward, replace, scale

CONFIG = tiny_models.CONFIG.replace(n_layer=4, param_dtype="float64", compute_dtype="float64")
TOKENS = np.random.default_rng(5).integers(0, CONFIG.n_vocab, (2, 6))
ROW, SUBJECT, N_SAMPLES, KEY = TOKENS[:1], [1, 2], 3, jax.random.key(4)
BOUND = 1e-13  # measured: 2e-15, of probabilities and logits up to 2


@pytest.fixture(scope="module")
def params():
    with jax.enable_x64(True):
        yield tiny_models.random_params(CONFIG, 3)


def probability(params, answer, *edits):
    out, _ = forward(CONFIG, params, np.repeat(ROW, N_SAMPLES, 0), edits=edits)
    return jax.nn.softmax(out.logits[:, -1])[:, answer].mean()


def hidden(params, noise=None):
    """Return the edit that adds the noise, each sample and each token of the subject its own."""
    size = 3 * np.std(params["wte"]) if noise is None else noise
    noise_BPD = size * jax.random.normal(KEY, (N_SAMPLES, len(SUBJECT), CONFIG.n_embd), np.float32)
    value = np.zeros((N_SAMPLES, ROW.shape[1], CONFIG.n_embd))
    value[:, SUBJECT] = noise_BPD
    return add("embed", value)


def traced(params, *args, **options):
    return research.causal_tracing(CONFIG, params, ROW, SUBJECT, KEY, *args, n_samples=N_SAMPLES, **options)


# ---- causal tracing


@pytest.mark.parametrize(("activation", "window", "noise"), [("resid_post", 1, None), ("mlp/out", 3, 0.4)])
def test_every_state_is_restored_under_the_same_noise(params, activation, window, noise):
    found = traced(params, activation, window=window, noise=noise, positions=[1, 2, 5], answer=7)
    out, clean = forward(CONFIG, params, ROW, capture=activation)
    noisy = hidden(params, noise)

    def restored(layer, t):
        patched = range(max(0, layer - window // 2), min(CONFIG.n_layer, layer + window // 2 + 1))
        patches = [replace(f"h{i}/{activation}", clean[f"h{i}/{activation}"], t) for i in patched]
        return probability(params, 7, noisy, *patches)

    expected = [[restored(layer, t) for t in (1, 2, 5)] for layer in range(CONFIG.n_layer)]
    np.testing.assert_allclose(found.restored, expected, rtol=0, atol=BOUND)
    np.testing.assert_allclose(found.noised, probability(params, 7, noisy), rtol=0, atol=BOUND)
    np.testing.assert_allclose(found.clean, jax.nn.softmax(out.logits[0, -1])[7], rtol=0, atol=BOUND)
    assert np.ptp(expected) > 1e-2
    assert abs(found.noised - found.clean) > 1e-3


def test_the_answer_is_the_prediction_and_no_noise_hides_nothing(params):
    found = traced(params, noise=0.0, layers=[2, 0])
    logits = forward(CONFIG, params, ROW)[0].logits[0, -1]
    assert found.answer == logits.argmax()
    assert found.restored.shape == (2, ROW.shape[1])
    for value in (found.restored, found.noised):
        np.testing.assert_allclose(value, jax.nn.softmax(logits).max(), rtol=0, atol=BOUND)


def test_other_texts_compile_nothing(params):
    def call(row, subject, noise, seed, answer):
        key = jax.random.key(seed)
        return research.causal_tracing(CONFIG, params, row, subject, key, answer=answer, noise=noise, layers=1)

    call(ROW, [1, 2], 0.5, 1, 3)
    COMPILATIONS.clear()
    call(TOKENS[1:], [0, 3], 1.5, 2, 4)
    assert COMPILATIONS == []


# ---- attention knockout

METRIC = research.logit_difference([5, 11], [2, 23])


def knocked_out(params, layers, *edits, positions=-1, key_positions=0, **where):
    blocks = [replace(f"h{i}/attn/scores", -np.inf, positions, key_positions=key_positions, **where) for i in layers]
    out, _ = forward(CONFIG, params, TOKENS, edits=[*edits, *blocks])
    return float(METRIC(out.logits[:, -1]))


@pytest.mark.parametrize(
    ("window", "where"),
    [
        (1, {"key_positions": [0, 2]}),
        (2, {"key_positions": slice(1, 4), "positions": [5, 4], "heads": [0, 2]}),
        (9, {"key_positions": [[1], [3]]}),
        (1, {"key_positions": slice(None)}),  # the last token attends to nothing
    ],
)
def test_every_window_is_a_forward_pass_with_that_block(params, window, where):
    found = research.attention_knockout(CONFIG, params, TOKENS, METRIC, window=window, **where)
    windows = [range(max(0, i - window // 2), min(4, i + (window + 1) // 2)) for i in range(4)]
    expected = [knocked_out(params, layers, **where) for layers in windows]
    np.testing.assert_allclose(found, expected, rtol=0, atol=BOUND)
    assert abs(expected[0] - knocked_out(params, [])) > 1e-3
    assert len(set(np.round(expected, 6))) == len(set(windows))


def test_of_a_changed_run_with_several_metrics(params):
    edits = [scale("attn/z", 0.5, layers=[1, 2]), add("h0/attn/scores", 1.0, key_positions=3)]
    metrics = {"b": METRIC, "a": lambda logits: logits[:, 3]}
    options = {"layers": [3, 1], "edits": edits, "together": 1}
    found = research.attention_knockout(CONFIG, params, TOKENS, metrics, 0, **options)
    assert list(found) == ["b", "a"]
    assert found["a"].shape == (2, 2)
    np.testing.assert_allclose(found["b"], [knocked_out(params, [i], *edits) for i in (3, 1)], rtol=0, atol=BOUND)


def test_all_windows_are_one_program(params):
    knockout = functools.partial(research.attention_knockout, CONFIG, params, TOKENS, METRIC)
    before = knockout([0, 1], layers=[0, 1])
    COMPILATIONS.clear()
    after = knockout([2, 3], layers=[2, 3], window=3)
    assert COMPILATIONS == []
    assert (np.asarray(before) != after).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: research.causal_tracing(CONFIG, p, TOKENS, [1], KEY), "takes one row of tokens, not 2"),
        (lambda p: research.causal_tracing(CONFIG, p, ROW, [6], KEY), "subject must be from -6 to 5"),
        (lambda p: research.causal_tracing(CONFIG, p, ROW, [], KEY), "subject must be one or more whole numbers"),
        (lambda p: traced(p, "attn/zz"), "is not an activation of a block"),
        (lambda p: traced(p, noise="much"), "noise must be a number, not 'much'"),
        (lambda p: traced(p, noise=np.ones(2)), "noise must be a number"),
        (lambda p: traced(p, answer=37), "answer must be a whole number, from 0 to 36, not 37"),
        (lambda p: traced(p, answer=" Paris"), "answer must be a whole number"),
        (lambda p: traced(p, answer=jax.numpy.array([1, 2])), "answer must be a whole number"),
        (lambda p: research.causal_tracing(CONFIG, p, ROW, [1], 0), "key must be a key"),
        (lambda p: traced(p, window=0), "window must be"),
        (lambda p: research.attention_knockout(CONFIG, p, TOKENS, METRIC, 6), "for position 6"),
        (lambda p: research.attention_knockout(CONFIG, p, TOKENS, METRIC, 0, heads=3), "heads"),
        (lambda p: research.attention_knockout(CONFIG, p, TOKENS, METRIC, 0, layers=4), "layers must be from -4 to 3"),
        (lambda p: research.attention_knockout(CONFIG, p, TOKENS, METRIC, 0, window=0), "window must be"),
    ],
)
def test_what_cannot_be_is_refused(params, call, message):
    with pytest.raises(ValueError, match=message):
        call(params)
