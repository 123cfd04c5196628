"""The fingerprint of a model is that of its values, and of nothing else."""

import jax
import jax.numpy as jnp
import pytest
from tiny_models import CONFIG, random_params

import gpt2_jax
from gpt2_jax.checkpoints.fingerprints import fingerprint
from gpt2_jax.params import flatten, unflatten


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0)


@pytest.mark.parametrize("form", ["tensorflow", "huggingface", "orbax"])
def test_every_format_gives_the_same(tmp_path, params, form):
    gpt2_jax.save(tmp_path / "model", CONFIG, params, format=form)
    assert fingerprint(*gpt2_jax.load(tmp_path / "model")) == fingerprint(CONFIG, params)


def test_the_smallest_change_of_any_tensor_gives_another(params):
    flat = flatten(params)
    seen = {fingerprint(CONFIG, params)}
    for name, leaf in flat.items():
        nearest = jnp.nextafter(leaf.ravel()[-1], jnp.inf)
        changed = jnp.ravel(leaf).at[-1].set(nearest).reshape(leaf.shape)
        seen.add(fingerprint(CONFIG, unflatten(flat | {name: changed})))
    assert len(seen) == 1 + len(flat)


def test_what_counts_and_what_does_not(params):
    same = fingerprint(CONFIG, params)
    assert fingerprint(CONFIG.replace(attn_pdrop=0.5, compute_dtype="bfloat16", attention="plain"), params) == same
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    others = {
        fingerprint(CONFIG, half),
        fingerprint(CONFIG.replace(n_head=1), params),
        fingerprint(CONFIG.replace(qkv_bias=False), params),
    }
    assert len(others | {same}) == 4
