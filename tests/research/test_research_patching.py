"""Grids of patches are compared with a forward pass for each patch, and estimates with derivatives."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from jax.tree_util import Partial
from measures import COMPILATIONS

from gpt2_jax.edits import add, patch, replace, scale
from gpt2_jax.research._forward import forward
from gpt2_jax.research.metrics import logit_difference
from gpt2_jax.research.patching import activation_patching, attribution_patching

N_TOKENS = 7
BOUND = {"float32": 4e-6, "float64": 1e-13}  # measured over all activations: 9e-7 and 3e-15, of metrics of 1.7


class Case:
    """A model, two runs of two rows, and a metric; `patched` is the metric of one forward pass with edits."""

    def __init__(self, dtype="float64", **options):
        self.config = tiny_models.CONFIG.replace(param_dtype=dtype, compute_dtype=dtype, **options)
        self.params = tiny_models.random_params(self.config, 3)
        self.tokens_BT, self.source_BT = np.random.default_rng(5).integers(0, self.config.n_vocab, (2, 2, N_TOKENS))
        self.source = self.run(self.source_BT)[1]
        self.metric = logit_difference([5, 11], [2, 23])
        self.args = (self.config, self.params, self.tokens_BT, self.source, self.metric)

    def run(self, tokens_BT):
        return forward(self.config, self.params, tokens_BT, capture=".")

    def patched(self, *edits, at=-1):
        out, _ = forward(self.config, self.params, self.tokens_BT, edits=edits)
        return float(self.metric(out.logits[:, at]))


@pytest.fixture(scope="module")
def case():
    """In float64 a difference can only be a wrong patch."""
    with jax.enable_x64(True):
        yield Case()


def check(grid, expected, bound=BOUND["float64"]):
    """Compare, and check that the entries differ from one another by much more than the bound."""
    grid, expected = np.asarray(grid), np.asarray(expected)
    assert grid.shape == expected.shape
    assert np.abs(grid - expected).max() <= bound
    assert len(np.unique(np.round(expected, 4))) > expected.size / 2


# ---- grids


@pytest.mark.parametrize(
    ("activation", "each", "layers", "dtype"),
    [
        ("resid_pre", "position", None, "float64"),
        ("mlp/out", "position", 0, "float32"),
        ("attn/z", "head", 0, "float64"),
        ("attn/q", ("head", "position"), 0, "float64"),
        ("embed", "position", None, "float64"),
        ("pos_embed", (), None, "float64"),
        ("attn/pattern", ("position", "head"), 0, "float64"),  # the result's order of axes is fixed
    ],
)
def test_every_entry_is_a_forward_pass_with_that_patch(activation, each, layers, dtype):
    with jax.enable_x64(dtype == "float64"):
        case = Case(dtype)
        grid = activation_patching(*case.args, activation, each=each, layers=layers)
        heads = range(case.config.n_head) if "head" in each else [None]
        positions = range(N_TOKENS) if "position" in each else [None]
        expected = [
            [[case.patched(patch(name, case.source, t, n)) for t in positions] for n in heads]
            for name in names_of(case.config, activation, layers)
        ]
        check(grid, np.reshape(expected, grid.shape), BOUND[dtype])


def test_positions_count_from_the_end_and_may_be_of_each_row(case):
    """One grid for each way to say where, also in padded rows."""
    mask_BT = np.array([[True] * 7, [False, False, True, True, True, True, True]])
    run = functools.partial(activation_patching, *case.args[:3], case.source_BT, case.metric, mask_BT=mask_BT)
    _, source = forward(case.config, case.params, case.source_BT, mask_BT, capture="resid_pre|pattern")

    def patched(*edits):
        out, _ = forward(case.config, case.params, case.tokens_BT, mask_BT, edits=edits)
        return float(case.metric(out.logits[:, -1]))  # both rows end at the last slot

    for positions, cells in [([-1, -3], [-1, -3]), ([[6, 1], [-1, 3]], [[[6], [-1]], [[1], [3]]])]:
        grid = run(positions=positions, layers=[-1, 0])
        expected = [[patched(patch(f"h{i}/resid_pre", source, at)) for at in cells] for i in (1, 0)]
        check(grid, expected)
    together = run(positions=[[6, 1], [-1, 3]], each=(), layers=0)
    assert abs(together[0] - patched(patch("h0/resid_pre", source, [[6, 1], [-1, 3]]))) < BOUND["float64"]
    looked_at = run("attn/pattern", each="key_position", positions=-1, key_positions=[-2, 0], layers=1)
    expected = [patched(patch("h1/attn/pattern", source, -1, key_positions=key)) for key in (-2, 0)]
    check(looked_at, [expected])


def test_a_window_of_layers_is_patched_together():
    """As in Meng et al. 2022: an even window has one more layer before its middle, and windows are cut at the ends."""
    with jax.enable_x64(True):
        case = Case(n_layer=4)  # position 6 is the last: all layers have an effect there
        for window, at, layers in [
            (2, 0, [0]), (2, 2, [1, 2]), (3, 0, [0, 1]), (3, 3, [2, 3]), (9, 1, range(4)), (1, 3, [3]),
        ]:  # fmt: skip
            grid = activation_patching(*case.args, "attn/out", layers=at, window=window, positions=[2, 6])
            patches = [[patch(f"h{i}/attn/out", case.source, t) for i in layers] for t in (2, 6)]
            check(grid, [[case.patched(*edits) for edits in patches]])


def names_of(config, activation, layer):
    if activation in ("embed", "pos_embed"):
        return [activation]
    return [f"h{i}/{activation}" for i in ([layer] if layer is not None else range(config.n_layer))]


def test_places_are_those_asked_for_in_that_order(case):
    """In groups of three. The last group is not full."""
    places = {"heads": [2, 0], "positions": [5, 1, 6, 2], "layers": 0, "together": 3}
    grid = activation_patching(*case.args, "attn/z", each=("head", "position"), **places)
    check(grid, [[[case.patched(patch("h0/attn/z", case.source, t, n)) for t in [5, 1, 6, 2]] for n in [2, 0]]])


def test_what_each_does_not_name_is_patched_together(case):
    by_head = activation_patching(*case.args, "attn/k", each="head", positions=slice(2, 5), layers=[1])
    check(by_head, [[case.patched(patch("h1/attn/k", case.source, [2, 3, 4], n)) for n in range(3)]])
    by_position = activation_patching(*case.args, "attn/k", heads=[0, 2], layers=[1])
    check(by_position, [[case.patched(patch("h1/attn/k", case.source, t, [0, 2])) for t in range(N_TOKENS)]])


def test_a_run_patched_with_its_own_activations_is_itself(case):
    _, own = case.run(case.tokens_BT)
    grid = activation_patching(case.config, case.params, case.tokens_BT, own, case.metric, "mlp/out", layers=0)
    np.testing.assert_allclose(grid, case.patched(), rtol=0, atol=BOUND["float64"])


def test_a_run_whose_whole_stream_is_patched_is_the_other(case):
    """At each layer, from activations and from tokens, and with the runs swapped."""
    logits = {name: forward(case.config, case.params, run)[0].logits for name, run in runs(case).items()}
    metrics = {name: float(case.metric(logits_BTV[:, -1])) for name, logits_BTV in logits.items()}
    assert abs(metrics["patched"] - metrics["source"]) > 0.1
    for tokens_BT, source, expected in [
        (case.tokens_BT, case.source, "source"),
        (case.tokens_BT, case.source_BT, "source"),
        (case.source_BT, case.tokens_BT, "patched"),
    ]:
        grid = activation_patching(case.config, case.params, tokens_BT, source, case.metric, each=())
        assert grid.shape == (2,)
        np.testing.assert_allclose(grid, metrics[expected], rtol=0, atol=BOUND["float64"])


@pytest.mark.parametrize(
    ("activation", "each", "places", "options"),
    [
        ("mlp/post", "neuron", {"neurons": range(3, 21, 2)}, {}),
        ("mlp/pre", ("neuron", "position"), {"neurons": [47, 0], "positions": [6, 2]}, {}),
        ("attn/pattern", "key_position", {"key_positions": range(N_TOKENS)}, {}),
        (
            "attn/scores",
            ("key_position", "position"),
            {"positions": [6, 4], "key_positions": [1, 5, 0]},
            {"heads": [2, 0]},
        ),
        ("attn/result", "head", {"heads": range(3)}, {"positions": [2, 6]}),
        ("attn/q_in", "head", {"heads": [2, 1]}, {}),
        ("attn/in", "position", {"positions": [3, 6]}, {"heads": 1}),
        ("mlp/in", "position", {"positions": [3, 6]}, {}),
    ],
)
def test_neurons_tokens_looked_at_and_branches(case, activation, each, places, options):
    """The axes of the result are heads, positions, key positions and neurons, whatever the order in `each`."""
    _, source = forward(*case.args[:2], case.source_BT, capture=f"h1/{activation}$")
    patching = functools.partial(activation_patching, *case.args[:3], metric=case.metric, activation=activation)
    grid = patching(source=source, each=each, layers=1, **options, **places)
    axes = [axis for axis in ("heads", "positions", "key_positions", "neurons") if axis in places]
    cells = [dict(zip(axes, cell, strict=True)) for cell in itertools.product(*(places[axis] for axis in axes))]
    name = f"h1/{activation}"
    expected = [case.patched(replace(name, source[name], **cell, **options)) for cell in cells]
    assert grid.shape == (1, *(len(places[axis]) for axis in axes))
    check(grid, np.reshape(expected, grid.shape))
    from_tokens = patching(source=case.source_BT, each=each, layers=1, **options, **places)
    np.testing.assert_allclose(from_tokens, grid, rtol=0, atol=BOUND["float64"])


# ---- a patched run that is changed


def test_patches_of_a_changed_run(case):
    """The patch comes after the edits and taps, also after those of the patched activation; the source has none."""
    changes = [
        add("embed", 0.3, positions=[1, 2]),
        scale("h0/attn/scores", 0.5, heads=1),
        add("h1/mlp/out", 2.0),
        scale("h0/attn/z", 3.0),
    ]
    taps = {"^h0/mlp/post$": _halved, r"h\d/attn/z": _halved}

    def run(*edits):
        patches = {edit.name: functools.partial(_put, edit.value, int(edit.positions[0])) for edit in edits}
        out, _ = forward(*case.args[:3], edits=changes, taps={**taps, **patches})
        return float(case.metric(out.logits[:, -1]))

    assert abs(run() - case.patched()) > 0.1
    for activation, layer in (("attn/z", 0), ("mlp/out", 1), ("resid_mid", 1), ("mlp/post", 0)):
        grid = activation_patching(
            *case.args[:3],
            case.source_BT,
            case.metric,
            activation,
            layers=layer,
            edits=changes,
            taps=taps,
            positions=[6, 2],
        )
        expected = [[run(patch(f"h{layer}/{activation}", case.source, t)) for t in (6, 2)]]
        np.testing.assert_allclose(grid, expected, rtol=0, atol=BOUND["float64"])
    assert np.ptp(expected) > 1e-3


def _halved(value, position_BT):
    return value / 2


def _put(value, t, x, position_BT):
    return jnp.where((position_BT == t).reshape(*x.shape[:2], *[1] * (x.ndim - 2)), value, x)


def test_estimates_of_a_changed_run(case):
    """At ln_f/out, where all that follows is linear, they are the difference to the changed run."""
    changes = {"edits": add("h0/mlp/out", 0.5), "taps": {"ln_f/out": _halved}}
    estimate = attribution_patching(*case.args, "ln_f/out", **changes)["ln_f/out"]
    changed = float(case.metric(forward(*case.args[:3], **changes)[0].logits[:, -1]))
    assert abs(changed - case.patched()) > 0.1
    patched = case.patched(patch("ln_f/out", case.source))
    np.testing.assert_allclose(estimate, [0] * 6 + [patched - changed], rtol=0, atol=BOUND["float64"])


def test_other_numbers_in_edits_compile_nothing(case):
    def grid(value, position):
        edits = add("embed", value, positions=position)
        return activation_patching(*case.args, layers=1, edits=edits)

    before = grid(0.1, 2)
    COMPILATIONS.clear()
    after = grid(0.2, 1)
    assert COMPILATIONS == []
    assert (after != before).any()


def runs(case):
    return {"patched": case.tokens_BT, "source": case.source_BT}


def test_a_source_may_be_a_mean(case):
    mean_D = case.source["h0/mlp/out"].mean((0, 1))
    grid = activation_patching(*case.args[:3], {"h0/mlp/out": mean_D}, case.metric, "mlp/out", layers=0)
    check(grid, [[case.patched(replace("h0/mlp/out", mean_D, t)) for t in range(N_TOKENS)]])


# ---- metrics


def test_a_metric_sees_the_place_it_asks_for(case):
    """Patches at later positions change nothing. Each row may have its own position."""
    grid = activation_patching(*case.args, at=3, layers=1)
    np.testing.assert_allclose(grid[:, 4:], case.patched(at=3), rtol=0, atol=BOUND["float64"])
    check(grid[:, :4], [[case.patched(patch("h1/resid_pre", case.source, t), at=3) for t in range(4)]])
    np.testing.assert_array_equal(activation_patching(*case.args, at=3 - N_TOKENS, layers=1), grid)
    one, other, both = (activation_patching(*case.args[:4], _of_rows, at=at, layers=1) for at in (1, -2, [1, -2]))
    assert both.shape == (1, N_TOKENS, 2)
    np.testing.assert_array_equal(both, np.stack([one[..., 0], other[..., 1]], axis=-1))


def _of_rows(logits_BV):
    return jax.nn.log_softmax(logits_BV)[:, 7]


def test_a_metric_may_see_all_positions_and_hold_numbers(case):
    metric = Partial(lambda token, logits_BTV: logits_BTV[:, 2, token].mean(), 5)
    grid = activation_patching(*case.args[:4], metric, layers=1, at=None)
    rows = [forward(*case.args[:3], edits=patch("h1/resid_pre", case.source, t))[0].logits for t in range(N_TOKENS)]
    np.testing.assert_allclose(grid[0], [logits[:, 2, 5].mean() for logits in rows], rtol=0, atol=BOUND["float64"])


def test_several_metrics_of_the_same_runs(case):
    """As a tree that one function returns, and as a dict of functions; each is what it is alone."""
    alone, rows = (activation_patching(*case.args[:4], metric, layers=1) for metric in (case.metric, _of_rows))
    tree = activation_patching(*case.args[:4], lambda logits: (_of_rows(logits), [3, {"a": logits.sum()}]), layers=1)
    np.testing.assert_array_equal(tree[0], rows)
    np.testing.assert_array_equal(tree[1][0], np.full((1, N_TOKENS), 3))
    assert tree[1][1]["a"].shape == (1, N_TOKENS)
    several = {"z": case.metric, "a": _of_rows, "m": {"y": case.metric, "x": _of_rows}}
    named = activation_patching(*case.args[:4], several, layers=1)
    assert (list(named), list(named["m"])) == (["z", "a", "m"], ["y", "x"])
    for found, expected in [(named["z"], alone), (named["a"], rows), (named["m"]["x"], rows)]:
        np.testing.assert_array_equal(found, expected)
    estimate = functools.partial(attribution_patching, *case.args[:4])
    pair = estimate({"z": case.metric, "a": _of_first_row}, "mlp/out|attn/z")
    for name, metric in (("z", case.metric), ("a", _of_first_row)):
        for activation, expected in estimate(metric, "mlp/out|attn/z").items():
            np.testing.assert_allclose(pair[activation][name], expected, rtol=0, atol=BOUND["float64"])
    assert list(pair["h0/mlp/out"]) == ["z", "a"]


def test_other_numbers_in_several_metrics_compile_nothing(case):
    def both(*ids):
        metrics = {"b": logit_difference(*ids), "a": logit_difference(*ids[::-1])}
        grid = activation_patching(*case.args[:4], metrics, layers=1)
        return grid["b"], attribution_patching(*case.args[:4], metrics, "h0/attn/z")["h0/attn/z"]["b"]

    before = both([1, 2], [3, 4])
    COMPILATIONS.clear()
    after = both([5, 6], [7, 8])
    assert COMPILATIONS == []
    assert all((a != b).any() for a, b in zip(after, before, strict=True))


def test_ids_of_any_kind_are_one_program_and_others_are_refused():
    avals = [jax.tree.map(jax.typeof, logit_difference(*ids)) for ids in ((2, 0), (np.int64(2), np.uint16(0)))]
    assert jax.tree.leaves(avals[0]) == jax.tree.leaves(avals[1])
    for wrong in (" Paris", 1.5, None):
        with pytest.raises(ValueError, match=r"^wrong must be a token id"):
            logit_difference(2, wrong)


def test_logit_difference():
    logits_BV = jnp.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    assert logit_difference(2, 0)(logits_BV) == ((4 - 1) + (32 - 8)) / 2
    assert logit_difference([2, 1], 0)(logits_BV) == ((4 - 1) + (16 - 8)) / 2
    assert np.isnan(logit_difference([2, 3], 0)(logits_BV))
    assert np.isnan(logit_difference([2, -1], 0)(logits_BV))
    with pytest.raises(ValueError, match=r"takes logits \[B, V\]"):
        logit_difference(2, 0)(logits_BV[None])


# ---- padding, cost


def test_padding_is_not_there(case):
    """A row padded on both sides has the grid and estimates of the row without padding, beside an unpadded row."""
    mask_BT = np.array([[0, 0, 1, 1, 1, 1, 0], [1] * N_TOKENS], bool)
    model = (case.config.replace(n_layer=1), {name: case.params[name] for name in ("wte", "wpe", "h0", "ln_f")})
    ones = (*model, case.tokens_BT[:1, 2:6], case.source_BT[:1, 2:6])
    both = (*model, case.tokens_BT, case.source_BT)
    padded = activation_patching(*both, _of_rows, mask_BT=mask_BT)[:, :4, 0]
    check(padded, activation_patching(*ones, _of_rows)[:, :, 0])
    for nowhere in (4, -5):  # the row has four tokens
        values = activation_patching(*both, _of_rows, mask_BT=mask_BT, at=[nowhere, -1])
        np.testing.assert_array_equal(np.isnan(values), np.broadcast_to([True, False], values.shape))
    padded = attribution_patching(*both, _of_first_row, "attn/k", mask_BT=mask_BT)["h0/attn/k"]
    check(padded[:, 2:6], attribution_patching(*ones, _of_first_row, "attn/k")["h0/attn/k"])


def _of_first_row(logits_BV):
    return _of_rows(logits_BV)[0]


def test_other_numbers_compile_nothing(case):
    def both(tokens_BT, source, metric, places, at):
        args = (case.config, case.params, tokens_BT, source, metric)
        grid = activation_patching(*args, "attn/z", each="head", positions=places, layers=0, at=at)
        return grid, attribution_patching(*args, "h0/attn/z", at=at)["h0/attn/z"]

    before = both(case.tokens_BT, case.source, case.metric, [1, 3], 4)
    source = {name: value + 1 for name, value in case.source.items()}
    metric = logit_difference([0, 1], [2, 3])
    COMPILATIONS.clear()
    after = both(case.source_BT, source, metric, [0, 2], -1)
    assert COMPILATIONS == []
    assert all((a != b).any() for a, b in zip(after, before, strict=True))


def test_what_is_before_a_patch_is_not_computed_anew(case):
    """Runs from layer 1 compute one of two blocks, and not its queries, keys and values if they start after these."""

    def operations(activation, layer):
        run = functools.partial(activation_patching, case.config, metric=_of_rows, activation=activation, layers=layer)
        compiled = jax.jit(run).lower(case.params, case.tokens_BT, case.source).compile()
        return compiled.cost_analysis()["flops"]

    both, one, part = operations("resid_pre", 0), operations("resid_pre", 1), operations("attn/z", 1)
    # Measured 0.97, 0.57 and 0.45 million: 0.4 a block in seven runs, and 0.06 a block in the run that is patched.
    assert one < 0.65 * both
    assert part < 0.85 * one


# ---- estimates


@pytest.mark.parametrize("name", ["embed", "h0/attn/q", "h0/attn/pattern", "h1/ln_2/scale"])
def test_an_estimate_is_the_derivative_of_patching(case, name):
    """The derivative is a central difference with a step of 1e-5 of the change."""
    estimate = attribution_patching(*case.args[:3], case.source_BT, case.metric)[name]
    _, own = case.run(case.tokens_BT)
    way = case.source[name] - own[name]

    def slope(*place):
        ahead, back = (case.patched(replace(name, own[name] + part * way, *place)) for part in (1e-5, -1e-5))
        return (ahead - back) / 2e-5

    heads = [(n,) for n in range(case.config.n_head)] if estimate.ndim == 2 else [()]
    slopes = np.reshape([slope(t, *head) for head in heads for t in range(N_TOKENS)], estimate.shape)
    assert np.abs(slopes).max() > 1e-2
    np.testing.assert_allclose(estimate, slopes, rtol=0, atol=1e-7)  # measured: 3e-9, the difference's own error


def test_estimates_of_what_heads_write_add_up(case):
    """To that of attn/out, because the sum over heads is linear."""
    estimates = attribution_patching(*case.args[:3], case.source_BT, case.metric, ["h0/attn/out", "h0/attn/result"])
    assert estimates["h0/attn/result"].shape == (3, N_TOKENS)
    np.testing.assert_allclose(
        estimates["h0/attn/result"].sum(0), estimates["h0/attn/out"], rtol=0, atol=BOUND["float64"]
    )
    assert np.abs(estimates["h0/attn/out"]).max() > 1e-2


def test_an_estimate_is_exact_where_all_that_follows_is_linear(case):
    """Only the logits follow ln_f/out. An estimate does not depend on which others are requested."""
    estimate = attribution_patching(*case.args, "ln_f/out")["ln_f/out"]
    patched = [case.patched(patch("ln_f/out", case.source, t)) - case.patched() for t in range(N_TOKENS)]
    assert np.count_nonzero(patched) == 1
    np.testing.assert_allclose(estimate, patched, rtol=0, atol=BOUND["float64"])
    everything = attribution_patching(*case.args[:3], case.source_BT, case.metric)
    assert list(everything) == list(case.source)
    np.testing.assert_allclose(everything["ln_f/out"], estimate, rtol=0, atol=BOUND["float64"])


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "h0/attn/z"}, "'h0/attn/z' is not an activation of a block: choose from resid_pre"),
        ({"activation": "ln_f/out"}, "is not an activation of a block"),
        ({"activation": "embed", "layers": 0}, "embed is before the layers: leave out `layers` and `window`"),
        ({"activation": "embed", "window": 2}, "leave out `layers` and `window`"),
        ({"window": 0}, "window must be a whole number, 1 or more, not 0"),
        ({"activation": "embed", "each": "head"}, "embed is not divided into heads: its axes are BTD"),
        (
            {"metric": lambda logits: "high"},
            "the metric must return a number, an array, or a tuple.* of these, not 'high'",
        ),
        ({"metric": lambda logits: {"a": logits, "b": None}}, "or a tuple, list or dict of these, not None"),
        ({"metric": lambda logits: ()}, r"of these, not \(\)"),
        ({"metric": "loss"}, "metric must be a function of the logits, or a dict of such functions, not 'loss'"),
        ({"metric": {}}, "or a dict of such functions, not {}"),
        ({"metric": {"a": 3}}, "metric must be a function of the logits, .* not 3"),
        ({"each": "head"}, "resid_pre is not divided into heads: its axes are BTD"),
        ({"heads": 1}, "resid_pre is not divided into heads"),
        ({"each": "layer"}, "each must be among 'head', 'position', 'key_position', 'neuron', not 'layer'"),
        ({"each": "neuron"}, "resid_pre is not divided into neurons: its axes are BTD"),
        ({"neurons": [0]}, "resid_pre is not divided into neurons"),
        ({"each": "key_position"}, "resid_pre is not divided by the token that is looked at: its axes are BTD"),
        ({"activation": "attn/pattern", "key_positions": [7]}, "key_positions must be from -7 to 6"),
        ({"activation": "mlp/pre", "neurons": [48]}, "neurons must be from 0 to 47"),
        ({"edits": scale("attn/z", 0, heads=3)}, r"heads \[3\], but the model has 3"),
        ({"taps": {"attn/zz": len}}, "attn/zz"),
        ({"activation": "attn/z", "heads": [0, 3]}, "heads must be from 0 to 2"),
        ({"positions": [-8]}, "positions must be from -7 to 6"),
        ({"positions": [[1], [2], [3]]}, "positions has lists for 3 rows, but there are 2"),
        ({"positions": [[1], [2, 3]]}, "positions must be one or more whole numbers"),
        ({"positions": []}, "positions must be one or more whole numbers"),
        ({"positions": slice(9, 12)}, "positions must be one or more whole numbers"),
        ({"layers": 2}, "layers must be from -2 to 1, not 2"),
        ({"layers": 0.5}, "layers must be one or more whole numbers"),
        ({"at": 7}, "at must be a position in rows of 7 tokens"),
        ({"at": [1, 2, 3]}, "or one for each of 2 rows, not"),
        ({"at": 1.5}, "at must be a position"),
        ({"at": [[1], [1, 2]]}, "at must be a position"),
        ({"at": 2**70}, "at must be a position"),
        ({"together": 0}, "together must be a whole number, 1 or more, not 0"),
        ({"source": {"h0/attn/z": 0}}, "h0/resid_pre was not captured in .*to patch from: that run has h0/attn/z"),
        ({"source": np.zeros((2, 5), int)}, r"the tokens of both runs must have one shape, not \(2, 7\) and \(2, 5\)"),
        ({"source": [[99] * 7] * 2}, "holds the id 99"),
        ({"tokens_BT": jnp.arange(7)}, r"tokens must be whole numbers of shape \[B, T\], not int"),
        (
            {"source": {"h0/resid_pre": np.zeros(5), "h1/resid_pre": np.zeros(5)}},
            r"of shape \(5,\), which does not broad",
        ),
    ],
)
def test_a_grid_that_cannot_be(case, options, message):
    args = dict(zip(["config", "params", "tokens_BT", "source", "metric"], case.args, strict=True))
    with pytest.raises(ValueError, match=message):
        activation_patching(**args | options)


def test_an_estimate_that_cannot_be(case):
    with pytest.raises(ValueError, match="the metric must return one number, not an array of shape"):
        attribution_patching(*case.args[:4], _of_rows, "ln_f/out")
    with pytest.raises(ValueError, match="no activation name matches 'nothing'"):
        attribution_patching(*case.args, "nothing")
    with pytest.raises(ValueError, match="embed was not captured in the run to patch from"):
        attribution_patching(*case.args[:3], {}, case.metric)
    with pytest.raises(ValueError, match="of both runs must have one shape"):
        attribution_patching(*case.args[:3], case.source_BT[:1], case.metric)
