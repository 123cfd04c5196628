"""Dropout, and the computations that stay float32 under bfloat16."""

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from forward import CONFIG, in_bfloat16, logits_of, padding_masks, relative_error, run, silence, some_tokens
from measures import equations

import gpt2_jax

# --- dropout ---------------------------------------------------------------------------------------------------------

RATES = ["embd_pdrop", "attn_pdrop", "resid_pdrop"]


def _with_rates(**rates):
    return dataclasses.replace(CONFIG, **(dict.fromkeys(RATES, 0.0) | rates))


@functools.partial(jax.jit, static_argnums=0)
def _noisy(config, params, tokens_BT, key):
    out = gpt2_jax.GPT2(config).apply({"params": params}, tokens_BT, deterministic=False, rngs={"dropout": key})
    return out.logits


def test_deterministic_ignores_the_rates(params):
    tokens_BT = some_tokens(CONFIG, 2, 11)
    high = _with_rates(embd_pdrop=0.9, attn_pdrop=0.9, resid_pdrop=0.9)
    np.testing.assert_array_equal(logits_of(high, params, tokens_BT), logits_of(_with_rates(), params, tokens_BT))


def test_dropout_needs_a_key(params):
    with pytest.raises((ValueError, flax.errors.InvalidRngError)):
        gpt2_jax.GPT2(CONFIG).apply({"params": params}, some_tokens(CONFIG, 2, 11), deterministic=False)


def test_dropout_at_rate_zero_changes_nothing(params):
    tokens_BT = some_tokens(CONFIG, 2, 11)
    noisy = np.asarray(_noisy(_with_rates(), params, tokens_BT, jax.random.key(0)))
    assert relative_error(noisy, logits_of(CONFIG, params, tokens_BT)) < 2e-6


@pytest.mark.parametrize(
    ("rate", "silent"),
    [("embd_pdrop", ()), ("attn_pdrop", ()), ("resid_pdrop", "attn"), ("resid_pdrop", "mlp")],
    ids=["embd", "attn", "resid of mlp", "resid of attn"],
)
def test_each_rate_acts_and_follows_the_key(params, rate, silent):
    """Dropout works in each of the four places, depends on the key, and draws differently for each row."""
    config, weights = _with_rates(**{rate: 0.3}), silence(params, silent) if silent else params
    tokens_BT = np.repeat(some_tokens(CONFIG, 1, 11), 2, axis=0)
    clean = logits_of(config, weights, tokens_BT)
    one, again, other = (np.asarray(_noisy(config, weights, tokens_BT, jax.random.key(seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert relative_error(one, clean) > 0.01
    assert relative_error(other, one) > 0.01
    assert relative_error(one[0], one[1]) > 0.01


@pytest.mark.parametrize("rate", RATES)
def test_what_dropout_keeps_is_scaled_up(rate):
    """Where the model is linear in the dropped values, the mean over keys is the clean result; unscaled, 0.7 of it."""
    config = dataclasses.replace(_with_rates(**{rate: 0.3}), n_layer=1)
    weights = numpy_reference.random_params(config, np.random.default_rng(7))
    weights["ln_f"]["b"][:] = 0
    if rate == "embd_pdrop":  # far below sqrt(epsilon) the final LayerNorm is linear
        weights = silence(weights, "attn", "mlp")
        weights["wte"] *= 1e-4
        weights["wpe"] *= 1e-4
        silenced = jax.tree.map(np.zeros_like, weights)
    else:  # it is also linear in what attention adds, if that is small
        weights = silence(weights, "mlp")
        for leaf in weights["h0"]["attn"]["c_proj"].values():
            leaf *= 1e-3
        silenced = silence(weights, "attn")
    tokens_BT = some_tokens(config, 3, 11)
    base = logits_of(config, silenced, tokens_BT)
    noisy = jax.vmap(lambda key: _noisy(config, weights, tokens_BT, key))(jax.random.split(jax.random.key(0), 512))
    effect, mean_effect = logits_of(config, weights, tokens_BT) - base, np.asarray(noisy).mean(0) - base
    assert abs((mean_effect * effect).sum() / (effect**2).sum() - 1) < 0.03  # measured up to 0.0055 over four keys


# --- dtypes ----------------------------------------------------------------------------------------------------------


def test_bfloat16_compute_stays_near_float32(shakespeare, reference):
    """On trained weights, measured 4.6e-3: about one bfloat16 rounding (2**-8)."""
    config, weights = shakespeare
    logits = logits_of(in_bfloat16(config), weights, reference["tokens"])
    assert logits.dtype == np.float32
    assert 1e-4 < relative_error(logits, reference["logits"]) < 0.015


def test_bfloat16_logits_are_not_rounded_to_bfloat16(params):
    """The sum of the output head stays float32. It is not rounded and widened again."""
    logits = logits_of(in_bfloat16(CONFIG), params, some_tokens(CONFIG, 2, 11))
    rounded = logits.astype(jnp.bfloat16).astype(np.float32)
    assert (rounded != logits).mean() > 0.9


@pytest.mark.parametrize(
    ("compute_dtype", "offset", "step", "bound"),
    [("float32", 256.0, 2.0**-8, 2e-3), ("bfloat16", 96.0, 0.5, 1e-2)],
)
def test_layer_norm_survives_a_large_offset(compute_dtype, offset, step, bound):
    """The logits if blocks add nothing, LayerNorm(wte + wpe) @ wte.T, with all of wpe far from 0.

    Mean and variance need float32, and the variance around the mean: E[x^2] - E[x]^2 has no correct digit here.
    The inputs are chosen so that wte + wpe is exact in the compute dtype. Measured 5.8e-4 and 1.3e-3.
    """
    config = dataclasses.replace(CONFIG, n_layer=1, compute_dtype=compute_dtype)
    rng = np.random.default_rng(13)
    wte_VD = step * rng.integers(-8, 9, (config.n_vocab, config.n_embd))
    wpe_TD = step * rng.integers(-8, 9, (config.n_ctx, config.n_embd)) + offset
    weights = silence(numpy_reference.random_params(config, rng), "attn", "mlp")
    weights |= {"wte": wte_VD.astype(np.float32), "wpe": wpe_TD.astype(np.float32)}
    tokens_BT = some_tokens(config, 2, 11)
    expected = numpy_reference.forward(weights, tokens_BT, config.n_head)
    assert relative_error(logits_of(config, weights, tokens_BT), expected) < bound


def test_softmax_and_layer_norm_never_leave_float32(params):
    """Every exponential and every inverse root of the bfloat16 program is computed in float32."""
    tokens_BT, mask_BT = some_tokens(CONFIG, 3, 11), padding_masks(11)["left"]
    program = jax.make_jaxpr(lambda p: run(in_bfloat16(CONFIG), p, tokens_BT, mask_BT))(params)
    dtypes = [
        (equation.primitive.name, equation.outvars[0].aval.dtype)
        for equation in equations(program.jaxpr)
        if equation.primitive.name in ("exp", "exp2", "rsqrt", "sqrt")
    ]
    assert len(dtypes) >= 3 * CONFIG.n_layer + 1  # two norms and a softmax a layer, and the final norm
    assert {dtype for _, dtype in dtypes} == {np.dtype("float32")}, dtypes
