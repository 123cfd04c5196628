"""Grids of patches are compared with transformer_lens.patching, which runs the whole model for each patch.

Causal tracing and attention knockout are compared with its hooks, one run for each entry.
"""

from typing import Any, NamedTuple

import bridge
import jax
import numpy as np
import pytest
import strength
import tiny_models
from toy_induction import INDUCTION, induction_toy

from gpt2_jax.research.metrics import logit_difference
from gpt2_jax.research.patching import activation_patching
from gpt2_jax.research.tracing import attention_knockout, causal_tracing

pytestmark = pytest.mark.parity

BOUND = 4e-6  # of a grid's largest value; measured: 2.2e-7 in the toy, 8.7e-7 in the random model


class Pair(NamedTuple):
    """A model in both libraries, two runs, and the tokens whose logits are compared at the last position."""

    config: Any
    params: Any
    bridge: Any
    tokens_BT: np.ndarray
    source_BT: np.ndarray
    answer: np.ndarray
    wrong: np.ndarray

    def metric(self, logits_BTV):
        """Compute the logit difference in torch."""
        rows = np.arange(len(logits_BTV))
        return (logits_BTV[rows, -1, self.answer] - logits_BTV[rows, -1, self.wrong]).mean()


@pytest.fixture(scope="module")
def induction():
    """Return the induction toy with repeating texts. The runs differ in one row's last token, in the other's answer."""
    config, params = induction_toy()
    source_BT = np.array([[3, 7, 11, 5, 2, 7], [4, 9, 1, 13, 6, 9]])
    tokens_BT = np.array([[3, 7, 11, 5, 2, 5], [4, 9, 8, 13, 6, 9]])
    bridged = bridge.bridge_of(config, params)
    return Pair(config, params, bridged, tokens_BT, source_BT, answer=np.array([11, 1]), wrong=np.array([2, 8]))


@pytest.fixture(scope="module")
def random():
    """Return a model in which every part has some effect."""
    config = tiny_models.CONFIG
    params = tiny_models.random_params(config, 3)
    runs = np.random.default_rng(5).integers(0, config.n_vocab, (2, 2, 7))
    return Pair(config, params, bridge.bridge_of(config, params), *runs, np.array([5, 11]), np.array([2, 23]))


@pytest.mark.parametrize(
    ("model", "theirs", "activation", "each", "axes"),
    [
        ("induction", "resid_pre", "resid_pre", "position", (0, 1)),
        ("induction", "attn_head_q_all_pos", "attn/q", "head", (0, 1)),
        ("induction", "attn_head_out_all_pos", "attn/z", "head", (0, 1)),
        ("random", "mlp_out", "mlp/out", "position", (0, 1)),
        ("random", "attn_head_out_by_pos", "attn/z", ("head", "position"), (0, 2, 1)),  # theirs: layer, position, head
        ("random", "attn_head_pattern_by_pos", "attn/pattern", ("head", "position"), (0, 1, 2)),
        pytest.param(
            "random",
            "attn_head_pattern_dest_src_pos",
            "attn/pattern",
            ("head", "position", "key_position"),
            (0, 1, 2, 3),
            marks=strength.full_only("test_neurons_tokens_looked_at_and_branches, without 294 runs of torch"),
        ),
    ],
)
def test_a_grid_is_theirs(request, model, theirs, activation, each, axes):
    pair = request.getfixturevalue(model)
    import torch
    from transformer_lens import patching

    metric = logit_difference(pair.answer, pair.wrong)
    grid = activation_patching(pair.config, pair.params, pair.tokens_BT, pair.source_BT, metric, activation, each=each)
    _, cache = pair.bridge.run_with_cache(torch.tensor(pair.source_BT))
    patched = getattr(patching, f"get_act_patch_{theirs}")
    expected = patched(pair.bridge, torch.tensor(pair.tokens_BT), cache, pair.metric).numpy().transpose(axes)
    assert grid.shape == expected.shape
    assert np.ptp(expected) > 2
    assert np.abs(grid - expected).max() <= BOUND * np.abs(expected).max()


def test_the_grid_of_the_toy_finds_its_induction_head(induction):
    metric = logit_difference(induction.answer, induction.wrong)
    config, params, _, tokens_BT, source_BT, *_ = induction
    grid = np.asarray(activation_patching(config, params, tokens_BT, source_BT, metric, "attn/z", each="head"))
    assert grid[INDUCTION] > 10
    assert np.delete(grid.reshape(-1), np.ravel_multi_index(INDUCTION, grid.shape)).max() < -10


def test_causal_tracing_is_theirs_with_hooks(random):
    import torch

    config, params, theirs, tokens_BT, *_ = random
    row, subject, key, n_samples = tokens_BT[:1], [1, 2, 3], jax.random.key(3), 4
    found = causal_tracing(config, params, row, subject, key, noise=0.7, n_samples=n_samples)
    noise = torch.tensor(np.array(0.7 * jax.random.normal(key, (n_samples, len(subject), config.n_embd), np.float32)))
    logits, clean = theirs.run_with_cache(torch.tensor(row))
    answer = int(logits[0, -1].argmax())

    def noisy(embed, hook):
        embed[:, subject] = embed[:, subject] + noise
        return embed

    def probability(*hooks):
        rows = torch.tensor(row).repeat(n_samples, 1)
        out = theirs.run_with_hooks(rows, fwd_hooks=[("hook_embed", noisy), *hooks])
        return float(out[:, -1].softmax(-1)[:, answer].mean())

    def restored(layer, t):
        name = f"blocks.{layer}.hook_resid_post"

        def restore(stream, hook):
            stream[:, t] = clean[name][:, t]
            return stream

        return probability((name, restore))

    expected = np.array([[restored(layer, t) for t in range(row.shape[1])] for layer in range(config.n_layer)])
    assert found.answer == answer
    assert np.ptp(expected) > 0.05
    assert np.abs(found.restored - expected).max() <= BOUND
    assert abs(found.noised - probability()) <= BOUND
    assert abs(found.clean - float(logits[0, -1].softmax(-1)[answer])) <= BOUND


def test_attention_knockout_is_theirs_with_hooks(random):
    import torch

    metric = logit_difference(random.answer, random.wrong)
    found = attention_knockout(random.config, random.params, random.tokens_BT, metric, [1, 2, 4])

    def block(scores, hook):
        scores[:, :, -1, [1, 2, 4]] = -torch.inf
        return scores

    names = [f"blocks.{layer}.attn.hook_attn_scores" for layer in range(random.config.n_layer)]
    tokens = torch.tensor(random.tokens_BT)
    expected = [float(random.metric(random.bridge.run_with_hooks(tokens, fwd_hooks=[(n, block)]))) for n in names]
    plain = float(random.metric(random.bridge(tokens)))
    assert np.abs(np.array(expected) - plain).min() > 0.1
    assert np.abs(np.asarray(found) - expected).max() <= BOUND * np.abs(expected).max()
