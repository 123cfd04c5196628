"""Weights to edit in research tests, and the expected results of an edited model, in NumPy float64."""

import jax
import numpy as np
import numpy_reference
from hypothesis import strategies as st

import gpt2_jax
from gpt2_jax.params import flatten

CONFIG = gpt2_jax.GPT2Config(n_vocab=29, n_ctx=13, n_embd=15, n_head=3, n_layer=3)


@st.composite
def models(draw):
    """A config with odd sizes, and float64 weights in which every parameter affects the result."""
    heads, width = draw(st.sampled_from([(1, 1), (1, 7), (3, 5), (5, 1), (2, 3)]))
    config = gpt2_jax.GPT2Config(7, 5, heads * width, heads, draw(st.sampled_from([1, 2, 3, 11])))
    return config, weights(config, draw(st.integers(0, 99)), np.float64)


def weights(config=CONFIG, seed=3, dtype=np.float32, kind=np.asarray):
    tree = numpy_reference.random_params(config, np.random.default_rng(seed))
    return jax.tree.map(lambda leaf: kind(leaf.astype(dtype)), tree)


def logits_by_hand(config, params, *, z=(), post=(), order=None):
    """Logits [T, V] of tokens 0, 1, ... with fixed heads' z {(layer, head): [H]}, fixed neurons {(layer, neuron):
    value}, and the layers in another order."""

    def hold(name, x):
        for kind, held in (("attn/z", z), ("mlp/post", post)):
            for (layer, n), value in dict(held).items():
                if name == f"h{layer}/{kind}":
                    x[:, n] = value
        return x

    return numpy_reference.row(
        numpy_reference.as_float64(params), np.arange(config.n_ctx), config.n_head, hold, layers=order
    )


def logits(config, params):
    return numpy_reference.forward(params, np.arange(config.n_ctx)[None], config.n_head)[0]


def assert_close(ours, theirs, bound=2e-13):  # measured in float64: at most 1e-14 over all 2,000 models
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound * np.abs(theirs).max())


def bits(tree):
    return {name: (leaf.dtype.name, leaf.shape, np.asarray(leaf).tobytes()) for name, leaf in flatten(tree).items()}
