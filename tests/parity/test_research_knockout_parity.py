"""Attention knockout equals hooks that set scores to -inf in TransformerLens, on the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_activations as naive
import pytest
from bridge import as_torch, bridge_of, hook_of

import gpt2_jax
from gpt2_jax import research

pytestmark = pytest.mark.parity

BOUND = 5e-6  # relative to the largest value; measured: 5.1e-7
CONFIG = gpt2_jax.GPT2Config(n_vocab=53, n_ctx=23, n_embd=21, n_head=3, n_layer=4)
TOKENS = np.random.default_rng(7).integers(0, CONFIG.n_vocab, (2, 9))
WINDOWS = [[0], [1, 2], [0, 1, 2, 3]]


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(
        lambda leaf: jnp.asarray(3 * leaf if leaf.ndim == 2 else leaf, jnp.float32), naive.weights(CONFIG)
    )


@pytest.fixture(scope="module")
def model(params):
    return bridge_of(CONFIG, params)


def knocked_out(model, layers, key, tokens_BT=TOKENS, heads=slice(None)):
    """Return the logits of a run whose last token cannot look at one key, in some layers."""

    def hook(scores_BNTS, hook):
        scores_BNTS[:, heads, -1, key] = -float("inf")
        return scores_BNTS

    hooks = [(hook_of(f"h{layer}/attn/scores"), hook) for layer in layers]
    return model.run_with_hooks(as_torch(tokens_BT).long(), fwd_hooks=hooks).numpy()


@pytest.mark.parametrize("layers", WINDOWS)
def test_one_key_in_a_window_of_layers(params, model, layers):
    edit = research.replace("attn/scores", -np.inf, positions=-1, key_positions=3, layers=layers)
    out, _ = research.forward(CONFIG, params, TOKENS, edits=edit)
    plain, _ = research.forward(CONFIG, params, TOKENS)
    expected = knocked_out(model, layers, 3)
    assert naive.error(out.logits, expected) < BOUND
    assert naive.error(plain.logits, expected) > 1e-3


def test_every_key_and_window_in_one_program(params, model):
    """The windows and the keys are traced: two vmaps run all of them, in one head."""
    windows = [[0, 1], [1, 2], [2, 3]]

    def last_logits(layers, key):
        edit = research.replace("attn/scores", -np.inf, positions=-1, heads=2, key_positions=key, layers=layers)
        return research.forward(CONFIG, params, TOKENS, edits=edit)[0].logits[:, -1]

    each = jax.vmap(jax.vmap(last_logits, (None, 0)), (0, None))
    found = jax.jit(each)(jnp.array(windows), jnp.arange(8))  # [window, key, B, V]
    expected = [[knocked_out(model, layers, key, heads=[2])[:, -1] for key in range(8)] for layers in windows]
    assert naive.error(found, np.array(expected)) < BOUND


def test_other_keys_in_rows_of_other_lengths(params, model):
    """Each row of a ragged list has its own last token and key. Theirs runs one row at a time."""
    rows, keys = [TOKENS[0].tolist(), TOKENS[1, :5].tolist()], [[6], [-4]]
    edit = research.replace("attn/scores", -np.inf, positions=-1, key_positions=keys, layers=[1, 2])
    out, _ = research.forward(CONFIG, params, rows, edits=edit)
    for row, (key,), logits_TV in zip(rows, keys, out.logits, strict=True):
        assert naive.error(logits_TV[None], knocked_out(model, [1, 2], key, [row])) < BOUND


def test_the_knockout_function(params, model):
    """Windows of three layers, cut at the ends of the model, and the logit difference."""
    answer, wrong = np.array([5, 8]), np.array([30, 2])
    metric = research.logit_difference(answer, wrong)
    found = research.attention_knockout(CONFIG, params, TOKENS, metric, key_positions=3, window=3)
    windows = [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]
    logits = [knocked_out(model, layers, 3)[:, -1] for layers in windows]
    expected = [(row[[0, 1], answer] - row[[0, 1], wrong]).mean() for row in logits]
    assert naive.error(found, np.array(expected)) < BOUND
    assert np.ptp(expected) > 1e-3
