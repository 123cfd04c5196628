"""No change of scores or patterns lets a token see the future or padding, or a row its neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_activations as naive
import pytest
from forward import some_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_activations import CONFIG

import gpt2_jax
from gpt2_jax import research

LENGTH = 7
TOKENS = some_tokens(CONFIG, 3, LENGTH)
BOUND = 5e-6  # of float32, relative to the largest value; measured: 5e-7

CHANGES = {
    "scores 0": {"edits": research.scale("attn/scores", 0.0)},
    "scores of one head up": {"edits": research.add("h1/attn/scores", 30.0, heads=1)},
    "scores large": {"edits": research.replace("h0/attn/scores", 1e12)},
    "scores below the mask": {"edits": research.replace("attn/scores", -1e30)},
    "scores -inf": {"edits": research.replace("attn/scores", -np.inf)},
    "pattern the same": {"edits": research.replace("attn/pattern", 0.3)},
    "pattern of the last token": {"edits": research.replace("h0/attn/pattern", 1.0, positions=-1)},
    "scores by a tap": {"taps": {"attn/scores": lambda value, position_BT: value[..., ::-1]}},
    "pattern by a tap": {"taps": {"h1/attn/pattern": lambda value, position_BT: jnp.flip(value, 1) + 1}},
}


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, naive.weights())


def logits(params, tokens_BT, mask_BT=None, **how):
    return np.asarray(research.forward(CONFIG, params, tokens_BT, mask_BT, **how)[0].logits)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("length", [LENGTH, 150])  # 150 tokens are in two blocks of attention
def test_later_tokens_move_no_earlier_logit(params, change, length):
    tokens_BT = some_tokens(CONFIG, 2, length, seed=3)
    others_BT = np.concatenate(
        [tokens_BT[:, : length // 2], some_tokens(CONFIG, 2, length, 9)[:, length // 2 :]], axis=1
    )
    found, others = (logits(params, tokens, **CHANGES[change]) for tokens in (tokens_BT, others_BT))
    assert np.isfinite(found).all()
    assert np.array_equal(found[:, : length // 2], others[:, : length // 2])
    assert not np.array_equal(found, others)


@pytest.mark.parametrize("change", [name for name in CHANGES if "tap" not in name])  # those flip padding, too
@pytest.mark.parametrize("side", ["left", "right", "within"])
def test_padding_moves_nothing(params, change, side):
    """A padded row gives what it gives alone, whatever ids are in its padding and whatever its neighbours are."""
    mask_BT = {
        "left": np.arange(LENGTH) >= np.array([0, 2, 5])[:, None],
        "right": np.arange(LENGTH) < np.array([7, 3, 2])[:, None],
        "within": np.array([[1, 0, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 1, 0], [1] * 7], bool),
    }[side]
    found = logits(params, TOKENS, mask_BT, **CHANGES[change])
    others = logits(params, np.where(mask_BT, TOKENS, 7), mask_BT, **CHANGES[change])
    assert np.array_equal(found[mask_BT], others[mask_BT])
    for b, mask_T in enumerate(mask_BT):
        alone = logits(params, TOKENS[b : b + 1, mask_T], **CHANGES[change])
        assert naive.error(found[b : b + 1, mask_T], alone) < BOUND


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_gives_the_same(params, change):
    """One token at a time. What is masked in a cache, such as its free slots, stays masked."""
    if "tap" in change or "last" in change:
        pytest.skip("it depends on the number of slots, or on the call's last token")
    whole = logits(params, TOKENS, **CHANGES[change])
    cache, parts = gpt2_jax.init_cache(CONFIG, 3, 12), []
    for t in range(LENGTH):
        out, _ = research.forward(CONFIG, params, TOKENS[:, t : t + 1], cache=cache, **CHANGES[change])
        cache = out.cache
        parts.append(np.asarray(out.logits))
    assert naive.error(np.concatenate(parts, axis=1), whole) < BOUND


def test_captured_scores_and_patterns_are_masked(params):
    edits = [research.replace("h0/attn/scores", 3.0), research.replace("h1/attn/pattern", 0.25)]
    mask_BT = np.arange(LENGTH) >= np.array([0, 2, 5])[:, None]
    _, seen = research.forward(CONFIG, params, TOKENS, mask_BT, capture=["scores", "pattern"], edits=edits)
    allowed = np.tri(LENGTH, dtype=bool) & mask_BT[:, None]
    allowed = np.broadcast_to(allowed[:, None], seen["h0/attn/scores"].shape)
    assert (np.asarray(seen["h0/attn/scores"]) == np.where(allowed, 3.0, np.float32(-1e10))).all()
    assert (np.asarray(seen["h1/attn/pattern"]) == np.where(allowed, 0.25, 0.0)).all()
    pattern = np.asarray(seen["h0/attn/pattern"])
    n_seen = np.maximum(allowed.sum(-1, keepdims=True), 1)
    np.testing.assert_allclose(pattern, allowed / n_seen, atol=1e-7)  # measured: 3e-8


def test_a_query_without_keys_attends_to_nothing(params):
    """All its scores are -inf: its pattern and z are 0, other queries stay, and gradients are finite."""
    edit = research.replace("h0/attn/scores", -np.inf, positions=3)
    _, seen = research.forward(CONFIG, params, TOKENS, capture="h0/attn/(pattern|z)", edits=edit)
    _, plain = research.forward(CONFIG, params, TOKENS, capture="h0/attn/(pattern|z)")
    assert not np.asarray(seen["h0/attn/pattern"])[:, :, 3].any()
    assert not np.asarray(seen["h0/attn/z"])[:, 3].any()
    assert np.array_equal(np.delete(seen["h0/attn/z"], 3, axis=1), np.delete(plain["h0/attn/z"], 3, axis=1))
    mask_BT = np.arange(LENGTH) >= np.array([0, 2, 5])[:, None]

    def loss(params):
        out, _ = research.forward(CONFIG, params, TOKENS, mask_BT, edits=edit)
        return jnp.where(mask_BT[..., None], out.logits, 0).sum()

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.grad(loss)(params)))


@settings(max_examples=15)
@given(st.integers(0, 999), st.integers(1, LENGTH - 1))
def test_any_scores_leave_the_past_alone(params, seed, n_same):
    rng = np.random.default_rng(seed)
    shape = (1, CONFIG.n_head, LENGTH, LENGTH)
    edits = [
        research.add("h0/attn/scores", rng.normal(0, 10, shape).astype(np.float32)),
        research.scale("h1/attn/scores", rng.normal(0, 3, shape).astype(np.float32)),
        research.replace("h1/attn/pattern", rng.uniform(0, 1, shape).astype(np.float32), heads=[1]),
    ]
    others = np.where(np.arange(LENGTH) < n_same, TOKENS, (TOKENS + 1 + seed) % CONFIG.n_vocab)
    found, again = logits(params, TOKENS, edits=edits), logits(params, others, edits=edits)
    assert np.array_equal(found[:, :n_same], again[:, :n_same])
