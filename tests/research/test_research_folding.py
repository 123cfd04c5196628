"""Folding gives other weights and the same model: in float64 up to rounding, in float32 and bfloat16 as measured."""

import forward
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edited_weights import CONFIG, assert_close, bits, logits, models, weights
from hypothesis import given, settings
from scipy.special import log_softmax

from gpt2_jax.params import flatten
from gpt2_jax.research import folding


@settings(max_examples=23)
@given(models())
def test_folded_norms_give_the_same_logits(model):
    config, params = model
    folded = folding.fold_layer_norm(config, params)
    assert_close(logits(config, folded), logits(config, params))
    for i in range(config.n_layer):
        for norm in ("ln_1", "ln_2"):
            assert (folded[f"h{i}"][norm]["g"] == 1).all()
            assert (folded[f"h{i}"][norm]["b"] == 0).all()
            assert (params[f"h{i}"][norm]["g"] != 1).any()  # there was something to fold
    assert bits({"wte": folded["wte"], "ln_f": folded["ln_f"]}) == bits({"wte": params["wte"], "ln_f": params["ln_f"]})
    assert bits(folding.fold_layer_norm(config, folded)) == bits(folded)


@settings(max_examples=23)
@given(models())
def test_a_centred_head_gives_the_same_probabilities(model):
    config, params = model
    before, params_before = logits(config, params), bits(params)
    centred = folding.center_unembed(params)
    after = logits(config, centred)
    assert_close(log_softmax(after, -1), log_softmax(before, -1))
    assert_close(after, before - before.mean(-1, keepdims=True))  # logits decrease by their mean
    assert np.abs(centred["wte"].mean(0)).max() < 1e-15
    assert np.abs(params["wte"].mean(0)).max() > 1e-4  # there was something to center
    embedded = centred["wte"][:, None] + centred["wpe"]
    assert_close(embedded, params["wte"][:, None] + params["wpe"], 1e-14)
    assert bits(params) == params_before
    assert set(bits(centred).items()) ^ set(params_before.items()) == {
        item for tree in (params, centred) for item in bits({name: tree[name] for name in ("wte", "wpe")}).items()
    }


def test_the_model_itself_in_float64():
    with jax.enable_x64(True):
        config = CONFIG.replace(param_dtype="float64", compute_dtype="float64")
        params = weights(dtype=np.float64, kind=jnp.asarray)
        tokens_BT = forward.some_tokens(config, 3, 11)
        before = forward.logits_of(config, params, tokens_BT)
        folded = forward.logits_of(config, folding.fold_layer_norm(config, params), tokens_BT)
        assert forward.relative_error(folded, before) < 1e-13  # measured: 1e-15
        centred = forward.logits_of(config, folding.center_unembed(params), tokens_BT)
        assert forward.relative_error(log_softmax(centred, -1), log_softmax(before, -1)) < 1e-13  # measured: 2e-16


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("bfloat16", 0.03)])
def test_the_model_itself_in_lower_precision(dtype, bound):
    """Compared with NumPy in float64. New weights are rounded to bfloat16; the old ones were exact."""
    config = CONFIG.replace(param_dtype=dtype)
    params = weights(dtype=jnp.dtype(dtype), kind=jnp.asarray)
    tokens_1T = np.arange(config.n_ctx)[None]
    exact = logits(config, params)[None]
    exact_logprobs = log_softmax(exact, -1)
    folded = forward.logits_of(config, folding.fold_layer_norm(config, params), tokens_1T)
    assert forward.relative_error(folded, exact) < bound  # measured: 5e-7, 8e-3; not folded: 4e-7, 3e-7
    centred = log_softmax(forward.logits_of(config, folding.center_unembed(params), tokens_1T), -1)
    assert forward.relative_error(centred, exact_logprobs) < bound  # measured: 1e-7, 1e-3; not centred: 2e-7, 1e-7


def test_the_embedded_model_folded(shakespeare, reference):
    """Logits are as close to those of OpenAI's code as before folding, 7e-7: 4 rows of 97 tokens, float32."""
    config, params = shakespeare
    folded = folding.center_unembed(folding.fold_layer_norm(config, params))
    ours = forward.logits_of(config, folded, reference["tokens"])
    assert forward.relative_error(log_softmax(ours, -1), log_softmax(reference["logits"], -1)) < 3e-6  # measured: 6e-7
    assert {leaf.dtype.name for leaf in flatten(folded).values()} == {"float32"}


def test_a_bias_that_may_not_be_is_not_made():
    config = CONFIG.replace(qkv_bias=False)
    with pytest.raises(ValueError, match=r"config\.replace\(qkv_bias=True\)"):
        folding.fold_layer_norm(config, weights())
    with pytest.raises(ValueError, match="extra: h2/"):
        folding.fold_layer_norm(CONFIG.replace(n_layer=2), weights())
    with pytest.raises(ValueError, match="no wte"):
        folding.center_unembed({"wpe": np.zeros((3, 2))})
