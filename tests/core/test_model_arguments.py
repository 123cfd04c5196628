"""What the model rejects, and where it returns NaN because a compiled program cannot raise."""

import dataclasses

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forward import CONFIG, cached_step, in_bfloat16, logits_of, relative_error, run, some_tokens

import gpt2_jax

# --- bad arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [CONFIG.n_vocab, 2**31 - 1, -1, -CONFIG.n_vocab])
def test_an_id_outside_the_vocabulary_is_nan_in_its_row_alone(params, bad):
    """The id is not clamped to the last row of wte, and not counted from its end."""
    tokens_BT = some_tokens(CONFIG, 3, 11)
    clean = logits_of(CONFIG, params, tokens_BT)
    tokens_BT[1, 5] = bad
    logits = logits_of(CONFIG, params, tokens_BT)
    assert np.isnan(logits[1, 5:]).all()
    np.testing.assert_array_equal(logits[[0, 2]], clean[[0, 2]])


def _raises(params, tokens_BT, mask_BT=None, cache=None):
    with pytest.raises(ValueError, match=r"\w"):
        gpt2_jax.GPT2(CONFIG).apply({"params": params}, tokens_BT, mask_BT=mask_BT, cache=cache)


def test_more_tokens_than_the_context_are_refused(params):
    _raises(params, np.zeros((1, CONFIG.n_ctx + 1), np.int32))


@pytest.mark.parametrize("shape", [(11,), (2, 10), (1, 11), (2, 1), (11, 2), (2, 1, 11)], ids=str)
def test_a_mask_of_another_shape_is_refused(params, shape):
    """No broadcasting: a mask that fits by accident is a bug of the caller."""
    _raises(params, some_tokens(CONFIG, 2, 11), np.ones(shape, bool))


@pytest.mark.parametrize(
    "tokens",
    [np.zeros(7, np.int32), np.zeros((1, 2, 7), np.int32), np.int32(3), np.zeros((2, 7), np.float32)],
    ids=["1-D", "3-D", "scalar", "float"],
)
def test_tokens_that_are_not_ids_by_batch_and_time_are_refused(params, tokens):
    _raises(params, tokens)


@pytest.mark.parametrize(
    ("batch", "slots", "sizes"),
    [(1, 11, {}), (3, 4, {}), (3, 11, {"n_layer": 2}), (3, 11, {"n_layer": 5}), (3, 11, {"n_head": 7})],
    ids=["rows", "slots", "fewer layers", "more layers", "heads"],
)
def test_a_cache_that_does_not_fit_is_refused(params, batch, slots, sizes):
    """To broadcast one row's keys over the batch, or to drop a layer's, would give plausible wrong results."""
    cache = gpt2_jax.init_cache(dataclasses.replace(CONFIG, **sizes), batch, slots)
    _raises(params, some_tokens(CONFIG, 3, 5), cache=cache)


def test_a_float_mask_is_refused(params):
    """An additive mask means the opposite: its 0 is a token to attend to."""
    _raises(params, some_tokens(CONFIG, 2, 11), np.zeros((2, 11), np.float32))


def test_a_64_bit_id_is_not_cut_down_to_another_token(params):
    """JAX without x64 narrows to int32: 2**32 + 5 would be read as 5."""
    wide_BT = some_tokens(CONFIG, 2, 11).astype(np.int64)
    wide_BT[0, 3] = 2**32 + 5
    logits = gpt2_jax.GPT2(CONFIG).apply({"params": params}, wide_BT).logits
    assert np.isnan(logits[0, 3:]).all()
    assert np.isfinite(logits[1]).all()


def test_numpy_params_and_lists_of_tokens_will_do(params):
    """NumPy params work outside jit."""
    tokens_BT = some_tokens(CONFIG, 2, 7)
    numpy_params = jax.tree.map(np.asarray, params)
    logits = gpt2_jax.GPT2(CONFIG).apply({"params": numpy_params}, tokens_BT.tolist()).logits
    assert relative_error(np.asarray(logits), logits_of(CONFIG, params, tokens_BT)) < 5e-6


@pytest.mark.parametrize(("batch", "slots"), [(0, 5), (3, 0), (3, 2.5), (3, -1), (True, 5)])
def test_a_cache_of_no_size_is_refused(batch, slots):
    with pytest.raises(ValueError, match="must be a whole number, 1 or more"):
        gpt2_jax.init_cache(CONFIG, batch, slots)


def test_a_64_bit_id_under_x64_is_no_other_token_either(params):
    with jax.enable_x64(True):
        wide_BT = jnp.asarray(some_tokens(CONFIG, 2, 11), jnp.int64).at[0, 3].set(2**40 + 5)
        logits = run(CONFIG, params, wide_BT)
    assert np.isnan(logits[0, 3:]).all()
    assert np.isfinite(logits[1]).all()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32, np.uint64])
def test_ids_of_any_integer_dtype(params, dtype):
    tokens_BT = some_tokens(CONFIG, 2, 11)
    expected = logits_of(CONFIG, params, tokens_BT)
    np.testing.assert_array_equal(logits_of(CONFIG, params, tokens_BT.astype(dtype)), expected)
    jitted = run(CONFIG, params, jnp.asarray(tokens_BT.astype(dtype) if dtype != np.uint64 else tokens_BT))
    np.testing.assert_array_equal(jitted, expected)


def test_padding_after_a_full_context_is_harmless(params):
    """The row has used all positions; a padded step uses none."""
    cache = gpt2_jax.init_cache(CONFIG, 2, CONFIG.n_ctx + 3)
    tokens_BT = some_tokens(CONFIG, 2, CONFIG.n_ctx)
    _, cache = cached_step(CONFIG, params, tokens_BT, None, cache)
    logits, cache = cached_step(CONFIG, params, tokens_BT[:, :1], np.zeros((2, 1), bool), cache)
    assert np.isfinite(logits).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(cache))


def test_float64_without_x64_is_refused(params):
    for name in ("param_dtype", "compute_dtype"):
        config = dataclasses.replace(CONFIG, **{name: "float64"})
        with pytest.raises(ValueError, match="jax_enable_x64"):
            gpt2_jax.GPT2(config).apply({"params": params}, some_tokens(CONFIG, 2, 5))


def test_a_key_must_be_a_key():
    with pytest.raises(ValueError, match="key must be a key"):
        gpt2_jax.init_params(CONFIG, 0)


@pytest.mark.parametrize("cache", [{}, "cache", 3])
def test_a_cache_must_be_one(params, cache):
    _raises(params, some_tokens(CONFIG, 2, 5), cache=cache)


def test_a_cache_of_another_dtype_or_layout_is_refused(params):
    cache = gpt2_jax.init_cache(CONFIG, 2, 11)
    half = gpt2_jax.init_cache(in_bfloat16(CONFIG), 2, 11)
    for wrong in (half, cache.replace(v_BNSH=cache.k_BNHS), cache.replace(k_BNHS=(), v_BNSH=())):
        _raises(params, some_tokens(CONFIG, 2, 5), cache=wrong)


def test_abstract_params_keep_no_mesh():
    """The tree is cached between calls: a mesh set at the first call must not stay in it."""
    config = dataclasses.replace(CONFIG, n_vocab=59)
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        first = gpt2_jax.abstract_params(config)
    assert all(leaf.sharding is None for leaf in jax.tree.leaves(first))


def test_taps_find_the_model_inside_another_module(params):
    class Outer(flax.linen.Module):
        def setup(self):
            self.gpt2 = gpt2_jax.GPT2(CONFIG)

        def __call__(self, tokens_BT, taps):
            return self.gpt2(tokens_BT, taps=taps).logits

    tokens_BT = some_tokens(CONFIG, 2, 5)
    taps = {"h0/resid_post": lambda value, position_BT: 2 * value}
    expected = gpt2_jax.GPT2(CONFIG).apply({"params": params}, tokens_BT, taps=taps).logits
    found = Outer().apply({"params": {"gpt2": params}}, tokens_BT, taps)
    np.testing.assert_array_equal(found, expected)
    assert abs(expected - gpt2_jax.GPT2(CONFIG).apply({"params": params}, tokens_BT).logits).max() > 0.01
