"""Captured activations: the requested ones, with the right values, and no others."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpy_activations as naive
import numpy_reference
import pytest
from forward import padding_masks, relative_error, some_tokens
from numpy_activations import CONFIG

import gpt2_jax
from gpt2_jax import research

NAMES = naive.names(CONFIG.n_layer)
LONG = CONFIG.n_ctx
BOUND = 5e-6  # of float32, relative to the largest value; measured: 7.3e-7 at most, of every name at every length
WIDTHS = {"B": 3, "T": 7, "S": 7, "D": 15, "N": 3, "H": 5, "F": 60, "1": 1}


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, naive.weights())


def everything(config, params, tokens_BT, mask_BT=None, cache=None):
    out, seen = research.forward(config, params, tokens_BT, mask_BT, capture=".", cache=cache)
    return out, {name: np.asarray(value) for name, value in seen.items()}


@pytest.fixture(scope="module")
def short(params):
    tokens_BT = some_tokens(CONFIG, 3, 7)
    return tokens_BT, *everything(CONFIG, params, tokens_BT)


@pytest.fixture(scope="module")
def long(params):
    """More queries than one block of attention has."""
    tokens_BT = some_tokens(CONFIG, 2, LONG, seed=1)
    return tokens_BT, *everything(CONFIG, params, tokens_BT)


# --- names -----------------------------------------------------------------------------------------------------------


def test_every_activation_has_its_name_place_and_shape(short):
    """The names are in the order of computation, and the axes are written out here again."""
    _, _, seen = short
    assert list(seen) == NAMES == research.activation_names(CONFIG)
    assert type(seen) is dict
    letters = dict.fromkeys(naive.OF_BLOCK, "BTD")
    letters |= dict.fromkeys(["ln_1/scale", "ln_2/scale"], "BT1") | dict.fromkeys(["mlp/pre", "mlp/post"], "BTF")
    letters |= dict.fromkeys([f"attn/{name}" for name in "qkvz"], "BTNH")
    letters |= dict.fromkeys(["attn/scores", "attn/pattern"], "BNTS")
    letters |= {"embed": "BTD", "pos_embed": "BTD", "ln_f/scale": "BT1", "ln_f/normalized": "BTD", "ln_f/out": "BTD"}
    for name, value in seen.items():
        axes = letters[name.split("/", 1)[1] if name.startswith("h") else name]
        assert value.shape == tuple(WIDTHS[axis] for axis in axes), name
    assert dict(research.AXES) == letters


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("resid_post$", {"h0/resid_post", "h1/resid_post"}),
        ("h1/attn/(q|k)$", {"h1/attn/q", "h1/attn/k"}),
        (["ln_f/scale", "h0/mlp/post", "^embed$"], {"embed", "h0/mlp/post", "ln_f/scale"}),
        (("h0/attn/z", "0/attn/z", "n/z"), {"h0/attn/z", "h1/attn/z"}),
        ("^embed", {"embed"}),
        ("embed", {"embed", "pos_embed"}),
        ((), set()),
        ([], set()),
    ],
)
def test_names_are_chosen_by_regular_expressions(params, patterns, expected):
    """A pattern may match anywhere in a name. Each name is returned once."""
    tokens_BT = np.zeros((1, 3), int)
    found = jax.eval_shape(lambda: research.forward(CONFIG, params, tokens_BT, capture=patterns)[1])
    assert set(found) == expected


def test_what_is_returned_is_in_the_order_of_computation(params):
    _, seen = research.forward(CONFIG, params, some_tokens(CONFIG, 1, 3), capture=["ln_f", "mlp/post", "^embed"])
    chosen = ["embed", "h0/mlp/post", "h1/mlp/post", "ln_f/scale", "ln_f/normalized", "ln_f/out"]
    assert list(seen) == chosen


@pytest.mark.parametrize("patterns", ["resid_pots", ["resid_post", "h2/"], "blocks.0.hook_z", ["^scores$"]])
def test_a_pattern_that_is_in_no_name_is_refused(params, patterns):
    wrong = patterns if isinstance(patterns, str) else patterns[-1]
    with pytest.raises(ValueError, match=re.escape(repr(wrong))):
        research.forward(CONFIG, params, some_tokens(CONFIG, 1, 3), capture=patterns)


@pytest.mark.parametrize("patterns", ["h0/(", ["resid_post", "*"], [3], [None]])
def test_what_is_no_regular_expression_is_refused(params, patterns):
    with pytest.raises(ValueError, match="regular expression"):
        research.forward(CONFIG, params, some_tokens(CONFIG, 1, 3), capture=patterns)


# --- values ----------------------------------------------------------------------------------------------------------


def test_every_activation_is_numpys(params, short):
    naive.assert_agrees(short[1:], params, short[0], bound=BOUND)


def test_every_activation_of_a_long_text_is_numpys(params, long):
    """Attention is computed in blocks beyond 128 tokens, but captured scores and patterns are whole."""
    naive.assert_agrees(long[1:], params, long[0], bound=BOUND)


def test_scores_and_patterns_just_beyond_one_block(params):
    """The second block has three queries."""
    tokens_BT = some_tokens(CONFIG, 2, 131, seed=2)
    _, expected = naive.forward(CONFIG, params, tokens_BT)
    _, seen = research.forward(CONFIG, params, tokens_BT, capture="scores|pattern|h1/resid_post")
    assert len(seen) == 5
    for name, value in seen.items():
        assert naive.error(value, expected[name]) < BOUND, name


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_a_padded_row_has_the_activations_of_the_row_alone(params, side):
    """Padding may be anywhere and hold any id. Scores and patterns are compared between real tokens."""
    tokens_BT, mask_BT = some_tokens(CONFIG, 3, 19), padding_masks(19)[side]
    out, seen = everything(CONFIG, params, jnp.where(mask_BT, tokens_BT, -1), mask_BT)
    assert list(seen) == NAMES
    naive.assert_agrees((out, seen), params, tokens_BT, mask_BT, bound=BOUND)
    for b, mask_T in enumerate(mask_BT):
        alone_TV, alone = naive.forward(CONFIG, params, tokens_BT[b, mask_T][None])
        for name, theirs in alone.items():
            ours = seen[name][b]
            if name.endswith(("scores", "pattern")):
                ours = ours[:, mask_T][..., mask_T]
                assert (seen[name][b][:, mask_T][..., ~mask_T] == (-1e10 if "scores" in name else 0)).all()
            else:
                ours = ours[mask_T]
            assert naive.error(ours[None], theirs) < BOUND, name
        assert relative_error(np.asarray(out.logits)[b, mask_T], alone_TV[0]) < BOUND


def test_no_weight_is_folded_centred_or_renamed(params, short):
    """embed and pos_embed are bit-identical to rows of wte and wpe, and params do not change."""
    tokens_BT, _, seen = short
    assert np.array_equal(seen["embed"], params["wte"][tokens_BT])
    assert np.array_equal(seen["pos_embed"], np.broadcast_to(params["wpe"][:7], (3, 7, 15)))
    assert np.abs(seen["h1/resid_post"].mean(-1)).max() > 0.01  # with centered weights the mean would be 0
    fresh = naive.weights()
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    assert all(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (params, fresh)), strict=True))


@pytest.mark.parametrize("case", ["short", "long"])
def test_activations_follow_from_one_another(request, params, case):
    """Each captured activation follows from those before it, in float64: the model computes with what it returns."""
    tokens_BT, out, seen = request.getfixturevalue(case)
    x = {name: np.asarray(value, np.float64) for name, value in seen.items()}
    weights = numpy_reference.as_float64(params)

    def follows(name, value):
        assert naive.error(seen[name], value) < 2e-6, name  # measured: 2.5e-7

    def norm_follows(name, x_BTD):
        p = functools.reduce(dict.get, name.split("/"), weights)
        follows(f"{name}/scale", np.sqrt(x_BTD.var(-1, keepdims=True) + 1e-5))
        follows(f"{name}/normalized", (x_BTD - x_BTD.mean(-1, keepdims=True)) / x[f"{name}/scale"])
        follows(f"{name}/out", x[f"{name}/normalized"] * p["g"] + p["b"])

    follows("h0/resid_pre", x["embed"] + x["pos_embed"])
    follows("h1/resid_pre", x["h0/resid_post"])
    for h in ("h0", "h1"):
        block = weights[h]
        norm_follows(f"{h}/ln_1", x[f"{h}/resid_pre"])
        qkv = x[f"{h}/ln_1/out"] @ block["attn"]["c_attn"]["w"] + block["attn"]["c_attn"]["b"]
        follows_as = x[f"{h}/attn/q"].shape
        for n, part in zip("qkv", np.split(qkv, 3, -1), strict=True):
            follows(f"{h}/attn/{n}", part.reshape(follows_as))
        scores = np.einsum("BTNH,BSNH->BNTS", x[f"{h}/attn/q"], x[f"{h}/attn/k"]) / np.sqrt(5)
        follows(f"{h}/attn/scores", np.where(np.tri(tokens_BT.shape[1], dtype=bool), scores, -1e10))
        exp = np.exp(x[f"{h}/attn/scores"] - x[f"{h}/attn/scores"].max(-1, keepdims=True))
        follows(f"{h}/attn/pattern", exp / exp.sum(-1, keepdims=True))
        follows(f"{h}/attn/z", np.einsum("BNTS,BSNH->BTNH", x[f"{h}/attn/pattern"], x[f"{h}/attn/v"]))
        z = x[f"{h}/attn/z"].reshape(*tokens_BT.shape, -1)
        follows(f"{h}/attn/out", z @ block["attn"]["c_proj"]["w"] + block["attn"]["c_proj"]["b"])
        follows(f"{h}/resid_mid", x[f"{h}/resid_pre"] + x[f"{h}/attn/out"])
        norm_follows(f"{h}/ln_2", x[f"{h}/resid_mid"])
        follows(f"{h}/mlp/pre", x[f"{h}/ln_2/out"] @ block["mlp"]["c_fc"]["w"] + block["mlp"]["c_fc"]["b"])
        follows(f"{h}/mlp/post", numpy_reference.gelu_tanh(x[f"{h}/mlp/pre"]))
        follows(f"{h}/mlp/out", x[f"{h}/mlp/post"] @ block["mlp"]["c_proj"]["w"] + block["mlp"]["c_proj"]["b"])
        follows(f"{h}/resid_post", x[f"{h}/resid_mid"] + x[f"{h}/mlp/out"])
    norm_follows("ln_f", x["h1/resid_post"])
    assert relative_error(np.asarray(out.logits), x["ln_f/out"] @ weights["wte"].T) < 2e-6


# --- cache -----------------------------------------------------------------------------------------------------------


def test_step_by_step_is_the_whole(params):
    """A left-padded batch, first a few tokens and then one at a time. Scores cover all cache slots so far."""
    n_slots, chunks = 13, [5, 1, 1, 3, 1]
    tokens_BT = some_tokens(CONFIG, 3, sum(chunks), seed=5)
    mask_BT = np.arange(sum(chunks)) >= np.array([0, 3, 4])[:, None]
    logits_BTV, whole = naive.forward(CONFIG, params, tokens_BT, mask_BT)
    cache = gpt2_jax.init_cache(CONFIG, 3, n_slots)
    for stop, chunk in zip(itertools.accumulate(chunks), chunks, strict=True):
        span = slice(stop - chunk, stop)
        out, seen = everything(CONFIG, params, tokens_BT[:, span], mask_BT[:, span], cache)
        cache = out.cache
        for name in NAMES:
            ours, theirs = seen[name], whole[name]
            if name.endswith(("scores", "pattern")):
                assert ours.shape == (3, 3, chunk, n_slots)
                visible_BTS = np.tri(stop, dtype=bool)[span] & mask_BT[:, None, :stop]
                expected = np.full(ours.shape, -1e10 if name.endswith("scores") else 0.0)
                np.copyto(expected[..., :stop], theirs[:, :, span, :stop], where=visible_BTS[:, None])
                queries = mask_BT[:, None, span, None]  # a padding query has no meaning
                ours, theirs = np.where(queries, ours, 0), np.where(queries, expected, 0)
            else:
                ours, theirs = (
                    np.where(mask_BT[:, span].reshape(3, chunk, *[1] * (ours.ndim - 2)), x, 0)
                    for x in (ours, theirs[:, span])
                )
            assert naive.error(ours, theirs) < BOUND, (stop, name)
        real_BT = mask_BT[:, span]
        assert relative_error(np.asarray(out.logits)[real_BT], logits_BTV[:, span][real_BT]) < BOUND
    assert out.cache.length == sum(chunks)


# --- dtypes ----------------------------------------------------------------------------------------------------------


def _dtypes(config, params):
    seen = jax.eval_shape(lambda: research.forward(config, params, np.zeros((1, 3), int), capture=".")[1])
    return {name: seen[name].dtype.name for name in NAMES}


def test_dtypes_are_as_documented(params):
    """Embeddings have `param_dtype`. scale, normalized, scores, pattern: at least float32. Others: `compute_dtype`."""
    wide = ("scale", "normalized", "scores", "pattern", "embed")
    found = _dtypes(CONFIG.replace(compute_dtype="bfloat16"), params)
    assert found == {name: "float32" if name.endswith(wide) else "bfloat16" for name in NAMES}
    assert set(_dtypes(CONFIG, params).values()) == {"float32"}


def test_bfloat16_is_near_float32(params, short):
    """Each activation is within a few roundings of 2**-8."""
    tokens_BT, _, exact = short
    _, seen = everything(CONFIG.replace(compute_dtype="bfloat16"), params, tokens_BT)
    errors = {name: naive.error(seen[name], exact[name]) for name in NAMES}
    assert max(errors.values()) < 0.05  # measured: 0.012


# --- arguments -------------------------------------------------------------------------------------------------------


def test_tokens_may_be_lists(params, short):
    tokens_BT, out, _ = short
    again, _ = research.forward(CONFIG, params, tokens_BT.tolist(), capture=[])
    assert again.logits.shape == out.logits.shape
    assert naive.error(again.logits, out.logits) < BOUND  # padded to 32 tokens: another shape rounds otherwise


@pytest.mark.parametrize(
    "tokens", [[], [[]], [3, 1], [[1, 2], []], [[53]], [[-1]], [[0.5]], [["a"]], "ab", None, 7, [[2**40]]]
)
def test_tokens_that_are_no_rows_of_ids_are_refused(params, tokens):
    with pytest.raises(ValueError, match="token"):
        research.forward(CONFIG, params, tokens)


def test_params_of_another_model_are_refused(params):
    without = {name: leaf for name, leaf in params.items() if name != "h1"}
    with pytest.raises(ValueError, match="h1/"):
        research.forward(CONFIG, without, [[1]])


def test_a_text_longer_than_the_model_reads_is_refused(params):
    with pytest.raises(ValueError, match=str(LONG)):
        research.forward(CONFIG, params, [[1] * (LONG + 1)])
