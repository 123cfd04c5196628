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


def process_by_hand(config, params):
    """Write the processed weights out in NumPy, one by one: readers, writers, value biases, head."""
    params, width = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params), config.n_embd
    out = {"ln_f": params["ln_f"], "lm_head": params["wte"] - params["wte"].mean(0)}
    out |= {name: params[name] - params[name].mean(1, keepdims=True) for name in ("wte", "wpe")}
    one = {"g": np.ones(width), "b": np.zeros(width)}
    for layer in range(config.n_layer):
        block = params[f"h{layer}"]
        new = {"ln_1": one, "ln_2": one, "attn": {}, "mlp": {}}
        for norm, room, reader in (("ln_1", "attn", "c_attn"), ("ln_2", "mlp", "c_fc")):
            w, b = block[room][reader]["w"], block[room][reader]["b"] + block[norm]["b"] @ block[room][reader]["w"]
            w = np.diag(block[norm]["g"]) @ w
            new[room][reader] = {"w": w - w.mean(0), "b": b}
            c_proj = block[room]["c_proj"]
            center = np.eye(width) - 1 / width
            new[room]["c_proj"] = {"w": c_proj["w"] @ center, "b": c_proj["b"] @ center}
        b = new["attn"]["c_attn"]["b"]
        new["attn"]["c_proj"]["b"] = new["attn"]["c_proj"]["b"] + b[2 * width :] @ new["attn"]["c_proj"]["w"]
        new["attn"]["c_attn"]["b"] = np.concatenate([b[: 2 * width], np.zeros(width)])
        out[f"h{layer}"] = new
    return out


@settings(max_examples=23)
@given(models())
def test_processed_weights_are_those_written_out(model):
    config, params = model
    before = bits(params)
    new_config, new = folding.process_weights(config, params)
    assert new_config == untied(config)
    assert bits(params) == before
    expected = flatten(process_by_hand(config, params))
    assert flatten(new).keys() == expected.keys()
    for name, leaf in flatten(new).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=0, atol=3e-15, err_msg=name)  # measured: 9e-16
    plain = logits(config, params)
    assert_close(logits(config, new), plain - plain.mean(-1, keepdims=True))


def untied(config):
    return config.replace(tie_word_embeddings=False)


STEPS = {
    "fold_value_biases": lambda c, p: (c, folding.fold_value_biases(c, p)),
    "center_writing_weights": lambda c, p: (c, folding.center_writing_weights(c, p)),
    "center_reading_weights": lambda c, p: (c, folding.center_reading_weights(c, folding.fold_layer_norm(c, p))),
    "untie_head": folding.untie_head,
    "untied_and_centered": lambda c, p: (untied(c), folding.center_writing_weights(*folding.untie_head(c, p))),
}


@pytest.mark.parametrize("name", STEPS)
@settings(max_examples=11)
@given(models())
def test_each_step_alone_keeps_the_logits(name, model):
    config, params = model
    new_config, new = STEPS[name](config, params)
    assert bits(new) != bits(params)
    assert_close(logits(config, new), logits(config, params))
    if name != "center_reading_weights":  # it would fold the folded norms again
        again = STEPS[name](new_config, new)[1]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-15), again, new)  # measured: 3e-16


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("bfloat16", 0.04)])
def test_a_processed_model_in_lower_precision(dtype, bound):
    config, params = CONFIG.replace(param_dtype=dtype), weights(dtype=jnp.dtype(dtype), kind=jnp.asarray)
    exact = logits(CONFIG, params)[None]
    exact -= exact.mean(-1, keepdims=True)
    new_config, new = folding.process_weights(config, params)
    assert {leaf.dtype.name for leaf in flatten(new).values()} == {dtype}
    ours = forward.logits_of(new_config, new, np.arange(CONFIG.n_ctx)[None])
    assert forward.relative_error(ours, exact) < bound  # measured: 4e-7, 0.011


def test_processing_works_under_jit_and_on_numpy_arrays():
    params = weights()
    config, new = folding.process_weights(CONFIG, params)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(new))
    assert not np.shares_memory(folding.untie_head(CONFIG, params)[1]["lm_head"], params["wte"])
    jitted = jax.jit(lambda p: folding.process_weights(CONFIG, p)[1])(params)
    for name, leaf in flatten(jitted).items():
        np.testing.assert_allclose(leaf, flatten(new)[name], rtol=0, atol=2e-6, err_msg=name)  # measured: 2e-7
    w_DV, b_V = folding.unembedding(config, new)
    assert (w_DV.shape, b_V.shape) == ((CONFIG.n_embd, CONFIG.n_vocab), (CONFIG.n_vocab,))
    np.testing.assert_allclose(w_DV.mean(0), 0, atol=1e-7)
    np.testing.assert_allclose(w_DV.mean(1), 0, atol=1e-7)


def test_a_stream_is_centered_in_its_dtype():
    stream_BTD = jnp.asarray(np.random.default_rng(0).normal(3, 1, (2, 5, 7)))
    np.testing.assert_allclose(folding.centered_stream(stream_BTD).mean(-1), 0, atol=2e-6)  # measured: 5e-7
    assert folding.centered_stream(stream_BTD.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"a stream must be floats \[\.\.\., D\], not int32\(3,\)"):
        folding.centered_stream(jnp.arange(3))


def test_norms_that_are_not_folded_are_refused():
    with pytest.raises(ValueError, match="g and b of h0/ln_1 must be 1 and 0: call fold_layer_norm first"):
        folding.center_reading_weights(CONFIG, weights())
    folded = folding.fold_layer_norm(CONFIG, weights())
    folded["h2"]["ln_2"]["b"] = folded["h2"]["ln_2"]["b"] + 0.1
    with pytest.raises(ValueError, match="h2/ln_2"):
        folding.center_reading_weights(CONFIG, folded)
    for function in (folding.process_weights, folding.untie_head, folding.fold_value_biases, folding.unembedding):
        with pytest.raises(ValueError, match="params do not match the config"):
            function(CONFIG, {"wte": weights()["wte"]})
