"""The forward pass against the original's logits, a float64 NumPy forward pass, and its own other code paths."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import numpy_reference
import pytest
from forward import CONFIG, cached_step, logits_in_chunks, logits_of, padding_masks, relative_error, run, some_tokens

import gpt2_jax

EMBEDDED_BOUND = 2e-5  # of the largest absolute logit; measured 8.3e-7

# --- the original's logits, and what the bound detects ---------------------------------------------------------------


def test_embedded_model_gives_the_original_logits(shakespeare, reference):
    """The whole forward pass on trained weights."""
    config, weights = shakespeare
    logits = logits_of(config, weights, reference["tokens"])
    assert logits.dtype == np.float32
    assert relative_error(logits, reference["logits"]) < EMBEDDED_BOUND


def _transposed(params, block):
    attn = params[block]["attn"]
    c_proj = {**attn["c_proj"], "w": np.asarray(attn["c_proj"]["w"]).T}
    return {**params, block: {**params[block], "attn": {**attn, "c_proj": c_proj}}}


def test_numpy_reference_gives_the_original_logits(shakespeare, reference):
    """The reference of the other tests is right itself: measured 7.8e-7, the original's own float32 rounding."""
    config, weights = shakespeare
    logits = numpy_reference.forward(weights, reference["tokens"], config.n_head)
    assert relative_error(logits, reference["logits"]) < 2e-6


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
    """The bound on the embedded model detects epsilon 1e-6, exact GELU, a shifted position, a transposed matrix."""
    config, weights = shakespeare
    settings, moves = MISTAKES[mistake]
    if block := settings.get("transpose"):
        weights, settings = _transposed(weights, block), {}
    wrong = numpy_reference.forward(weights, reference["tokens"][:1], config.n_head, **settings)
    assert relative_error(wrong, reference["logits"][:1]) > moves > 10 * EMBEDDED_BOUND


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


# No shrinking: it would compile a program for each of its hundreds of attempts.
@hypothesis.settings(max_examples=8, deadline=None, phases=set(hypothesis.Phase) - {hypothesis.Phase.shrink})
@hypothesis.given(_cases())
def test_odd_shapes_agree_with_numpy(case):
    """Reshapes, head splits, masks and positions at sizes that do not divide each other."""
    config, weights, tokens_BT, mask_BT = case
    expected = numpy_reference.forward(weights, tokens_BT, config.n_head, mask_BT)
    real_BT = np.ones(tokens_BT.shape, bool) if mask_BT is None else mask_BT
    hypothesis.assume(real_BT.any())

    logits = logits_of(config, weights, tokens_BT, mask_BT)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    assert relative_error(logits[real_BT], expected[real_BT]) < 2e-5  # worst of 200 cases: 2.6e-6

    with jax.enable_x64(True):  # without rounding: any difference is a bug
        double = dataclasses.replace(config, param_dtype="float64", compute_dtype="float64")
        logits = logits_of(double, numpy_reference.as_float64(weights), tokens_BT, mask_BT)
    assert relative_error(logits[real_BT], expected[real_BT]) < 1e-12  # worst of 200 cases: 6.2e-15


# --- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_a_padded_row_equals_the_row_alone(params, side):
    """Positions follow the mask and padded keys are masked, wherever the padding is, even for one-token prompts."""
    tokens_BT, mask_BT = some_tokens(CONFIG, 3, 19), padding_masks(19)[side]
    logits = logits_of(CONFIG, params, tokens_BT, mask_BT)
    assert np.isfinite(logits).all()
    expected = numpy_reference.forward(params, tokens_BT, CONFIG.n_head, mask_BT)
    assert relative_error(logits[mask_BT], expected[mask_BT]) < 5e-6  # measured 4.1e-7, here and for the cache
    for tokens_T, mask_T, logits_TV in zip(tokens_BT, mask_BT, logits, strict=True):
        alone = logits_of(CONFIG, params, tokens_T[mask_T][None])[0]
        assert relative_error(logits_TV[mask_T], alone) < 5e-6


def test_the_token_under_the_padding_does_not_matter(params):
    """The results are equal exactly: a padded key's weight is 0. -1, a usual filler, works like any other id."""
    mask_BT = padding_masks(19)["holes"]
    tokens_BT = some_tokens(CONFIG, 3, 19)
    logits = logits_of(CONFIG, params, tokens_BT, mask_BT)
    for filler in (some_tokens(CONFIG, 3, 19, seed=1), -1):
        filled = logits_of(CONFIG, params, np.where(mask_BT, tokens_BT, filler), mask_BT)
        assert np.isfinite(filled).all()
        np.testing.assert_array_equal(filled[mask_BT], logits[mask_BT])


def test_a_mask_of_ones_is_no_mask(params):
    tokens_BT = some_tokens(CONFIG, 3, CONFIG.n_ctx)
    with_mask = logits_of(CONFIG, params, tokens_BT, np.ones(tokens_BT.shape, bool))
    assert relative_error(with_mask, logits_of(CONFIG, params, tokens_BT)) < 2e-6


def test_a_fully_padded_row_stays_finite_and_keeps_to_itself(params):
    """No softmax over zero slots, forward or backward; the other row is unchanged."""
    tokens_BT = some_tokens(CONFIG, 2, 11)
    mask_BT = np.array([[False] * 11, [True] * 11])
    logits = logits_of(CONFIG, params, tokens_BT, mask_BT)
    assert np.isfinite(logits).all()
    assert relative_error(logits[1:], logits_of(CONFIG, params, tokens_BT[1:])) < 5e-6

    gradient = jax.jit(jax.grad(lambda p: run(CONFIG, p, tokens_BT, mask_BT)[1].var()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunks", "spare"),
    [((17,), 4), ((1,) * 17, 0), ((5, 1, 3, 7, 1), 3)],
    ids=["one pass", "one by one", "chunks"],
)
@pytest.mark.parametrize("padding", [None, "left", "right", "holes"])
def test_the_cache_gives_the_logits_of_one_pass(params, padding, chunks, spare):
    """Checks where keys are written, which slots are attended to, and positions across calls."""
    tokens_BT = some_tokens(CONFIG, 3, 17)
    mask_BT = None if padding is None else padding_masks(17)[padding]
    real_BT = np.ones(tokens_BT.shape, bool) if mask_BT is None else mask_BT
    logits = logits_in_chunks(CONFIG, params, tokens_BT, mask_BT, chunks, slots=17 + spare)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    expected = logits_of(CONFIG, params, tokens_BT, mask_BT)
    assert relative_error(logits[real_BT], expected[real_BT]) < 5e-6
    expected = numpy_reference.forward(params, tokens_BT, CONFIG.n_head, mask_BT)
    assert relative_error(logits[real_BT], expected[real_BT]) < 5e-6


def test_a_mask_may_come_and_go_between_cached_calls(params):
    """A padded prompt, then steps without a mask: the padded slots stay masked."""
    tokens_BT, mask_BT = some_tokens(CONFIG, 3, 17), np.ones((3, 17), bool)
    mask_BT[:, :11] = padding_masks(11)["left"]
    cache = gpt2_jax.init_cache(CONFIG, 3, 17)
    head, cache = cached_step(CONFIG, params, tokens_BT[:, :11], mask_BT[:, :11], cache)
    tail, _ = cached_step(CONFIG, params, tokens_BT[:, 11:], None, cache)
    expected = numpy_reference.forward(params, tokens_BT, CONFIG.n_head, mask_BT)
    logits = np.concatenate([head, tail], axis=1)
    assert relative_error(logits[mask_BT], expected[mask_BT]) < 5e-6


def test_without_a_cache_none_comes_back(params):
    assert gpt2_jax.GPT2(CONFIG).apply({"params": params}, some_tokens(CONFIG, 1, 3)).cache is None


@pytest.mark.parametrize("slots", [7, CONFIG.n_ctx], ids=["slots", "n_ctx"])
def test_a_token_beyond_the_last_slot_is_nan(params, slots):
    """The write is not silently clamped to the last slots, and the last position is not used twice."""
    tokens_BT = some_tokens(CONFIG, 2, slots + 3)
    full = logits_of(CONFIG, params, tokens_BT[:, :slots])
    logits = logits_in_chunks(CONFIG, params, tokens_BT, None, (slots - 2, 3, 1, 1), slots)
    assert relative_error(logits[:, : slots - 2], full[:, : slots - 2]) < 5e-6
    assert np.isnan(logits[:, slots:]).all()


def test_a_position_beyond_the_context_is_nan_in_its_row_alone(params):
    """Slots count padding, positions do not: only the row that is longer than wpe gets NaN."""
    slots = CONFIG.n_ctx + 2
    tokens_BT = some_tokens(CONFIG, 2, slots)
    mask_BT = np.array([np.arange(slots) >= 0, np.arange(slots) >= 5])
    logits = logits_in_chunks(CONFIG, params, tokens_BT, mask_BT, (slots - 4, 1, 1, 1, 1), slots)
    assert np.isnan(logits[0, CONFIG.n_ctx :]).all()
    for row, span in ((0, slice(0, CONFIG.n_ctx)), (1, slice(5, slots))):
        alone = numpy_reference.forward(params, tokens_BT[row : row + 1, span], CONFIG.n_head)
        assert relative_error(logits[row : row + 1, span], alone) < 5e-6


# --- fresh parameters ------------------------------------------------------------------------------------------------


def test_fresh_parameters_have_the_original_scales():
    """Names, shapes and dtypes of the checkpoint; the original's initial values; no two leaves are equal draws."""
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
