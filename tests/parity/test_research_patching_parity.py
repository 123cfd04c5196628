"""Grids of patches are compared with transformer_lens.patching, which runs the whole model for each patch."""

from typing import Any, NamedTuple

import bridge
import numpy as np
import pytest
import tiny_models
from toy_induction import INDUCTION, induction_toy

from gpt2_jax.research.metrics import logit_difference
from gpt2_jax.research.patching import activation_patching

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
