"""Which params and first_row generate accepts, and where it may be called."""

import jax
import numpy as np
import pytest
from tiny_models import CONFIG, random_params

import gpt2_jax
from gpt2_jax.sharding import placed

PROMPTS = [[5], [3, 1, 4, 1, 5], [9] * 19]


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0)


@pytest.mark.parametrize("order", ["C", "F"])
def test_numpy_params_are_params(params, order):
    """The same ids and scores, and each array goes to the device once."""
    arrays = jax.tree.map(lambda leaf: np.array(leaf, order=order), params)
    assert gpt2_jax.generate(CONFIG, arrays, PROMPTS, 17) == gpt2_jax.generate(CONFIG, params, PROMPTS, 17)
    ours, theirs = (gpt2_jax.score(CONFIG, tree, PROMPTS[1:])[0].sum for tree in (arrays, params))
    assert ours == theirs
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(placed(arrays)))
    assert all(a is b for a, b in zip(jax.tree.leaves(placed(params)), jax.tree.leaves(params), strict=True))


@pytest.mark.parametrize("call", [gpt2_jax.generate, gpt2_jax.score])
def test_inside_jit_is_refused_in_words(params, call):
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda params: call(CONFIG, params, [[1, 2]]))(params)


@pytest.mark.parametrize("first_row", [-1, 2**32 - 2, 2**32, 1.5, True, "a", None])
def test_a_wrong_first_row_is_refused(first_row):
    with pytest.raises(ValueError, match="first_row"):
        gpt2_jax.generate(CONFIG, random_params(CONFIG, 0), PROMPTS, 3, first_row=first_row)


def test_rows_count_on_from_the_first(params):
    """A list processed in parts gives the same results as in one call, up to the largest row number."""
    whole = gpt2_jax.generate(CONFIG, params, [[7]] * 5, 17)
    assert gpt2_jax.generate(CONFIG, params, [[7]] * 3, 17, first_row=2) == whole[2:]
    last = gpt2_jax.generate(CONFIG, params, [[7]] * 3, 17, first_row=2**32 - 3)
    assert gpt2_jax.generate(CONFIG, params, [[7]], 17, first_row=2**32 - 1) == last[2:]
    assert last != whole[:3]
