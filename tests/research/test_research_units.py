"""Heads and neurons that are removed from the weights have no effect in a NumPy forward pass; all others do."""

import forward
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from edited_weights import CONFIG, assert_close, bits, logits, logits_by_hand, models, weights
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt2_jax
from gpt2_jax.params import flatten
from gpt2_jax.research import surgery


def places(draw, config, count):
    return draw(st.sets(st.tuples(st.integers(0, config.n_layer - 1), st.integers(0, count - 1)), min_size=1))


@settings(max_examples=23)
@given(models(), st.data())
def test_an_ablated_head_adds_nothing(model, data):
    config, params = model
    heads = places(data.draw, config, config.n_head)
    edited = surgery.ablate_heads(config, params, heads)
    assert_close(logits(config, edited), logits_by_hand(config, params, z=dict.fromkeys(heads, 0)))


@settings(max_examples=23)
@given(models(), st.data())
def test_an_ablated_neuron_adds_nothing(model, data):
    config, params = model
    neurons = places(data.draw, config, 4 * config.n_embd)
    edited = surgery.ablate_neurons(config, params, neurons)
    assert_close(logits(config, edited), logits_by_hand(config, params, post=dict.fromkeys(neurons, 0)))


@settings(max_examples=23)
@given(models(), st.data())
def test_a_mean_holds_heads_and_neurons_where_it_says(model, data):
    """Each head or neuron has its own value, in the given order, in ablated and in pruned weights."""
    config, params = model
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    heads = data.draw(st.permutations(sorted(places(data.draw, config, config.n_head))))
    neurons = data.draw(st.permutations(sorted(places(data.draw, config, 4 * config.n_embd))))
    z, post = rng.normal(size=(len(heads), config.head_dim)), rng.normal(size=len(neurons))
    expected = logits_by_hand(
        config, params, z=dict(zip(heads, z, strict=True)), post=dict(zip(neurons, post, strict=True))
    )
    ablated = surgery.ablate_neurons(config, surgery.ablate_heads(config, params, heads, z), neurons, post)
    pruned = surgery.prune_neurons(config, surgery.prune_heads(config, params, heads, z), neurons, post)
    assert_close(logits(config, ablated), expected)
    assert_close(logits(config, pruned), expected)


def test_pruned_heads_are_gone_and_all_else_is_there():
    params = weights()
    flat = flatten(surgery.prune_heads(CONFIG, params, [(2, 1)]))
    old = flatten(params)
    head = np.zeros(15, bool)
    head[5:10] = True  # head 1 of width 5
    for name, empty in {
        "h2/attn/c_attn/w": np.tile(head, (15, 3)),
        "h2/attn/c_attn/b": np.tile(head, 3),
        "h2/attn/c_proj/w": np.tile(head[:, None], 15),
    }.items():
        np.testing.assert_array_equal(flat[name], np.where(empty, 0, old.pop(name)))
    assert all(flat[name] is leaf for name, leaf in old.items())


def test_pruned_neurons_are_gone_and_all_else_is_there():
    params = weights()
    flat = flatten(surgery.prune_neurons(CONFIG, params, [(0, 59), (0, 7)]))
    old = flatten(params)
    neuron = np.isin(np.arange(60), [7, 59])
    for name, empty in {
        "h0/mlp/c_fc/w": np.tile(neuron, (15, 1)),
        "h0/mlp/c_fc/b": neuron,
        "h0/mlp/c_proj/w": np.tile(neuron[:, None], 15),
    }.items():
        np.testing.assert_array_equal(flat[name], np.where(empty, 0, old.pop(name)))
    assert all(flat[name] is leaf for name, leaf in old.items())


def test_the_model_itself_with_heads_ablated():
    """In JAX and float32, the logits are those with z set to 0. Those of pruned weights are bit-identical."""
    params, heads = weights(kind=jnp.asarray), [(0, 2), (2, 0), (2, 1)]
    tokens_1T = np.arange(CONFIG.n_ctx)[None]
    ablated = forward.logits_of(CONFIG, surgery.ablate_heads(CONFIG, params, heads), tokens_1T)[0]
    by_hand = logits_by_hand(CONFIG, params, z=dict.fromkeys(heads, 0))
    assert forward.relative_error(ablated, by_hand) < 2e-6  # measured: 4e-7
    pruned = forward.logits_of(CONFIG, surgery.prune_heads(CONFIG, params, heads), tokens_1T)[0]
    np.testing.assert_array_equal(pruned, ablated)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda p: surgery.ablate_heads(CONFIG, p, [(0, 3)]), "head must be a whole number, from 0 to 2, not 3"),
        (lambda p: surgery.prune_heads(CONFIG, p, [(3, 0)]), "layer must be a whole number, from 0 to 2, not 3"),
        (lambda p: surgery.ablate_heads(CONFIG, p, [(-1, 0)]), "layer must be a whole number, from 0 to 2, not -1"),
        (lambda p: surgery.ablate_heads(CONFIG, p, [(0, 1), (2, 1), (0, 1)]), "head 1 of layer 0 is named twice"),
        (lambda p: surgery.ablate_heads(CONFIG, p, [(0, 1.0)]), "head must be a whole number"),
        (lambda p: surgery.ablate_heads(CONFIG, p, [(0, 1)], np.ones(5)), r"mean must have the shape \(1, 5\)"),
        (lambda p: surgery.ablate_neurons(CONFIG, p, [(0, 60)]), "neuron must be a whole number, from 0 to 59, not 60"),
        (lambda p: surgery.prune_neurons(CONFIG, p, [(0, 1)], np.ones((1, 1))), r"mean must have the shape \(1,\)"),
        (lambda p: surgery.ablate_heads(CONFIG.replace(n_layer=2), p, [(0, 1)]), "extra: h2/attn/c_attn/b"),
        (lambda p: surgery.split_heads(CONFIG, p, 5), "layer must be a whole number, from 0 to 2, not 5"),
    ],
)
def test_what_is_not_there_is_refused(edit, told):
    with pytest.raises(ValueError, match=told):
        edit(weights())


# ---- views


def test_heads_apart_compute_what_the_layer_does():
    params = weights(dtype=np.float64)
    x_TD = np.random.default_rng(0).normal(size=(7, CONFIG.n_embd))
    heads = surgery.split_heads(CONFIG, params, 1)
    added_TD = heads["out"]["b"]
    for n in range(CONFIG.n_head):
        q_TH, k_TH, v_TH = (x_TD @ heads[part]["w"][:, n] + heads[part]["b"][n] for part in "qkv")
        scores_TT = np.where(np.tri(7, dtype=bool), np.exp(q_TH @ k_TH.T / np.sqrt(5)), 0)
        z_TH = scores_TT / scores_TT.sum(-1, keepdims=True) @ v_TH
        added_TD = added_TD + z_TH @ heads["out"]["w"][n]
    assert_close(added_TD, numpy_reference.attention(x_TD, params["h1"]["attn"], CONFIG.n_head))


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_joined_are_the_params_to_the_bit(kind, dtype):
    params = weights(dtype=jnp.dtype(dtype), kind=kind)
    heads = surgery.split_heads(CONFIG, params, 2)
    joined = surgery.join_heads(CONFIG, weights(seed=4, dtype=jnp.dtype(dtype), kind=kind), 2, heads)
    assert bits(joined["h2"]["attn"]) == bits(params["h2"]["attn"])
    assert bits(joined["h1"]["attn"]) != bits(params["h1"]["attn"])


def test_gradients_reach_single_heads():
    """The gradient with respect to the heads is the gradient, split by head.

    The gradient of the keys' biases is 0 up to rounding: they add the same number to all scores of a query.
    """
    config, tokens_1T = CONFIG.replace(n_layer=1), np.arange(7)[None]
    params = weights(config, kind=jnp.asarray)

    def loss(params):
        return gpt2_jax.GPT2(config).apply({"params": params}, tokens_1T).logits[0, -1, 5]

    by_head = jax.jit(jax.grad(lambda heads: loss(surgery.join_heads(config, params, 0, heads))))
    found = by_head(surgery.split_heads(config, params, 0))
    expected = surgery.split_heads(config, jax.jit(jax.grad(loss))(params), 0)
    found, expected = flatten(found), flatten(expected)
    for gradient in (found, expected):
        assert np.abs(gradient.pop("k/b")).max() < 1e-6 * np.abs(gradient["v/b"]).max()  # measured: up to 7.6e-8
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert_close(found[name], leaf, 1e-6)  # measured: 0, in jax 0.12 1.7e-7


def test_heads_of_another_shape_are_refused():
    heads = surgery.split_heads(CONFIG, weights(), 1)
    heads = {**heads, "v": {"w": heads["v"]["w"][:, :2]}}
    with pytest.raises(ValueError, match=r"(?s)missing: v/b float32\[3, 5\].*v/w is float32\[15, 2, 5\]"):
        surgery.join_heads(CONFIG, weights(), 1, heads)
