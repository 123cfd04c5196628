"""Attention in blocks of queries equals attention in one block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.attention import SMALLEST_BLOCK, attention, causal_attention

SIZES = [0, 1, SMALLEST_BLOCK, SMALLEST_BLOCK + 1, 257, 4 * SMALLEST_BLOCK + 3]


def arrays(n_tokens, seed=0):
    """Queries, keys and values of 2 rows and 3 heads of 5, and a causal mask with some padding."""
    keys = jax.random.split(jax.random.key(seed), 4)
    q_BTNH = jax.random.normal(keys[0], (2, n_tokens, 3, 5))
    k_BNHS = jax.random.normal(keys[1], (2, 3, 5, n_tokens))
    v_BNSH = jax.random.normal(keys[2], (2, 3, n_tokens, 5))
    mask_BTS = jnp.tril(jnp.ones((n_tokens, n_tokens), bool)) & jax.random.bernoulli(keys[3], 0.9, (2, 1, n_tokens))
    return q_BTNH, k_BNHS, v_BNSH, mask_BTS | jnp.eye(n_tokens, dtype=bool)


@pytest.mark.parametrize("n_tokens", SIZES)
def test_blocks_are_the_whole(n_tokens):
    inputs = arrays(n_tokens)
    whole_BTNH, blocks_BTNH = jax.jit(attention)(*inputs), jax.jit(causal_attention)(*inputs)
    assert whole_BTNH.shape == blocks_BTNH.shape == (2, n_tokens, 3, 5)
    np.testing.assert_allclose(blocks_BTNH, whole_BTNH, atol=1e-6, rtol=0)  # measured 2.1e-7


def test_blocks_have_the_gradient_of_the_whole():
    inputs = arrays(SIZES[-1])
    weights_BTNH = jax.random.normal(jax.random.key(9), inputs[0].shape)

    def loss(form, q_BTNH, k_BNHS, v_BNSH):
        return (form(q_BTNH, k_BNHS, v_BNSH, inputs[3]) * weights_BTNH).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(1, 2, 3)), static_argnums=0)
    for ours, theirs in zip(gradient(causal_attention, *inputs[:3]), gradient(attention, *inputs[:3]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6, rtol=0)  # measured 1.4e-6


def test_most_of_what_is_masked_is_not_computed():
    """Four blocks leave out three eighths of the products with keys and values."""
    inputs = arrays(4 * SMALLEST_BLOCK)
    flops = [jax.jit(form).lower(*inputs).cost_analysis()["flops"] for form in (attention, causal_attention)]
    assert flops[1] < 0.7 * flops[0]
