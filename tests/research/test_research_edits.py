"""Edits of activations: they give what NumPy computes, and change nothing where they do not apply."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_activations as naive
import pytest
from forward import padding_masks, relative_error, some_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from measures import COMPILATIONS
from numpy_activations import CONFIG, has_heads

import gpt2_jax
from gpt2_jax import research

NAMES = naive.names(CONFIG.n_layer)
KINDS = {"replace": research.replace, "add": research.add, "scale": research.scale}
BOUND = 5e-6  # of float32, relative to the largest value; measured: 6.4e-7
NOWHERE = 9999
LENGTH = 7
TOKENS = some_tokens(CONFIG, 3, LENGTH)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, naive.weights())


def assert_like_numpy(params, ours, edits, tokens_BT=TOKENS, mask_BT=None):
    naive.assert_agrees(ours, params, tokens_BT, mask_BT, edits, bound=BOUND)


# --- one program that holds an edit of every kind of every activation, in every form --------------------------------

# Each edit applies only where a test says. So all tests share one compilation, as edits promise.
FORMS = [("list", "list", "full"), ("slice", "int", "last"), ("int", "none", "number"), ("list", "none", "last")]
SLOTS = [(name, kind, *FORMS[(i + j) % 4]) for i, name in enumerate(NAMES) for j, kind in enumerate(KINDS)]


def value_of(slot, seed):
    name, kind, _, _, form = slot
    if kind == "replace" and form == "number":
        form = "last"  # LayerNorm of a constant stream amplifies rounding
    rng, shape = np.random.default_rng(seed), naive.shape_of(name, 3, LENGTH)
    shape = {"full": shape, "last": shape[-1:], "number": ()}[form]
    # A scale near 0 would amplify differences.
    return rng.uniform(0.5, 1.5, shape) if name.endswith("/scale") else rng.normal(0, 1, shape)


def make(slot, places=None, heads=(0, 0), seed=0):
    """Return the slot's edit and its description for `naive`. Int forms take the first of `places` and `heads`."""
    name, kind, position_form, head_form, _ = slot
    places = [NOWHERE] if places is None else places
    first, last = min(places), max(places)
    positions, at = {
        "list": ((places * 3)[:3], (places * 3)[:3]),
        "slice": (slice(first, last + 1), range(first, last + 1)),
        "int": (first, [first]),
    }[position_form]
    of_heads = {"list": list(heads), "int": heads[0], "none": None}[head_form] if has_heads(name) else None
    value = np.asarray(value_of(slot, seed), np.float32)
    ours = KINDS[kind](name, value, positions=positions, heads=of_heads)
    return ours, naive.edit(kind, name, value, at, [of_heads] if isinstance(of_heads, int) else of_heads)


def everywhere_nowhere():
    return {slot: make(slot)[0] for slot in SLOTS}


@pytest.fixture(scope="module")
def full(params):
    """Return a function that runs the program with these edits, and with all others applied nowhere."""
    nowhere = everywhere_nowhere()

    @jax.jit  # traced positions that no row has apply nowhere; known ones would be refused
    def program(edits, mask_BT):
        return research.forward(CONFIG, params, TOKENS, mask_BT, capture=".", edits=edits)

    def run(edits, mask_BT=None):
        mask_BT = np.ones(TOKENS.shape, bool) if mask_BT is None else mask_BT
        out, seen = program([*(nowhere | edits).values()], mask_BT)
        return out, {name: np.asarray(value) for name, value in seen.items()}

    return run


def choices(slots):
    """Draw a slot, one to three positions in the row, two heads and a seed of values."""
    places = st.lists(st.integers(0, LENGTH - 1), min_size=1, max_size=3)
    heads = st.tuples(*[st.integers(0, CONFIG.n_head - 1)] * 2)
    return st.tuples(st.sampled_from(slots), places, heads, st.integers(0, 99))


@pytest.mark.parametrize("name", NAMES)
def test_edits_of_each_activation_are_numpys(params, full, name):
    """Each kind alone, at some positions and heads, then all three in turn. All activations and logits are compared."""
    slots = [slot for slot in SLOTS if slot[0] == name]
    made = [make(slot, [1 + j, 4], (2, j), seed=j) for j, slot in enumerate(slots)]
    for slots_on, made_on in [*(([slot], [one]) for slot, one in zip(slots, made, strict=True)), (slots, made)]:
        found = full(dict(zip(slots_on, (ours for ours, _ in made_on), strict=True)))
        assert_like_numpy(params, found, [theirs for _, theirs in made_on])


@settings(max_examples=41)
@given(st.lists(choices(SLOTS), min_size=1, max_size=3, unique_by=lambda choice: choice[0]), st.sampled_from([0, 1, 2]))
def test_any_edits_are_numpys(params, full, chosen, padding):
    """Any edits together, also in padded rows, where positions count from the first real token."""
    mask_BT = list(padding_masks(LENGTH).values())[padding]
    made = {slot: make(slot, *where) for slot, *where in sorted(chosen, key=lambda choice: SLOTS.index(choice[0]))}
    found = full({slot: ours for slot, (ours, _) in made.items()}, mask_BT)
    assert_like_numpy(params, found, [theirs for _, theirs in made.values()], mask_BT=mask_BT)


@pytest.fixture(scope="module")
def unedited(full):
    return full({})


@settings(max_examples=41)
@given(choices(SLOTS))
def test_what_comes_before_stays_as_it_was(full, unedited, choice):
    """Activations that are computed earlier, and later ones at earlier tokens, are bit-identical."""
    slot, places, heads, seed = choice
    out, seen = full({slot: make(slot, places, heads, seed)[0]})
    first = min(places)
    for name in NAMES:
        before, after = unedited[1][name], seen[name]
        if NAMES.index(name) < NAMES.index(slot[0]):
            assert before.tobytes() == after.tobytes(), name
        earlier = (slice(None),) * (2 if name.endswith(("scores", "pattern")) else 1) + (slice(first),)
        assert before[earlier].tobytes() == after[earlier].tobytes(), name
    assert not np.array_equal(seen[slot[0]], unedited[1][slot[0]])
    assert np.asarray(out.logits[:, :first]).tobytes() == np.asarray(unedited[0].logits[:, :first]).tobytes()


def test_other_values_places_and_heads_compile_nothing(full):
    """Other ends of a slice compile nothing either."""
    full({slot: make(slot, [1, 3], (1, 2), 1)[0] for slot in SLOTS})
    compiled = len(COMPILATIONS)
    full({slot: make(slot, [0, 5], (2, 0), 2)[0] for slot in SLOTS})
    full({slot: make(slot, [2, 6], (0, 1), 3)[0] for slot in SLOTS[::2]})
    assert len(COMPILATIONS) == compiled


# --- the ways to say where -------------------------------------------------------------------------------------------

PLACES = [
    (np.int64(4), [4]),
    ([5, 1], [1, 5]),
    ((2, 2, 0), [0, 2]),
    (np.array([3, 6], np.uint8), [3, 6]),
    (jnp.array([3, 6]), [3, 6]),
    (slice(2, 5), [2, 3, 4]),
    (slice(5, None), [5, 6]),
    (slice(None, 2), [0, 1]),
    (slice(None), range(LENGTH)),
    (slice(5, 2**33, 1), [5, 6]),
    (slice(4, 4), []),
    ([], []),
    (None, None),
    (-1, [6]),
    ([-7, 2], [0, 2]),
    (slice(-2, None), [5, 6]),
    (slice(1, -3), [1, 2, 3]),
    (slice(-300, 2), [0, 1]),
    (slice(None, -LENGTH), []),
    ([[3], [-1], [0]], {0: [3], 1: [6], 2: [0]}),
    ([[1, 2], [4], []], {0: [1, 2], 1: [4], 2: []}),
    (slice([1, 0, -2], 5), {0: [1, 2, 3, 4], 1: [0, 1, 2, 3, 4], 2: []}),
]
HEADS = [(1, [1]), (np.int32(2), [2]), ([2, 0], [0, 2]), ((1,), [1]), (np.array([1, 1]), [1]), (jnp.array(0), [0])]


def test_places_and_heads_may_be_said_in_any_way(params):
    """In one pass, each form adds its own vector."""
    rng, edits, described = np.random.default_rng(1), [], []
    for positions, at in PLACES:
        edits.append(research.add("h1/resid_pre", rng.normal(0, 1, 15), positions))
        described.append(naive.edit("add", "h1/resid_pre", edits[-1].value, at))
    for heads, of in HEADS:
        edits.append(research.add("h0/attn/z", rng.normal(0, 1, 5), heads=heads))
        described.append(naive.edit("add", "h0/attn/z", edits[-1].value, None, of))
    found = research.forward(CONFIG, params, TOKENS, capture="h1/resid_pre|h0/attn/z", edits=edits)
    assert_like_numpy(params, found, described)


def test_traced_places_and_heads(params):
    """Inside a program: single, in a list, or as the ends of a slice. A negative position counts from the end."""
    value_D, value_H = np.split(np.random.default_rng(2).normal(0, 1, 20).astype(np.float32), [15])

    @jax.jit
    def run(place, others, start, head):
        edits = [
            research.replace("h0/resid_mid", value_D, positions=place),
            research.add("h0/mlp/out", value_D, positions=[others[0], others[1]]),
            research.add("h1/resid_mid", value_D, positions=slice(start, start + 2)),
            research.replace("h1/attn/z", value_H, positions=slice(start, None), heads=head),
            research.scale("h1/attn/q", 3, heads=jnp.stack([head, head + 1])),
        ]
        return research.forward(CONFIG, params, TOKENS, capture="resid_post", edits=edits)

    for place, others, start, head in [(2, [5, 0], 4, 1), (-1, [-2, 3], 0, 0), (0, [1, 1], 6, 2)]:
        described = [
            naive.edit("replace", "h0/resid_mid", value_D, [place % LENGTH]),
            naive.edit("add", "h0/mlp/out", value_D, [other % LENGTH for other in others]),
            naive.edit("add", "h1/resid_mid", value_D, [start, start + 1]),
            naive.edit("replace", "h1/attn/z", value_H, range(start, LENGTH), [head]),
            naive.edit("scale", "h1/attn/q", 3, None, [head, head + 1]),
        ]
        assert_like_numpy(params, run(place, np.array(others), start, head), described)


def test_edits_of_one_activation_are_made_in_turn(params):
    """They apply in the order of the list, also with others in between. Each order gives NumPy's result for it."""
    value_D = np.arange(15) % 4 - 1.5
    steps = [("add", value_D, [1, 2]), ("scale", -3.0, [2, 3]), ("replace", -value_D, [3, 4])]
    results = []
    for order in ([0, 1, 2], [2, 1, 0]):
        edits, described = [], []
        for i in order:
            kind, value, at = steps[i]
            for name in ("h0/resid_post", "h1/mlp/out"):
                edits.append(KINDS[kind](name, value, at))
                described.append(naive.edit(kind, name, value, at))
        found = research.forward(CONFIG, params, TOKENS, capture="mlp/out|resid_post", edits=edits)
        assert_like_numpy(params, found, described)
        results.append(np.asarray(found[0].logits))
    assert relative_error(*results) > 0.01


def test_values_broadcast_against_the_whole_activation(params):
    """Values have axes of heads, tokens or rows. Where the edit applies, it uses the value at that index."""
    rng, edits = np.random.default_rng(3), []
    for name, shape in [("h0/attn/z", (3, 5)), ("h0/attn/q", (LENGTH, 1, 5)), ("h1/attn/pattern", (3, 3, 1, LENGTH)),
                        ("h1/mlp/out", (3, 1, 1)), ("h1/attn/scores", (3, LENGTH, LENGTH))]:  # fmt: skip
        edits.append(("replace", name, rng.normal(0, 1, shape), [6, 2], [2, 0] if has_heads(name) else None))
    ours = [research.replace(*edit[1:]) for edit in edits]
    found = research.forward(CONFIG, params, TOKENS, capture=[edit[1] for edit in edits], edits=ours)
    assert_like_numpy(params, found, [naive.edit(*edit) for edit in edits])


def test_patching_takes_each_place_and_head_of_the_other_run(params):
    """Values are taken row by row and token by token, and nothing else of the other run is used."""
    others = some_tokens(CONFIG, 3, LENGTH, seed=8)
    names = ["h0/attn/v", "h1/attn/pattern", "h1/resid_mid"]
    _, source = research.forward(CONFIG, params, others, capture=names)
    _, expected = naive.forward(CONFIG, params, others)
    edits = [
        research.patch(names[0], source, positions=slice(1, 4), heads=2),
        research.patch(names[1], source, positions=[5, 3], heads=[0, 1]),
        research.patch(names[2], source, positions=6),
    ]
    where = [([1, 2, 3], [2]), ([5, 3], [0, 1]), ([6], None)]
    described = [naive.edit("replace", name, expected[name], *at) for name, at in zip(names, where, strict=True)]
    assert_like_numpy(params, research.forward(CONFIG, params, TOKENS, capture=names, edits=edits), described)
    # A patch of the last layer's whole stream gives the other run's logits.
    _, source = research.forward(CONFIG, params, others, capture="h1/resid_post")
    out, _ = research.forward(CONFIG, params, TOKENS, edits=research.patch("h1/resid_post", source))
    assert relative_error(np.asarray(out.logits), naive.forward(CONFIG, params, others)[0]) < BOUND


def test_edits_hold_in_a_cache_step_by_step(params):
    """Positions count from the row's first real token, over all calls. Edited keys and values stay edited."""
    edits, described = [], []
    values = np.random.default_rng(4).normal(0, 1, (3, 5))
    for kind, name, value, at, heads in [
        ("replace", "h0/attn/k", values[0], [1, 5], [2]),
        ("add", "h1/attn/v", values[1], [0, 3], None),
        ("scale", "h0/attn/scores", 0.5, [2, 4], [0, 1]),
        ("scale", "h1/attn/pattern", values[2, 0], [3, 5], [1]),
        ("add", "h0/resid_post", np.tile(values[2], 3), [2, 6], None),
    ]:
        edits.append(KINDS[kind](name, value, at, heads))
        described.append(naive.edit(kind, name, value, at, heads))
    mask_BT = np.arange(LENGTH) >= np.array([0, 2, 1])[:, None]
    expected_BTV, _ = naive.forward(CONFIG, params, TOKENS, mask_BT, described)
    cache = gpt2_jax.init_cache(CONFIG, 3, 11)
    for span in (slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 7)):
        out, _ = research.forward(CONFIG, params, TOKENS[:, span], mask_BT[:, span], edits=edits, cache=cache)
        cache, real_BT = out.cache, mask_BT[:, span]
        assert relative_error(np.asarray(out.logits)[real_BT], expected_BTV[:, span][real_BT]) < BOUND


def test_edits_of_a_long_text(params):
    """Scores and patterns are edited in several blocks of attention, also at masked positions."""
    tokens_BT, rng = some_tokens(CONFIG, 2, 211, seed=1), np.random.default_rng(6)
    masks = rng.normal(0, 1, (211, 211))
    edits = [("replace", "h0/attn/scores", masks, [3, 127, 128, 209], [0, 2]),
             ("scale", "h0/attn/pattern", 2.0, range(100, 150), [1]),
             ("add", "h1/attn/pattern", masks / 211, [0, 5, 129, 210], [1, 2]),
             ("add", "h1/attn/scores", masks, range(60, 211), [0])]  # fmt: skip
    ours = [KINDS[kind](name, value, list(at), heads) for kind, name, value, at, heads in edits]
    found = research.forward(CONFIG, params, tokens_BT, capture="attn/(scores|pattern|z)", edits=ours)
    assert_like_numpy(params, found, [naive.edit(*edit) for edit in edits], tokens_BT)


def test_half_precision_takes_edits(params):
    """A float32 value is rounded to the activation's dtype, which does not change."""
    config = CONFIG.replace(compute_dtype="bfloat16")
    edits = [research.add("h0/mlp/out", np.float32(1.001)), research.scale("h1/attn/pattern", 1.001)]
    shapes = jax.eval_shape(lambda: research.forward(config, params, TOKENS, capture=".", edits=edits))
    assert {name: leaf.dtype for name, leaf in shapes[1].items()} == {
        name: leaf.dtype
        for name, leaf in jax.eval_shape(lambda: research.forward(config, params, TOKENS, capture="."))[1].items()
    }
