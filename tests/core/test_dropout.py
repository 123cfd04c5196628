"""Dropout's bits: uniform, independent of their neighbors and of other keys, and the same on all devices."""

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gpt2_jax.dropout import Dropout, drop, hash_bits

SHAPE = (7, 3, 101, 97)


def bits(seed, shape=SHAPE):
    return np.asarray(hash_bits(jax.random.key(seed), shape))


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_each_byte_takes_all_values_equally_often(shift):
    p = [stats.chisquare(np.bincount((bits(seed) >> shift).ravel() & 255, minlength=256)).pvalue for seed in range(7)]
    assert stats.kstest(p, "uniform").pvalue > 1e-3, p  # too uniform would be wrong too


@pytest.mark.parametrize("step", [1, 2, 3, 97, 101 * 97, 128])
def test_entries_say_nothing_of_those_after_them(step):
    """At rate 0.1, an entry and the one `step` later: the four cases are as frequent as for independent draws."""
    dropped = bits(5).ravel() < 0.1 * 2**32
    table = np.histogram2d(dropped[:-step], dropped[step:], bins=2)[0]
    assert stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize("make", ["seed", "fold_in", "split"])
def test_keys_that_are_neighbours_share_nothing(make):
    key = jax.random.key(11)
    keys = {
        "seed": [jax.random.key(s) for s in (11, 12)],
        "fold_in": [jax.random.fold_in(key, s) for s in (0, 1)],
        "split": list(jax.random.split(key)),
    }
    one, other = (np.asarray(hash_bits(k, SHAPE)) for k in keys[make])
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4 / np.sqrt(one.size)
    table = np.histogram2d((one < 2**30).ravel(), (other < 2**30).ravel(), bins=2)[0]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_rows_that_are_alike_are_dropped_apart():
    """No two rows, heads or queries have the same mask."""
    kept = np.asarray(drop(jnp.ones(SHAPE), 0.5, jax.random.key(2))) != 0
    rows = kept.reshape(-1, SHAPE[-1])
    assert len(np.unique(rows, axis=0)) == len(rows)


@pytest.mark.parametrize("rate", [0.1, 0.37, 0.9])
def test_the_share_that_is_dropped_is_the_rate(rate):
    x = np.asarray(drop(jnp.ones(SHAPE), rate, jax.random.key(3)))
    n_dropped = (x == 0).sum()
    assert stats.binomtest(int(n_dropped), x.size, rate).pvalue > 1e-3
    np.testing.assert_allclose(x[x != 0], 1 / (1 - rate), rtol=1e-6)


def test_nothing_is_dropped_where_nothing_is_asked_for():
    x = jnp.ones((3, 5))
    key = {"dropout": jax.random.key(0)}
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, False, rngs=key), x)
    np.testing.assert_array_equal(Dropout(0.5).apply({}, x, True), x)
    assert (np.asarray(Dropout(0.5).apply({}, x, False, rngs=key)) == 0).any()


def test_real_heads_have_the_same_bits_with_heads_of_zeros():
    weights_BNTS, key = jnp.ones((2, 3, 5, 7)), {"dropout": jax.random.key(0)}
    more_BNTS = jnp.pad(weights_BNTS, [(0, 0), (0, 2), (0, 0), (0, 0)])
    expected = Dropout(0.4).apply({}, weights_BNTS, False, rngs=key)
    found = Dropout(0.4, n_heads=3).apply({}, more_BNTS, False, rngs=key)
    np.testing.assert_array_equal(found[:, :3], expected)
    np.testing.assert_array_equal(found[:, 3:], 0)


def test_the_gradient_passes_where_the_value_does():
    x, key = jnp.ones(SHAPE[2:]), jax.random.key(1)
    value = drop(x, 0.3, key)
    np.testing.assert_array_equal(jax.grad(lambda x: drop(x, 0.3, key).sum())(x), value)


EIGHT_DEVICES = """
    import json
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from gpt2_jax.dropout import drop
    from gpt2_jax.sharding import make_mesh

    x = np.ones((8, 4, 11, 6), np.float32)
    one = jax.jit(drop, static_argnums=1)(x, 0.3, jax.random.key(4))
    same = []
    for spec in (PartitionSpec("data", "model"), PartitionSpec("model"), PartitionSpec(None, ("model", "data"))):
        mesh = make_mesh(2, 4) if spec[0] else make_mesh(2, 2)
        parts = jax.device_put(x, NamedSharding(mesh, spec))
        many = jax.jit(drop, static_argnums=1)(parts, 0.3, jax.random.key(4))
        same.append(bool((np.asarray(many) == np.asarray(one)).all() and len(many.sharding.device_set) > 1))
    print(json.dumps(same))
"""


def test_devices_change_nothing():
    assert commands.on_eight_devices(EIGHT_DEVICES) == [True] * 3
