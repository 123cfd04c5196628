"""An edit that this model cannot apply is refused. The message says in one sentence what is wrong."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import numpy_activations as naive
import pytest
from forward import some_tokens
from numpy_activations import CONFIG

from gpt2_jax import research

LENGTH = 7
TOKENS = some_tokens(CONFIG, 3, LENGTH)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, naive.weights())


@pytest.mark.parametrize(
    "name", ["h0/resid_pots", "resid_pots", "h0", "", "hx/attn/q", "h0/attn", "H0/attn/q", None, 3]
)
@pytest.mark.parametrize("make", [research.replace, research.add, research.scale])
def test_a_name_that_no_model_has_is_refused(params, make, name):
    with pytest.raises(ValueError, match=repr(name)):
        research.forward(CONFIG, params, TOKENS, edits=make(name, 0.0))


@pytest.mark.parametrize("name", ["h2/resid_pre", "h17/attn/q", "h00/attn/q"])
def test_a_layer_that_the_model_has_not_is_refused(params, name):
    with pytest.raises(ValueError, match=name):
        research.forward(CONFIG, params, TOKENS, edits=[research.add(name, 0.0)])


@pytest.mark.parametrize("name", ["h0/resid_pre", "h1/attn/out", "h0/mlp/pre", "embed", "ln_f/scale"])
def test_heads_of_what_has_none_are_refused(name):
    with pytest.raises(ValueError, match="heads"):
        research.add(name, 0.0, heads=0)


@pytest.mark.parametrize("places", [1.5, [0.0], "3", ["a"], True, [None], [True, False], {1, 2}, object(),
                                    np.zeros((2, 2, 2), int), [[1.5], [2, 3]], [["a"], []]])  # fmt: skip
@pytest.mark.parametrize("what", ["positions", "heads", "key_positions", "layers"])
def test_places_and_heads_that_are_no_whole_numbers_are_refused(what, places):
    with pytest.raises(ValueError, match=f"^{what} must be"):
        research.add("attn/pattern", 0.0, **{what: places})


@pytest.mark.parametrize("heads", [-1, [0, -3], [[1, 2]], np.zeros((2, 2), int)])
def test_heads_are_counted_from_0_and_the_same_for_all_rows(heads):
    with pytest.raises(ValueError, match=r"^heads must be whole numbers, 0 or more"):
        research.add("h0/attn/z", 0.0, heads=heads)


@pytest.mark.parametrize("positions", [slice(0, 6, 2), slice(0.5, 2), slice("a", "b"), slice([1, 2], [5, 6, 7])])
def test_other_slices_are_refused(positions):
    with pytest.raises(ValueError, match=r"^positions must be"):
        research.scale("h0/resid_pre", 0.0, positions)


@pytest.mark.parametrize("positions", [LENGTH, -LENGTH - 1, [2, 300], 2**32 + 3, slice(LENGTH, None), slice(9, 12),
                                       [[1], [LENGTH], [2]], slice([7, 8, 9], None), slice(-20, -10)])  # fmt: skip
@pytest.mark.parametrize("what", ["positions", "key_positions"])
def test_positions_that_no_row_has_are_refused(params, what, positions):
    with pytest.raises(ValueError, match=r"h1/attn/pattern.*row"):
        research.forward(CONFIG, params, TOKENS, edits=research.scale("h1/attn/pattern", 0.0, **{what: positions}))


def test_positions_beyond_a_masked_row_are_refused(params):
    """Positions count real tokens. One that any row has is taken; of each row, each row must have its own."""
    mask_BT = np.arange(LENGTH) < np.array([3, 5, 4])[:, None]
    research.forward(CONFIG, params, TOKENS, mask_BT, edits=research.add("embed", 1.0, positions=[4, -5]))
    with pytest.raises(ValueError, match=r"position 5.*5 tokens"):
        research.forward(CONFIG, params, TOKENS, mask_BT, edits=research.add("embed", 1.0, positions=5))
    with pytest.raises(ValueError, match=r"position 3.*3 tokens"):
        research.forward(CONFIG, params, TOKENS, mask_BT, edits=research.add("embed", 1.0, positions=[[3], [3], [3]]))


@pytest.mark.parametrize("heads", [3, [0, 7]])
def test_heads_that_the_model_has_not_are_refused(params, heads):
    with pytest.raises(ValueError, match=r"h0/attn/z.*heads.*3"):
        research.forward(CONFIG, params, TOKENS, edits=[research.scale("h0/attn/z", 0.0, heads=heads)])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("h0/resid_pre", (14,)), ("h0/resid_pre", (2, LENGTH, 15)), ("h0/resid_pre", (LENGTH + 1, 15)),
        ("h0/resid_pre", (1, 3, LENGTH, 15)), ("h0/attn/z", (15,)), ("h0/attn/z", (2, 5)), ("h0/attn/pattern", (3, 5)),
        ("ln_f/scale", (15,)), ("h0/mlp/post", (15,)),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_are_refused(params, name, shape):
    """The message names the activation and both shapes. A value that would enlarge the activation is refused too."""
    with pytest.raises(ValueError, match=f"{name}.*{re.escape(str(shape))}"):
        research.forward(CONFIG, params, TOKENS, edits=[research.add(name, np.zeros(shape))])


@pytest.mark.parametrize("value", ["a", None, [[1, 2], [3]], 1j, np.array(["1.0"]), object()])
def test_values_that_are_no_numbers_are_refused(value):
    with pytest.raises(ValueError, match="value"):
        research.replace("h0/resid_pre", value)


@pytest.mark.parametrize("edits", ["h0/resid_pre", [("h0/resid_pre", 0.0)], [None], [lambda x: x], {"embed": 0.0}])
def test_what_is_no_edit_is_refused(params, edits):
    with pytest.raises(ValueError, match="edits must be made with"):
        research.forward(CONFIG, params, TOKENS, edits=edits)


def test_what_was_not_captured_cannot_be_patched(params):
    _, seen = research.forward(CONFIG, params, TOKENS, capture="h0/mlp/post")
    with pytest.raises(ValueError, match=r"h1/mlp/post.*captured.*h0/mlp/post"):
        research.patch("h1/mlp/post", seen)
    with pytest.raises(ValueError, match="captured"):
        research.patch("h1/mlp/post", {})


def test_a_run_of_another_length_cannot_be_patched_from(params):
    _, seen = research.forward(CONFIG, params, TOKENS[:, :5], capture="h0/mlp/post")
    with pytest.raises(ValueError, match="h0/mlp/post"):
        research.forward(CONFIG, params, TOKENS, edits=[research.patch("h0/mlp/post", seen)])
