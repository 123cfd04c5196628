"""The pretraining run of the build-an-LLM book, step by step beside a torch model with the book's layers."""

from pathlib import Path

import numpy as np
import pytest

import gpt2_jax

pytestmark = pytest.mark.parity
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def chapter5(monkeypatch):
    pytest.importorskip("torch", reason="needs the `parity` extra: pip install -e '.[parity]'")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import book_chapter5

    monkeypatch.setattr(book_chapter5, "N_TOKENS", 16)
    return book_chapter5


def test_all_losses_are_those_of_torch(chapter5):
    """An untied head, no query, key and value biases, and AdamW with decay of all parameters."""
    config = gpt2_jax.GPT2Config(61, 16, 24, 3, 2, tie_word_embeddings=False, qkv_bias=False)
    gpt2_jax.model.check_params(config, chapter5.book_params(config))
    ids = np.random.default_rng(0).integers(0, 61, 16 * 12 + 1).tolist()
    train = chapter5.windows(ids)
    assert train.shape == (12, 17)
    todo = chapter5.batches(train, seed=1)
    assert len(todo) == 10 * 6
    losses = {}
    for name, start in (("ours", chapter5.start_ours), ("torch", chapter5.start_torch)):
        step, loss = start(config, 0.0)
        losses[name] = [step(rows) for rows in todo] + [loss(train)]
    assert losses["ours"][-1] < losses["ours"][0] - 0.25  # measured: 0.29
    np.testing.assert_allclose(losses["ours"], losses["torch"], rtol=0, atol=1e-5)  # measured: 2.4e-6
