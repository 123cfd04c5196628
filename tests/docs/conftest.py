"""Fixtures for the tests of docs/coming_from. A file that uses `params` or `expected` defines CONFIG and TOKENS."""

import bridge
import jax
import jax.numpy as jnp
import numpy_activations as naive
import pytest
import tiny_runs

from gpt2_jax import training


@pytest.fixture(scope="module")
def params(request):
    """Random weights of the file's CONFIG."""
    return jax.tree.map(jnp.asarray, naive.weights(request.module.CONFIG))


@pytest.fixture(scope="module")
def expected(request, params):
    """Logits and activations of the file's TOKENS, by NumPy in float64."""
    return naive.forward(request.module.CONFIG, params, request.module.TOKENS)


@pytest.fixture(scope="module")
def torch():
    """Torch, or a skip: the libraries come with the `parity` extra."""
    pytest.importorskip("transformers", reason=bridge.REASON)
    return pytest.importorskip("torch", reason=bridge.REASON)


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    """tiny_runs.TEXT, prepared for training."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text(tiny_runs.TEXT)
    return training.prepare([folder / "text.txt"], folder / "tokens", tokenizer, val_fraction=0.2, split="tail")


@pytest.fixture(scope="module")
def plan():
    """The plan of the small recipe on the model of tiny_runs."""
    return training.make_plan(tiny_runs.CONFIG, tiny_runs.small())


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    with tiny_runs.compiled_once(tmp_path_factory.mktemp("compiled")):
        yield
