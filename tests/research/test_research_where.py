"""Where an edit applies: layers, rows, keys and neurons; rows of any lengths; and no more layers than needed."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_activations as naive
import pytest
from forward import some_tokens
from measures import COMPILATIONS, equations
from numpy_activations import CONFIG

import gpt2_jax
from gpt2_jax import research

LENGTH = 7
TOKENS = some_tokens(CONFIG, 3, LENGTH)
BOUND = 5e-6  # of float32, relative to the largest value; measured: 6e-7
DEEP = CONFIG.replace(n_layer=5)
ROWS = [[5], [3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8]]


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, naive.weights())


@pytest.fixture(scope="module")
def deep():
    return jax.tree.map(jnp.asarray, naive.weights(DEEP))


def logits(params, tokens=TOKENS, mask_BT=None, config=CONFIG, **how):
    return np.asarray(research.forward(config, params, tokens, mask_BT, **how)[0].logits)


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [2, [0, 3], -1, [-5, 1], None, jnp.array([4, 4])])
@pytest.mark.parametrize("name", ["resid_pre", "attn/z", "attn/q_in", "attn/pattern"])
def test_an_edit_of_layers_is_one_of_each(deep, name, layers):
    chosen = range(5) if layers is None else [int(i) % 5 for i in np.atleast_1d(layers)]
    value = np.random.default_rng(0).normal(0, 1, {"attn/z": 5, "attn/pattern": LENGTH}.get(name, 15))
    found = logits(deep, config=DEEP, edits=research.add(name, value, positions=[1, 4], layers=layers))
    one_by_one = [research.add(f"h{i}/{name}", value, positions=[1, 4]) for i in set(chosen)]
    assert naive.error(found, logits(deep, config=DEEP, edits=one_by_one)) < BOUND
    assert naive.error(found, logits(deep, config=DEEP)) > 1e-3


def test_traced_layers_are_one_program(deep):
    """Each layer in turn, and under vmap. A layer that does not exist applies nowhere."""
    value_D = np.random.default_rng(0).normal(0, 1, 15).astype(np.float32)

    def run(layer):
        return research.forward(DEEP, deep, TOKENS, edits=research.add("resid_pre", value_D, layers=layer))[0].logits

    expected = [logits(deep, config=DEEP, edits=research.add(f"h{i}/resid_pre", value_D)) for i in range(5)]
    found, compiled = [run(0)], len(COMPILATIONS)
    found += [run(i) for i in range(1, 5)]
    assert len(COMPILATIONS) == compiled
    assert naive.error(found, expected) < BOUND
    assert naive.error(jax.vmap(run)(jnp.arange(5)), expected) < BOUND
    assert np.array_equal(jax.jit(run)(7), logits(deep, config=DEEP))


def test_a_patch_of_layers_takes_each_layers_own_activation(deep):
    others = some_tokens(DEEP, 3, LENGTH, seed=8)
    _, source = research.forward(DEEP, deep, others, capture="attn/z$")
    for i in range(5):
        edits = (
            research.patch("attn/z", source, positions=3, layers=i),
            research.patch(f"h{i}/attn/z", source, positions=3),
        )
        found, expected = (logits(deep, config=DEEP, edits=edit) for edit in edits)
        assert naive.error(found, expected) < BOUND
    del source["h3/attn/z"]
    logits(deep, config=DEEP, edits=research.patch("attn/z", source, layers=[0, 4]))
    with pytest.raises(ValueError, match=r"h3/attn/z was not captured"):
        logits(deep, config=DEEP, edits=research.patch("attn/z", source))


@pytest.mark.parametrize("make", [
    lambda: research.add("h3/resid_pre", 0.0, layers=1),
    lambda: research.add("embed", 0.0, layers=1),
    lambda: research.add("resid_pre", 0.0, layers=5),
    lambda: research.add("resid_pre", 0.0, layers=[0, -6]),
])  # fmt: skip
def test_layers_that_cannot_be_are_refused(deep, make):
    with pytest.raises(ValueError, match="layers"):
        logits(deep, config=DEEP, edits=make())


# --- neurons and keys ------------------------------------------------------------------------------------------------


def test_neurons_are_chosen(params):
    found = logits(params, edits=research.scale("h1/mlp/post", 3.0, positions=[2, 5], neurons=[7, 41]))
    factor = np.ones((LENGTH, 60))
    factor[np.ix_([2, 5], [7, 41])] = 3.0
    expected, _ = naive.forward(CONFIG, params, TOKENS, None, [naive.edit("scale", "h1/mlp/post", factor)])
    assert naive.error(found, expected) < BOUND
    for edit, match in (
        (lambda: research.add("h1/attn/z", 0.0, neurons=1), "neurons"),
        (lambda: logits(params, edits=research.add("h1/mlp/pre", 0.0, neurons=[3, 60])), "neurons.*60"),
        (lambda: research.add("h1/mlp/pre", 0.0, neurons=-1), "neurons"),
    ):
        with pytest.raises(ValueError, match=match):
            edit()


@pytest.mark.parametrize("key_positions", [2, [0, -3], slice(1, -2), [[1], [0], [3]]])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_attention_from_a_token_to_others_is_knocked_out(params, padding, key_positions):
    """The last token of each row does not look at these. The pattern is 0 there, and the rest is scaled up."""
    lengths = np.array([7, 5, 6])
    mask_BT = {"left": np.arange(LENGTH) >= (7 - lengths)[:, None], "right": np.arange(LENGTH) < lengths[:, None]}.get(
        padding
    )
    edit = research.replace("h1/attn/scores", -1e10, positions=-1, key_positions=key_positions)
    _, seen = research.forward(CONFIG, params, TOKENS, mask_BT, capture="h1/attn/pattern", edits=edit)
    _, plain = research.forward(CONFIG, params, TOKENS, mask_BT, capture="h1/attn/pattern")
    pattern_BNTS, expected_BNTS = (np.array(one["h1/attn/pattern"]) for one in (seen, plain))
    mask_BT = np.ones((3, LENGTH), bool) if mask_BT is None else mask_BT
    for b in range(3):
        places = np.flatnonzero(mask_BT[b])
        keys = (
            key_positions[b]
            if isinstance(key_positions, list) and isinstance(key_positions[0], list)
            else key_positions
        )
        gone = np.zeros(len(places), bool)
        gone[keys] = True
        row_NS = expected_BNTS[b, :, places[-1]]
        row_NS[:, places[gone]] = 0
        row_NS /= row_NS.sum(-1, keepdims=True)
    real = mask_BT[:, None, :, None] & np.ones_like(pattern_BNTS, bool)
    np.testing.assert_allclose(pattern_BNTS[real], expected_BNTS[real], atol=1e-6)  # measured: 1.2e-7


def test_keys_of_what_has_none_are_refused():
    with pytest.raises(ValueError, match="key_positions"):
        research.add("h1/attn/z", 0.0, key_positions=1)


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (15,), (LENGTH, 15), (1, 15)])
@pytest.mark.parametrize("name", ["h0/resid_mid", "attn/result"])
def test_a_value_of_each_row_is_its_own(params, name, shape):
    """[B], [B, D], [B, T, D]: row b gets what it would get with value[b] alone."""
    shape = (LENGTH, 1, 15) if name == "attn/result" and shape == (LENGTH, 15) else shape
    values = np.random.default_rng(2).normal(0, 1, (3, *shape)).astype(np.float32)
    found = logits(params, edits=research.add(name, values, positions=[[1], [3], [-1]], each_row=True))
    for b, at in enumerate([1, 3, -1]):
        alone = logits(params, TOKENS[b : b + 1], edits=research.add(name, values[b], positions=at))
        assert naive.error(found[b : b + 1], alone) < BOUND


@pytest.mark.parametrize("positions", [[4, 0, 5], slice(2, 5), slice(-3, None), slice(-9, None),
                                       [[4, 0, -1], [1, 2, 3], [6, -7, 2]], slice([1, 0, -3], None)])  # fmt: skip
@pytest.mark.parametrize(
    ("name", "one"), [("h0/resid_mid", (15,)), ("h1/attn/q", (3, 1)), ("h0/attn/scores", (3, LENGTH))]
)
@pytest.mark.parametrize("each_row", [False, True])
def test_a_value_of_each_position_is_its_own(params, name, one, positions, each_row):
    """As for one edit for each position. A slice begins at its first position; one from before a row, at its start."""
    values = np.random.default_rng(2).normal(0, 1, (3, 3, *one) if each_row else (3, *one)).astype(np.float32)
    edit = research.add(name, values, positions, each_row=each_row, each_position=True)
    found = logits(params, edits=edit)
    for b in range(3):
        if isinstance(positions, slice):
            start = np.broadcast_to(positions.start, 3)[b]
            at = [max(start + LENGTH, 0) + i if start < 0 else start + i for i in range(3)]
        else:
            at = positions[b] if isinstance(positions[0], list) else positions
        some = values[b] if each_row else values
        one_by_one = [research.add(name, value[..., None, :], t) if "scores" in name else research.add(name, value, t)
                      for value, t in zip(some, at, strict=True)]  # fmt: skip
        assert naive.error(found[b : b + 1], logits(params, TOKENS[b : b + 1], edits=one_by_one)) < BOUND
    assert naive.error(found, logits(params)) > 1e-3
    assert naive.error(logits(params, TOKENS.tolist(), edits=edit), found) < BOUND


def test_values_of_positions_that_do_not_fit_are_refused(params):
    """Another number of values or width, or no positions."""
    for shape, positions, match in [((3, 15), [1, 2], "3 values for 2"), ((3, 15), slice(1, 3), "3 values for 2"),
                                    ((3, 15), slice(-4, -2), "3 values for 2"), ((3, 15), None, "needs positions"),
                                    ((), [1], "axis of positions")]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            research.add("embed", np.ones(shape), positions, each_position=True)
    with pytest.raises(ValueError, match=r"\(2, 14\).*\(15,\)"):
        logits(params, edits=research.add("embed", np.ones((2, 14)), [1, 2], each_position=True))


def test_a_value_of_each_layer_is_its_own(deep):
    """A dict of arrays, by the full names."""
    values = {f"h{i}/mlp/out": np.full(15, i - 2.0, np.float32) for i in range(5)}
    found = logits(deep, config=DEEP, edits=research.add("mlp/out", values, layers=[1, 4]))
    expected = logits(deep, config=DEEP, edits=[research.add(f"h{i}/mlp/out", values[f"h{i}/mlp/out"]) for i in (1, 4)])
    assert naive.error(found, expected) < BOUND
    for wrong in ("h5/mlp/out", "h0/attn/out", "mlp/out"):
        with pytest.raises(ValueError, match=f"value for {wrong}"):
            logits(deep, config=DEEP, edits=research.add("mlp/out", values | {wrong: 1.0}))


def test_a_value_of_each_row_and_layer_is_its_own(deep):
    """A dict of arrays [B, D], in forward and in generation."""
    values = {f"h{i}/mlp/out": np.random.default_rng(i).normal(0, 1, (3, 15)).astype(np.float32) for i in range(5)}
    edit = research.add("mlp/out", values, layers=[1, 4], each_row=True)
    one_by_one = [research.add(f"h{i}/mlp/out", values[f"h{i}/mlp/out"], each_row=True) for i in (1, 4)]
    assert naive.error(logits(deep, config=DEEP, edits=edit), logits(deep, config=DEEP, edits=one_by_one)) < BOUND
    scores, expected, plain = (
        np.concatenate([row.logprobs for row in gpt2_jax.score(DEEP, deep, TOKENS.tolist(), edits=edits)])
        for edits in (edit, one_by_one, ())
    )
    assert naive.error(scores, expected) < BOUND
    assert naive.error(scores, plain) > 1e-3
    wrong = research.add("mlp/out", {name: value[:2] for name, value in values.items()}, each_row=True)
    with pytest.raises(ValueError, match=r"\(2, 15\).*3 rows"):
        logits(deep, config=DEEP, edits=wrong)


def test_other_numbers_of_rows_are_refused(params):
    """The message of a value for each row that does not broadcast says what to do."""
    for edit in (
        research.add("embed", np.ones((2, 15)), each_row=True),
        research.add("embed", np.ones(15), positions=[[1], [2]]),
        research.add("embed", np.ones(15), positions=slice([1, 2], 4)),
        research.scale("h0/attn/scores", 0.0, key_positions=[[1], [2]]),
    ):
        with pytest.raises(ValueError, match="3 rows"):
            logits(params, edits=edit)
    with pytest.raises(ValueError, match="each_row=True"):
        logits(params, edits=research.add("embed", np.ones((3, 15))))


def test_a_patch_of_another_number_of_tokens_is_refused(params):
    """A run of one token is not spread over all. One row serves all rows."""
    _, one = research.forward(CONFIG, params, TOKENS[:, :1], capture="h0/resid_post")
    with pytest.raises(ValueError, match="same number of tokens"):
        logits(params, edits=research.patch("h0/resid_post", one))
    _, row = research.forward(CONFIG, params, TOKENS[:1], capture="h0/resid_post")
    found = logits(params, edits=research.patch("h0/resid_post", row))
    assert naive.error(found, np.repeat(logits(params, TOKENS[:1]), 3, axis=0)) < BOUND


# --- rows of any lengths ---------------------------------------------------------------------------------------------


def test_rows_of_any_lengths_are_cut_to_their_own(params):
    edit = research.add("h0/attn/scores", 0.7, positions=-1)
    out, seen = research.forward(
        CONFIG, params, ROWS, capture=["resid_post", "attn/pattern", "attn/result"], edits=edit
    )
    for b, row in enumerate(ROWS):
        alone, expected = research.forward(CONFIG, params, np.array([row]), capture=[*seen], edits=edit)
        assert naive.error(out.logits[b], alone.logits[0]) < BOUND
        for name in seen:
            assert naive.error(seen[name][b], expected[name][0]) < BOUND


def test_lists_of_one_length_are_arrays(params):
    out, seen = research.forward(CONFIG, params, TOKENS.tolist(), capture="attn/pattern")
    expected, patterns = research.forward(CONFIG, params, TOKENS, capture="attn/pattern")
    assert naive.error(out.logits, expected.logits) < BOUND
    assert naive.error(seen["h1/attn/pattern"], patterns["h1/attn/pattern"]) < BOUND


def test_values_of_tokens_and_patches_fit_lists(params):
    """A value for each token, and activations of rows of any lengths, also one row of one token."""
    others = [[9], [8, 1, 8, 2, 8, 4, 5], [9, 0, 4, 5]]
    _, source = research.forward(CONFIG, params, others, capture=["h0/resid_post", "h1/attn/pattern"])
    edits = [research.patch("resid_post", source, positions=-1, layers=0), research.patch("h1/attn/pattern", source)]
    out, _ = research.forward(CONFIG, params, ROWS, edits=edits)
    for b, (row, other) in enumerate(zip(ROWS, others, strict=True)):
        _, alone = research.forward(CONFIG, params, np.array([other]), capture=[*source])
        edits = [research.patch("h0/resid_post", alone, positions=-1), research.patch("h1/attn/pattern", alone)]
        assert naive.error(out.logits[b], logits(params, np.array([row]), edits=edits)[0]) < BOUND
        assert naive.error(logits(params, [row], edits=edits), logits(params, np.array([row]), edits=edits)) < BOUND
    for shape, each_row in [((3, LENGTH, 15), False), ((LENGTH, 15), False), ((3, LENGTH, 15), True), ((15,), False)]:
        edit = research.add("h0/mlp/out", np.random.default_rng(4).normal(0, 1, shape), each_row=each_row)
        assert naive.error(logits(params, TOKENS.tolist(), edits=edit), logits(params, edits=edit)) < BOUND
    with pytest.raises(ValueError, match=r"\(6, 15\).*\(3, 7, 15\)"):
        logits(params, TOKENS.tolist(), edits=research.add("h0/mlp/out", np.ones((6, 15))))
    with pytest.raises(ValueError, match="same number of tokens"):
        research.forward(CONFIG, params, [[*row, 1, 2] for row in ROWS], edits=edits)


@pytest.mark.parametrize("name", ["h0/resid_post", "resid_post", "h1/attn/pattern"])
def test_a_patch_from_rows_of_other_lengths_is_refused(params, name):
    """Where a row of the other run has no token, there is no value."""
    _, source = research.forward(CONFIG, params, ROWS, capture=["resid_post", "attn/pattern"])
    rows = [ROWS[0], ROWS[2], ROWS[1]]
    edit = research.patch(name, source)
    with pytest.raises(ValueError, match="rows of 1, 7, 4 tokens, but the rows have 1, 4, 7"):
        research.forward(CONFIG, params, rows, edits=edit)
    with pytest.raises(ValueError, match="1, 7, 4"):
        research.forward(CONFIG, params, *research.padded(CONFIG, rows), edits=edit)
    with pytest.raises(ValueError, match="1, 7, 4"):
        logits(params, edits=edit)
    with pytest.raises(ValueError, match="on the right"):
        research.forward(CONFIG, params, *research.padded(CONFIG, ROWS, "left"), edits=edit)
    out, _ = research.forward(CONFIG, params, *research.padded(CONFIG, ROWS), edits=edit)
    expected, _ = research.forward(CONFIG, params, ROWS)
    assert naive.error(out.logits[1], expected.logits[1]) < BOUND


def test_taps_see_rows_of_one_length_without_padding(params):
    taps = {"h0/mlp/out": lambda value, position_BT: value.at[:, -1].add(1.0)}
    assert np.array_equal(logits(params, TOKENS.tolist(), taps=taps), logits(params, taps=taps))


def test_all_lengths_and_layers_share_few_programs():
    """Prompts of 20 lengths up to 1,024 tokens, and each layer: six programs, also with what is returned."""
    config = gpt2_jax.GPT2Config(n_vocab=53, n_ctx=1024, n_embd=12, n_head=3, n_layer=3)
    params, rng = gpt2_jax.init_params(config, jax.random.key(0)), np.random.default_rng(0)
    lengths = [1, 2, 5, 31, 32, 33, 47, 64, 65, 100, 128, 129, 200, 256, 257, 400, 512, 513, 1000, 1024]
    value_D = np.ones(12, np.float32)
    compiled = len(COMPILATIONS)
    for length in lengths:
        row = rng.integers(0, 53, length).tolist()
        for layer in range(3):
            edit = research.add("resid_pre", value_D, layers=layer, positions=-1)
            out, _ = research.forward(config, params, [row], edits=edit, capture="h2/resid_post")
            assert out.logits.shape == (1, length, 53)
    assert len(COMPILATIONS) - compiled <= 6


def test_padded_makes_an_array_and_its_mask(params):
    for side in ("left", "right"):
        tokens_BT, mask_BT = research.padded(CONFIG, ROWS, side)
        assert [row[mask].tolist() for row, mask in zip(tokens_BT, mask_BT, strict=True)] == ROWS
        assert mask_BT[:, -1 if side == "left" else 0].all()
        found = logits(params, tokens_BT, mask_BT)
        for b, row in enumerate(ROWS):
            assert naive.error(found[b, mask_BT[b]], logits(params, np.array([row]))[0]) < BOUND
    with pytest.raises(ValueError, match="side"):
        research.padded(CONFIG, ROWS, "middle")
    with pytest.raises(ValueError, match=r"1, 7, 4 ids.*research\.padded"):
        research.head_scores(CONFIG, params, ROWS)


def test_no_rows_are_refused(params):
    for tokens in (np.zeros((0, 4), int), jnp.zeros((0, 4), int), jnp.zeros((2, 0), int), []):
        with pytest.raises(ValueError, match="tokens"):
            research.forward(CONFIG, params, tokens)


# --- no more than asked ----------------------------------------------------------------------------------------------


def test_stopping_at_a_layer_gives_its_stream(deep):
    _, seen = research.forward(DEEP, deep, TOKENS, capture=["resid_pre", "resid_post"])
    for stop in range(-5, 6):
        out, captured = research.forward(DEEP, deep, TOKENS, stop_at_layer=stop, capture="^embed")
        layer = stop % 5 if stop < 5 else 5
        name = "h4/resid_post" if layer == 5 else f"h{layer}/resid_pre"
        assert naive.error(out.stream, seen[name]) < BOUND
        assert out.logits is None
        assert list(captured) == ["embed"]


def test_only_the_needed_layers_are_traced(deep):
    """Products of the program, of a capture without logits and of a stop. All layers run by default."""

    def products(**how):
        program = jax.make_jaxpr(lambda params: research.forward(DEEP, params, TOKENS, **how)[1])(deep)
        return sum(equation.primitive.name == "dot_general" for equation in equations(program.jaxpr))

    one, every = products(capture="h0/resid_post", logits=False), products(capture="h0/resid_post")
    assert products(capture="h2/attn/q", logits=False) == 3 * one
    assert products(capture="h2/attn/q", stop_at_layer=3, logits=False) == 3 * one
    assert products(capture="ln_f/out", logits=False) == 5 * one
    assert products(logits=False) == products(capture="embed", logits=False) == 0
    assert every == 5 * one + 1


@pytest.mark.parametrize(("how", "match"), [
    ({"stop_at_layer": 6}, "stop_at_layer"), ({"stop_at_layer": -6}, "stop_at_layer"), ({"stop_at_layer": 1.5}, "stop"),
    ({"stop_at_layer": 2, "capture": "h2/attn/q"}, "h2/attn/q.*later"),
    ({"stop_at_layer": 5, "capture": "ln_f"}, "later"),
    ({"stop_at_layer": 2, "edits": research.add("h2/resid_pre", 0.0)}, "h2/resid_pre.*later"),
    ({"stop_at_layer": 2, "edits": research.add("resid_pre", 0.0, layers=[2, -1])}, "resid_pre.*later"),
    ({"stop_at_layer": 0, "edits": research.add("resid_pre", 0.0)}, "resid_pre.*later"),
    ({"stop_at_layer": 2, "taps": {"h[34]/mlp/out": lambda value, position: value}}, "tap of.*mlp/out.*later"),
])  # fmt: skip
def test_a_stop_that_cannot_be_is_refused(deep, how, match):
    with pytest.raises(ValueError, match=match):
        research.forward(DEEP, deep, TOKENS, **how)


def test_a_cache_needs_all_layers(deep):
    cache = gpt2_jax.init_cache(DEEP, 3, 9)
    with pytest.raises(ValueError, match="cache"):
        research.forward(DEEP, deep, TOKENS, cache=cache, stop_at_layer=2)
    out, _ = research.forward(DEEP, deep, TOKENS[:, :4], cache=cache, logits=False)
    assert out.logits is None
    rest, _ = research.forward(DEEP, deep, TOKENS[:, 4:], cache=out.cache)
    assert naive.error(rest.logits, logits(deep, config=DEEP)[:, 4:]) < BOUND
