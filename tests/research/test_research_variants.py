"""Research tools on models with other arithmetic: what reads the output head reads `lm_head`, and not `wte`."""

import jax
import numpy as np
import numpy_reference
import pytest
import variants
from forward import logits_of, relative_error, some_tokens
from scipy.special import log_softmax

from gpt2_jax import research
from gpt2_jax.params import flatten
from gpt2_jax.research import surgery

ALL = "all"  # every variant at once
TOKENS = some_tokens(variants.CONFIG, 2, 13)


@pytest.fixture(scope="module")
def model():
    return variants.model(ALL)


def differ(ours, theirs):
    return np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("by", ["component", "head", "neuron"])
def test_the_parts_of_a_logit_sum_to_it(model, by):
    """With `wte` in place of the head, the difference would be 0.63."""
    config, params = model
    found = research.logit_attribution(config, params, TOKENS, answers=3, against=5, by=by)
    expected = variants.expected(config, params, TOKENS)[:, -1]
    expected = (expected[:, 3] - expected[:, 5])[:, None]
    assert relative_error(np.asarray(found.flat()[1], np.float64).sum(0), expected) < 2e-6  # measured 3.1e-7
    assert relative_error(np.asarray(found.logits), expected) < 2e-6  # measured 4.1e-7


def test_the_lens_reads_through_the_head(model):
    config, params = model
    lens = research.logit_lens(config, params, TOKENS, k=config.n_vocab)
    expected = log_softmax(variants.expected(config, params, TOKENS), -1)
    found = np.take_along_axis(np.asarray(lens.logprobs[-1]), np.argsort(lens.ids[-1], -1), -1)
    assert differ(found, expected) < 8e-7  # measured 1.3e-7
    first = numpy_reference.as_float64({name: params[name] for name in ("wte", "wpe", "ln_f", "lm_head")})
    none = log_softmax(numpy_reference.forward(first, TOKENS, config.n_head), -1)
    found = np.take_along_axis(np.asarray(lens.logprobs[0]), np.argsort(lens.ids[0], -1), -1)
    assert differ(found, none) < 6e-7  # measured 1.1e-7


def test_tokens_that_a_vector_raises_are_read_from_the_head_and_like_tokens_from_the_embedding(model):
    config, params = model
    vector_D = np.random.default_rng(3).normal(size=config.n_embd)
    wide = numpy_reference.as_float64(params)
    ids, values = research.top_tokens(config, params, vector_D, 5)
    expected = wide["wte"] @ vector_D
    assert differ(values, np.sort(expected)[::-1][:5]) < 8e-7  # measured 1.6e-7
    assert np.asarray(ids).tolist() == np.argsort(-expected)[:5].tolist()
    read_VD = wide["lm_head"] * wide["ln_f"]["g"]
    expected = (read_VD - read_VD.mean(-1, keepdims=True)) @ vector_D
    ids, values = research.top_tokens(config, params, vector_D, 5, ln_f=True)
    assert differ(values, np.sort(expected)[::-1][:5]) < 6e-7  # measured 1.1e-7
    assert np.asarray(ids).tolist() == np.argsort(-expected)[:5].tolist()


@pytest.mark.parametrize("ln_f", [False, True])
def test_copying_goes_from_the_embedding_to_the_head(model, ln_f):
    """Against the eigenvalues of the full matrix [V, V] in float64."""
    config, params = model
    wide, scores = numpy_reference.as_float64(params), research.copying_scores(config, params, ln_f=ln_f)
    out_VD = wide["lm_head"]
    if ln_f:
        out_VD = out_VD * wide["ln_f"]["g"]
        out_VD = out_VD - out_VD.mean(-1, keepdims=True)
    for layer in range(config.n_layer):
        for head in range(config.n_head):
            ov = np.asarray(research.ov_circuit(config, params, layer, head).dense(), np.float64)
            eigenvalues = np.linalg.eigvals(wide["wte"] @ ov @ out_VD.T)
            expected = eigenvalues.real.sum() / np.abs(eigenvalues).sum()
            assert abs(scores[layer, head] - expected) < 5e-6  # measured 6.8e-7


def test_a_centered_head_gives_the_same_probabilities_and_the_same_stream(model):
    config, params = model
    centered = research.center_unembed(params)
    assert np.abs(np.asarray(centered["lm_head"], np.float64).mean(0)).max() < 1e-8  # measured 4.8e-9
    assert np.abs(np.asarray(params["lm_head"], np.float64).mean(0)).max() > 1e-3
    for name, leaf in flatten(params).items():
        assert name == "lm_head" or np.array_equal(leaf, flatten(centered)[name]), name
    before, after = (log_softmax(logits_of(config, tree, TOKENS), -1) for tree in (params, centered))
    assert differ(after, before) < 5e-7  # measured 8e-8


def test_folded_norms_give_the_same_logits(model):
    config, params = model
    folded = research.fold_layer_norm(config, params)
    assert differ(logits_of(config, folded, TOKENS), logits_of(config, params, TOKENS)) < 5e-6  # measured 4.9e-7


def test_surgery_keeps_the_head(model):
    config, params = model
    fewer, kept = surgery.drop_layers(config, params, [1])
    assert fewer == config.replace(n_layer=2)
    assert kept["lm_head"] is params["lm_head"]
    expected = variants.expected(fewer, kept, TOKENS)
    error = relative_error(logits_of(fewer, kept, TOKENS), expected)  # layer 2 is now layer 1, and divided by 2
    assert error < 2.5e-6  # measured 4.2e-7
    doubled = surgery.average([params, jax.tree.map(lambda leaf: 3 * leaf, params)])
    np.testing.assert_array_equal(doubled["lm_head"], 2 * params["lm_head"])


def test_an_edit_of_a_neuron_is_the_same_edit_in_numpy(model):
    config, params = model
    out, _ = research.forward(config, params, TOKENS, edits=research.scale("h1/mlp/post", 0.0))
    silent = {**params, "h1": jax.tree.map(np.array, params["h1"])}
    silent["h1"]["mlp"]["c_proj"]["w"][:] = 0
    assert relative_error(np.asarray(out.logits), variants.expected(config, silent, TOKENS)) < 2.5e-6  # 4.4e-7
