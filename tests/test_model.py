"""The forward pass: against the original's logits, a float64 NumPy forward pass, and itself by other roads."""

import dataclasses
import functools

import flax
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest

import gpt2_jax

CONFIG = gpt2_jax.GPT2Config(n_vocab=53, n_ctx=23, n_embd=21, n_head=3, n_layer=3)
EMBEDDED_BOUND = 2e-5  # of the largest absolute logit; measured 8.3e-7


@functools.partial(jax.jit, static_argnums=0)
def _apply(config, params, tokens_BT, mask_BT=None):
    return gpt2_jax.GPT2(config).apply({"params": params}, tokens_BT, mask_BT=mask_BT).logits


def _logits(config, params, tokens_BT, mask_BT=None):
    return np.asarray(_apply(config, params, tokens_BT, mask_BT))


@functools.partial(jax.jit, static_argnums=0)
def _step(config, params, tokens_BT, mask_BT, cache):
    out = gpt2_jax.GPT2(config).apply({"params": params}, tokens_BT, mask_BT=mask_BT, cache=cache)
    return out.logits, out.cache


def _incremental(config, params, tokens_BT, mask_BT, chunks, slots):
    """The logits of successive calls over chunks of the tokens, joined."""
    cache, parts, start = gpt2_jax.init_cache(config, len(tokens_BT), slots), [], 0
    for chunk in chunks:
        span = slice(start, start + chunk)
        logits, cache = _step(config, params, tokens_BT[:, span], None if mask_BT is None else mask_BT[:, span], cache)
        parts.append(np.asarray(logits))
        start += chunk
    assert start == tokens_BT.shape[1]
    return np.concatenate(parts, axis=1)


def _error(ours, theirs):
    """The largest difference, relative to the largest absolute logit."""
    assert ours.shape == theirs.shape
    assert np.isfinite(theirs).all()
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def _tokens(config, batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, config.n_vocab, (batch, length), dtype=np.int32)


def _without(params, *parts):
    """A copy in which the named parts, "attn" or "mlp", add nothing to the residual stream."""
    params = jax.tree.map(np.array, params)
    for block in (branch for name, branch in params.items() if name.startswith("h")):
        for part in parts:
            for leaf in block[part]["c_proj"].values():
                leaf[:] = 0
    return params


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, numpy_reference.random_params(CONFIG, np.random.default_rng(3)))


# --- the original's logits, and what the bound would miss ------------------------------------------------------------


def test_embedded_model_gives_the_original_logits(shakespeare, reference):
    """The whole forward pass on trained weights."""
    config, weights = shakespeare
    logits = _logits(config, weights, reference["tokens"])
    assert logits.dtype == np.float32
    assert _error(logits, reference["logits"]) < EMBEDDED_BOUND


def _transposed(params, block):
    attn = params[block]["attn"]
    c_proj = {**attn["c_proj"], "w": np.asarray(attn["c_proj"]["w"]).T}
    return {**params, block: {**params[block], "attn": {**attn, "c_proj": c_proj}}}


def test_numpy_reference_gives_the_original_logits(shakespeare, reference):
    """The yardstick of the other tests is itself right: measured 7.8e-7, the original's own float32 rounding."""
    config, weights = shakespeare
    logits = numpy_reference.forward(weights, reference["tokens"], config.n_head)
    assert _error(logits, reference["logits"]) < 2e-6


MISTAKES = {
    "epsilon 1e-6": ({"eps": 1e-6}, 1e-3),  # measured 1.4e-3
    "exact gelu": ({"gelu": numpy_reference.gelu_erf}, 4e-4),  # measured 5.6e-4
    "position off by one": ({"first_position": 1}, 0.1),  # measured 0.19
    "transposed h0": ({"transpose": "h0"}, 0.1),  # measured 0.57
    "transposed h1": ({"transpose": "h1"}, 0.1),  # measured 0.22
    "transposed h2": ({"transpose": "h2"}, 0.1),  # measured 0.13
    "transposed h3": ({"transpose": "h3"}, 0.1),  # measured 0.16
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_classic_mistake_moves_the_logits_beyond_the_bound(shakespeare, reference, mistake):
    """The bound on the embedded model catches epsilon 1e-6, exact GELU, a position off by one, a transposed square."""
    config, weights = shakespeare
    settings, moves = MISTAKES[mistake]
    if block := settings.get("transpose"):
        weights, settings = _transposed(weights, block), {}
    wrong = numpy_reference.forward(weights, reference["tokens"][:1], config.n_head, **settings)
    assert _error(wrong, reference["logits"][:1]) > moves > 10 * EMBEDDED_BOUND


# --- random checkpoints of odd sizes against NumPy -------------------------------------------------------------------


@st.composite
def _cases(draw):
    n_head = draw(st.sampled_from([1, 3, 5]))
    config = gpt2_jax.GPT2Config(
        n_vocab=draw(st.sampled_from([2, 13, 29, 53])),
        n_ctx=draw(st.sampled_from([1, 7, 11, 17])),
        n_embd=n_head * draw(st.sampled_from([5, 7, 11])),
        n_head=n_head,
        n_layer=draw(st.integers(1, 3)),
    )
    length = draw(st.sampled_from(range(1, config.n_ctx + 1, 2)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens_BT = rng.integers(0, config.n_vocab, (draw(st.integers(1, 3)), length), dtype=np.int32)
    mask_BT = rng.random(tokens_BT.shape) < 0.6 if draw(st.booleans()) else None
    return config, numpy_reference.random_params(config, rng), tokens_BT, mask_BT


# Without shrinking, which would compile a program for each of its hundreds of attempts.
@hypothesis.settings(max_examples=8, deadline=None, phases=set(hypothesis.Phase) - {hypothesis.Phase.shrink})
@hypothesis.given(_cases())
def test_odd_shapes_agree_with_numpy(case):
    """Reshapes, head splits, masks and positions at sizes where nothing divides anything."""
    config, weights, tokens_BT, mask_BT = case
    expected = numpy_reference.forward(weights, tokens_BT, config.n_head, mask_BT)
    real_BT = np.ones(tokens_BT.shape, bool) if mask_BT is None else mask_BT
    hypothesis.assume(real_BT.any())

    logits = _logits(config, weights, tokens_BT, mask_BT)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    assert _error(logits[real_BT], expected[real_BT]) < 2e-5  # worst of 200 cases: 2.6e-6

    with jax.enable_x64(True):  # rounding gone: what is left is a bug
        double = dataclasses.replace(config, param_dtype="float64", compute_dtype="float64")
        logits = _logits(double, numpy_reference.as_float64(weights), tokens_BT, mask_BT)
    assert _error(logits[real_BT], expected[real_BT]) < 1e-12  # worst of 200 cases: 6.2e-15


# --- padding ---------------------------------------------------------------------------------------------------------


def _masks(length):
    """Named [3, length] masks: the first row keeps everything but one token, the last keeps a single one."""
    count = np.array([length - 1, length // 2, 1])[:, None]
    place = np.arange(length)
    holes = np.random.default_rng(5).permuted(np.tile(place, (3, 1)), axis=1) < count
    return {"left": place >= length - count, "right": place < count, "holes": holes}


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_a_padded_row_equals_the_row_alone(params, side):
    """Positions follow the mask and padded keys are unseen, wherever the padding is, down to a one-token prompt."""
    tokens_BT, mask_BT = _tokens(CONFIG, 3, 19), _masks(19)[side]
    logits = _logits(CONFIG, params, tokens_BT, mask_BT)
    assert np.isfinite(logits).all()
    expected = numpy_reference.forward(params, tokens_BT, CONFIG.n_head, mask_BT)
    assert _error(logits[mask_BT], expected[mask_BT]) < 5e-6  # measured 4.1e-7, here and for the cache
    for tokens_T, mask_T, logits_TV in zip(tokens_BT, mask_BT, logits, strict=True):
        alone = _logits(CONFIG, params, tokens_T[mask_T][None])[0]
        assert _error(logits_TV[mask_T], alone) < 5e-6


def test_the_token_under_the_padding_does_not_matter(params):
    """Exactly: a padded key's weight is zero, not small; and -1, a usual filler, is no worse than any other id."""
    mask_BT = _masks(19)["holes"]
    tokens_BT = _tokens(CONFIG, 3, 19)
    logits = _logits(CONFIG, params, tokens_BT, mask_BT)
    for filler in (_tokens(CONFIG, 3, 19, seed=1), -1):
        filled = _logits(CONFIG, params, np.where(mask_BT, tokens_BT, filler), mask_BT)
        assert np.isfinite(filled).all()
        np.testing.assert_array_equal(filled[mask_BT], logits[mask_BT])


def test_a_mask_of_ones_is_no_mask(params):
    tokens_BT = _tokens(CONFIG, 3, CONFIG.n_ctx)
    with_mask = _logits(CONFIG, params, tokens_BT, np.ones(tokens_BT.shape, bool))
    assert _error(with_mask, _logits(CONFIG, params, tokens_BT)) < 2e-6


def test_a_fully_padded_row_stays_finite_and_keeps_to_itself(params):
    """No softmax over nothing, forwards or backwards; the neighbour is untouched."""
    tokens_BT = _tokens(CONFIG, 2, 11)
    mask_BT = np.array([[False] * 11, [True] * 11])
    logits = _logits(CONFIG, params, tokens_BT, mask_BT)
    assert np.isfinite(logits).all()
    assert _error(logits[1:], _logits(CONFIG, params, tokens_BT[1:])) < 5e-6

    gradient = jax.jit(jax.grad(lambda p: _apply(CONFIG, p, tokens_BT, mask_BT)[1].var()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunks", "spare"),
    [((17,), 4), ((1,) * 17, 0), ((5, 1, 3, 7, 1), 3)],
    ids=["one pass", "one by one", "chunks"],
)
@pytest.mark.parametrize("padding", [None, "left", "right", "holes"])
def test_the_cache_gives_the_logits_of_one_pass(params, padding, chunks, spare):
    """Where keys are written, which slots are seen, and positions carried from call to call."""
    tokens_BT = _tokens(CONFIG, 3, 17)
    mask_BT = None if padding is None else _masks(17)[padding]
    real_BT = np.ones(tokens_BT.shape, bool) if mask_BT is None else mask_BT
    logits = _incremental(CONFIG, params, tokens_BT, mask_BT, chunks, slots=17 + spare)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    expected = _logits(CONFIG, params, tokens_BT, mask_BT)
    assert _error(logits[real_BT], expected[real_BT]) < 5e-6
    expected = numpy_reference.forward(params, tokens_BT, CONFIG.n_head, mask_BT)
    assert _error(logits[real_BT], expected[real_BT]) < 5e-6


def test_a_mask_may_come_and_go_between_cached_calls(params):
    """A padded prompt, then steps without a mask: the padded slots stay hidden."""
    tokens_BT, mask_BT = _tokens(CONFIG, 3, 17), np.ones((3, 17), bool)
    mask_BT[:, :11] = _masks(11)["left"]
    cache = gpt2_jax.init_cache(CONFIG, 3, 17)
    head, cache = _step(CONFIG, params, tokens_BT[:, :11], mask_BT[:, :11], cache)
    tail, _ = _step(CONFIG, params, tokens_BT[:, 11:], None, cache)
    expected = numpy_reference.forward(params, tokens_BT, CONFIG.n_head, mask_BT)
    logits = np.concatenate([head, tail], axis=1)
    assert _error(logits[mask_BT], expected[mask_BT]) < 5e-6


def test_without_a_cache_none_comes_back(params):
    assert gpt2_jax.GPT2(CONFIG).apply({"params": params}, _tokens(CONFIG, 1, 3)).cache is None


@pytest.mark.parametrize("slots", [7, CONFIG.n_ctx], ids=["slots", "n_ctx"])
def test_a_token_beyond_the_last_slot_is_nan(params, slots):
    """Not a write that is silently clamped onto the last slots, nor the last position twice."""
    tokens_BT = _tokens(CONFIG, 2, slots + 3)
    full = _logits(CONFIG, params, tokens_BT[:, :slots])
    logits = _incremental(CONFIG, params, tokens_BT, None, (slots - 2, 3, 1, 1), slots)
    assert _error(logits[:, : slots - 2], full[:, : slots - 2]) < 5e-6
    assert np.isnan(logits[:, slots:]).all()


def test_a_position_beyond_the_context_is_nan_in_its_row_alone(params):
    """Slots count padding, positions do not: only the row that has outrun wpe is lost."""
    slots = CONFIG.n_ctx + 2
    tokens_BT = _tokens(CONFIG, 2, slots)
    mask_BT = np.array([np.arange(slots) >= 0, np.arange(slots) >= 5])
    logits = _incremental(CONFIG, params, tokens_BT, mask_BT, (slots - 4, 1, 1, 1, 1), slots)
    assert np.isnan(logits[0, CONFIG.n_ctx :]).all()
    for row, span in ((0, slice(0, CONFIG.n_ctx)), (1, slice(5, slots))):
        alone = numpy_reference.forward(params, tokens_BT[row : row + 1, span], CONFIG.n_head)
        assert _error(logits[row : row + 1, span], alone) < 5e-6


# --- dropout ---------------------------------------------------------------------------------------------------------

RATES = ["embd_pdrop", "attn_pdrop", "resid_pdrop"]


def _with_rates(**rates):
    return dataclasses.replace(CONFIG, **(dict.fromkeys(RATES, 0.0) | rates))


@functools.partial(jax.jit, static_argnums=0)
def _noisy(config, params, tokens_BT, key):
    out = gpt2_jax.GPT2(config).apply({"params": params}, tokens_BT, deterministic=False, rngs={"dropout": key})
    return out.logits


def test_deterministic_ignores_the_rates(params):
    tokens_BT = _tokens(CONFIG, 2, 11)
    high = _with_rates(embd_pdrop=0.9, attn_pdrop=0.9, resid_pdrop=0.9)
    np.testing.assert_array_equal(_logits(high, params, tokens_BT), _logits(_with_rates(), params, tokens_BT))


def test_dropout_needs_a_key(params):
    with pytest.raises((ValueError, flax.errors.InvalidRngError)):
        gpt2_jax.GPT2(CONFIG).apply({"params": params}, _tokens(CONFIG, 2, 11), deterministic=False)


def test_dropout_at_rate_zero_changes_nothing(params):
    tokens_BT = _tokens(CONFIG, 2, 11)
    noisy = np.asarray(_noisy(_with_rates(), params, tokens_BT, jax.random.key(0)))
    assert _error(noisy, _logits(CONFIG, params, tokens_BT)) < 2e-6


@pytest.mark.parametrize(
    ("rate", "silent"),
    [("embd_pdrop", ()), ("attn_pdrop", ()), ("resid_pdrop", "attn"), ("resid_pdrop", "mlp")],
    ids=["embd", "attn", "resid of mlp", "resid of attn"],
)
def test_each_rate_acts_and_follows_the_key(params, rate, silent):
    """Each of the four places is wired in, is a function of the key, and draws anew for each row."""
    config, weights = _with_rates(**{rate: 0.3}), _without(params, silent) if silent else params
    tokens_BT = np.repeat(_tokens(CONFIG, 1, 11), 2, axis=0)
    clean = _logits(config, weights, tokens_BT)
    one, again, other = (np.asarray(_noisy(config, weights, tokens_BT, jax.random.key(seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert _error(one, clean) > 0.01
    assert _error(other, one) > 0.01
    assert _error(one[0], one[1]) > 0.01


@pytest.mark.parametrize("rate", RATES)
def test_what_dropout_keeps_is_scaled_up(rate):
    """Where the net is linear in what is dropped, the mean over keys is the clean result; unscaled it would be 0.7."""
    config = dataclasses.replace(_with_rates(**{rate: 0.3}), n_layer=1)
    weights = numpy_reference.random_params(config, np.random.default_rng(7))
    weights["ln_f"]["b"][:] = 0
    if rate == "embd_pdrop":  # far below sqrt(epsilon) the final LayerNorm is linear
        weights = _without(weights, "attn", "mlp")
        weights["wte"] *= 1e-4
        weights["wpe"] *= 1e-4
        silenced = jax.tree.map(np.zeros_like, weights)
    else:  # and so it is in what attention adds, when that is little
        weights = _without(weights, "mlp")
        for leaf in weights["h0"]["attn"]["c_proj"].values():
            leaf *= 1e-3
        silenced = _without(weights, "attn")
    tokens_BT = _tokens(config, 3, 11)
    base = _logits(config, silenced, tokens_BT)
    noisy = jax.vmap(lambda key: _noisy(config, weights, tokens_BT, key))(jax.random.split(jax.random.key(0), 512))
    effect, mean_effect = _logits(config, weights, tokens_BT) - base, np.asarray(noisy).mean(0) - base
    assert abs((mean_effect * effect).sum() / (effect**2).sum() - 1) < 0.03  # measured up to 0.0055 over four keys


# --- dtypes ----------------------------------------------------------------------------------------------------------


def _half(config):
    return dataclasses.replace(config, compute_dtype="bfloat16")


def test_bfloat16_compute_stays_near_float32(shakespeare, reference):
    """On trained weights, measured 4.6e-3: about one bfloat16 rounding (2**-8)."""
    config, weights = shakespeare
    logits = _logits(_half(config), weights, reference["tokens"])
    assert logits.dtype == np.float32
    assert 1e-4 < _error(logits, reference["logits"]) < 0.015


def test_bfloat16_logits_are_not_rounded_to_bfloat16(params):
    """The head's sum is kept in float32, not rounded and widened again."""
    logits = _logits(_half(CONFIG), params, _tokens(CONFIG, 2, 11))
    rounded = logits.astype(jnp.bfloat16).astype(np.float32)
    assert (rounded != logits).mean() > 0.9


@pytest.mark.parametrize(
    ("compute_dtype", "offset", "step", "bound"),
    [("float32", 256.0, 2.0**-8, 2e-3), ("bfloat16", 96.0, 0.5, 1e-2)],
)
def test_layer_norm_survives_a_large_offset(compute_dtype, offset, step, bound):
    """The logits of blocks that add nothing, LayerNorm(wte + wpe) @ wte.T, with all of wpe far from 0.

    Mean and variance in float32, the variance around the mean: E[x^2] - E[x]^2 has no digit left here.
    The inputs are chosen so that wte + wpe is exact in the compute dtype. Measured 5.8e-4 and 1.3e-3.
    """
    config = dataclasses.replace(CONFIG, n_layer=1, compute_dtype=compute_dtype)
    rng = np.random.default_rng(13)
    wte_VD = step * rng.integers(-8, 9, (config.n_vocab, config.n_embd))
    wpe_TD = step * rng.integers(-8, 9, (config.n_ctx, config.n_embd)) + offset
    weights = _without(numpy_reference.random_params(config, rng), "attn", "mlp")
    weights |= {"wte": wte_VD.astype(np.float32), "wpe": wpe_TD.astype(np.float32)}
    tokens_BT = _tokens(config, 2, 11)
    expected = numpy_reference.forward(weights, tokens_BT, config.n_head)
    assert _error(_logits(config, weights, tokens_BT), expected) < bound


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def test_softmax_and_layer_norm_never_leave_float32(params):
    """Every exponential and every inverse root of the bfloat16 program is taken in float32."""
    tokens_BT, mask_BT = _tokens(CONFIG, 3, 11), _masks(11)["left"]
    program = jax.make_jaxpr(lambda p: _apply(_half(CONFIG), p, tokens_BT, mask_BT))(params)
    dtypes = [
        (equation.primitive.name, equation.outvars[0].aval.dtype)
        for equation in _equations(program.jaxpr)
        if equation.primitive.name in ("exp", "exp2", "rsqrt", "sqrt")
    ]
    assert len(dtypes) >= 3 * CONFIG.n_layer + 1  # two norms and a softmax a layer, and the final norm
    assert {dtype for _, dtype in dtypes} == {np.dtype("float32")}, dtypes


# --- bad arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [CONFIG.n_vocab, 2**31 - 1, -1, -CONFIG.n_vocab])
def test_an_id_outside_the_vocabulary_is_nan_in_its_row_alone(params, bad):
    """Neither clamped to the last row of wte nor counted from its end."""
    tokens_BT = _tokens(CONFIG, 3, 11)
    clean = _logits(CONFIG, params, tokens_BT)
    tokens_BT[1, 5] = bad
    logits = _logits(CONFIG, params, tokens_BT)
    assert np.isnan(logits[1, 5:]).all()
    np.testing.assert_array_equal(logits[[0, 2]], clean[[0, 2]])


def _raises(params, tokens_BT, mask_BT=None, cache=None):
    with pytest.raises(ValueError, match=r"\w"):
        gpt2_jax.GPT2(CONFIG).apply({"params": params}, tokens_BT, mask_BT=mask_BT, cache=cache)


def test_more_tokens_than_the_context_are_refused(params):
    _raises(params, np.zeros((1, CONFIG.n_ctx + 1), np.int32))


@pytest.mark.parametrize("shape", [(11,), (2, 10), (1, 11), (2, 1), (11, 2), (2, 1, 11)], ids=str)
def test_a_mask_of_another_shape_is_refused(params, shape):
    """No broadcasting: a mask that fits by accident is a bug in the caller."""
    _raises(params, _tokens(CONFIG, 2, 11), np.ones(shape, bool))


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
    """Broadcasting one row's keys over the batch, or dropping a layer's, would give plausible nonsense."""
    cache = gpt2_jax.init_cache(dataclasses.replace(CONFIG, **sizes), batch, slots)
    _raises(params, _tokens(CONFIG, 3, 5), cache=cache)


# --- fresh parameters ------------------------------------------------------------------------------------------------


def test_fresh_parameters_have_the_original_scales():
    """Names, shapes and dtypes of the checkpoint; the original's initial values; no two leaves from one draw."""
    config = gpt2_jax.GPT2Config(n_vocab=211, n_ctx=53, n_embd=63, n_head=3, n_layer=2)
    fresh = gpt2_jax.init_params(config, jax.random.key(0))
    expected = numpy_reference.random_params(config, np.random.default_rng(0))
    for tree in (fresh, gpt2_jax.abstract_params(config)):
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), expected
        )
    scales = {"wte": 0.02, "wpe": 0.01, "w": 0.02}
    drawn = []
    for path, leaf in jax.tree.leaves_with_path(fresh):
        name = path[-1].key
        if name in scales:
            assert abs(np.std(leaf) / scales[name] - 1) < 0.05, path
            drawn.append(np.ravel(leaf)[:3])
        else:
            np.testing.assert_array_equal(leaf, np.full(leaf.shape, 1.0 if name == "g" else 0.0))
    assert len(np.unique(np.round(np.concatenate(drawn) / 0.01, 6))) == 3 * len(drawn)
