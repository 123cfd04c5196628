"""Weights to edit in research tests, and what an edited model should give, in NumPy float64."""

import jax
import numpy as np
import numpy_reference
from hypothesis import strategies as st

import gpt2_jax
from gpt2_jax.params import flatten

CONFIG = gpt2_jax.GPT2Config(n_vocab=29, n_ctx=13, n_embd=15, n_head=3, n_layer=3)


@st.composite
def models(draw):
    """A config of odd sizes and float64 weights in which every parameter matters."""
    heads, width = draw(st.sampled_from([(1, 1), (1, 7), (3, 5), (5, 1), (2, 3)]))
    config = gpt2_jax.GPT2Config(7, 5, heads * width, heads, draw(st.sampled_from([1, 2, 3, 11])))
    return config, weights(config, draw(st.integers(0, 99)), np.float64)


def weights(config=CONFIG, seed=3, dtype=np.float32, kind=np.asarray):
    tree = numpy_reference.random_params(config, np.random.default_rng(seed))
    return jax.tree.map(lambda leaf: kind(leaf.astype(dtype)), tree)


def logits_by_hand(config, params, *, z=(), post=(), order=None):
    """Logits [T, V] of tokens 0, 1, ..., with heads' z {(layer, head): [H]} and neurons {(layer, neuron): value} held
    there, and the layers in another order."""
    params = numpy_reference.as_float64(params)
    width, whole = config.head_dim, {"w": np.eye(config.n_embd), "b": 0}
    x_TD = params["wte"][: config.n_ctx] + params["wpe"]
    for layer in range(config.n_layer) if order is None else order:
        h = params[f"h{layer}"]
        norm_TD = numpy_reference.layer_norm(x_TD, h["ln_1"], 1e-5)
        z_TD = numpy_reference.attention(norm_TD, {"c_attn": h["attn"]["c_attn"], "c_proj": whole}, config.n_head)
        for place, value in dict(z).items():
            if place[0] == layer:
                z_TD[:, place[1] * width : (place[1] + 1) * width] = value
        x_TD = x_TD + z_TD @ h["attn"]["c_proj"]["w"] + h["attn"]["c_proj"]["b"]
        norm_TD = numpy_reference.layer_norm(x_TD, h["ln_2"], 1e-5)
        post_TF = numpy_reference.gelu_tanh(norm_TD @ h["mlp"]["c_fc"]["w"] + h["mlp"]["c_fc"]["b"])
        for place, value in dict(post).items():
            if place[0] == layer:
                post_TF[:, place[1]] = value
        x_TD = x_TD + post_TF @ h["mlp"]["c_proj"]["w"] + h["mlp"]["c_proj"]["b"]
    return numpy_reference.layer_norm(x_TD, params["ln_f"], 1e-5) @ params["wte"].T


def logits(config, params):
    return numpy_reference.forward(params, np.arange(config.n_ctx)[None], config.n_head)[0]


def assert_close(ours, theirs, bound=2e-13):  # measured in float64: 1e-14 at most, over all 2,000 models
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound * np.abs(theirs).max())


def bits(tree):
    return {name: (leaf.dtype.name, leaf.shape, np.asarray(leaf).tobytes()) for name, leaf in flatten(tree).items()}
