"""Edits of layers and matrices; and for every edit: the result is a complete GPT-2."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from edited_weights import CONFIG, assert_close, bits, logits, logits_by_hand, models, weights
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt2_jax
from gpt2_jax.model import check_params
from gpt2_jax.params import flatten
from gpt2_jax.research import folding, surgery

# ---- layers


@settings(max_examples=23)
@given(models(), st.data())
def test_layers_are_run_in_the_order_given(model, data):
    config, params = model
    order = data.draw(st.lists(st.integers(0, config.n_layer - 1), min_size=1, max_size=7))
    arranged, edited = surgery.arrange_layers(config, params, order)
    assert arranged == config.replace(n_layer=len(order))
    assert_close(logits(arranged, edited), logits_by_hand(config, params, order=order))
    assert all(
        edited[f"h{new}"]["mlp"]["c_fc"]["w"] is params[f"h{i}"]["mlp"]["c_fc"]["w"] for new, i in enumerate(order)
    )


@pytest.mark.parametrize(
    ("arrange", "order"),
    [
        (lambda c, p: surgery.drop_layers(c, p, [0, 9]), [1, 2, 3, 4, 5, 6, 7, 8, 10]),
        (lambda c, p: surgery.drop_layers(c, p, []), list(range(11))),
        (lambda c, p: surgery.repeat_layers(c, p, [10, 0]), [0, *range(11), 10]),
        (lambda c, p: surgery.repeat_layers(c, p, [1], times=3), [0, 1, 1, 1, *range(2, 11)]),
        (lambda c, p: surgery.swap_layers(c, p, 2, 10), [0, 1, 10, *range(3, 10), 2]),
        (lambda c, p: surgery.swap_layers(c, p, 4, 4), list(range(11))),
    ],
)
def test_dropped_repeated_and_swapped_layers(arrange, order):
    config = CONFIG.replace(n_layer=11)  # h10 comes after h9
    params = weights(config)
    for i in range(11):
        params[f"h{i}"]["ln_1"]["b"][:] = i
    arranged, edited = arrange(config, params)
    check_params(arranged, edited)
    assert [edited[f"h{i}"]["ln_1"]["b"][0] for i in range(arranged.n_layer)] == order


# ---- matrices


@pytest.mark.parametrize("name", ["h0/attn/c_proj/w", "h2/mlp/c_fc/w", "wte"])
def test_low_rank_is_the_nearest(name):
    params = weights(dtype=np.float64)
    w = flatten(params)[name]
    squares = np.linalg.eigvalsh(w.T @ w if w.shape[1] < w.shape[0] else w @ w.T)[::-1]  # of the singular values
    np.testing.assert_allclose(surgery.kept_energy(params, name), squares.cumsum() / squares.sum(), rtol=1e-12)
    for rank in (1, 7, 15):
        nearest = flatten(surgery.low_rank(params, name, rank))[name]
        assert np.linalg.matrix_rank(nearest) == rank
        np.testing.assert_allclose(((w - nearest) ** 2).sum(), squares[rank:].sum(), rtol=1e-11, atol=1e-25)


def test_low_rank_under_jit():
    params = weights(kind=jnp.asarray)
    by_numpy = surgery.low_rank(params, "wte", 5)["wte"]
    assert isinstance(by_numpy, jax.Array)
    traced = jax.jit(lambda params: surgery.low_rank(params, "wte", 5))(params)["wte"]
    np.testing.assert_allclose(traced, by_numpy, rtol=0, atol=2e-6)  # measured: 4e-7
    assert np.linalg.matrix_rank(traced, rtol=1e-5) == 5


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda p: surgery.drop_layers(CONFIG, p, [0, 1, 2]), "no layer is left"),
        (lambda p: surgery.drop_layers(CONFIG, p, [3]), "layer must be a whole number, from 0 to 2, not 3"),
        (lambda p: surgery.arrange_layers(CONFIG, p, [0, -1]), "layer must be a whole number, from 0 to 2, not -1"),
        (lambda p: surgery.repeat_layers(CONFIG, p, [0], times=0), "times must be a whole number, 1 or more, not 0"),
        (lambda p: surgery.swap_layers(CONFIG, p, 0, 7), "layer must be a whole number, from 0 to 2, not 7"),
        (
            lambda p: surgery.low_rank(p, "h0/attn/c_proj/w", 16),
            "the rank of h0/attn/c_proj/w must be a whole number, from 1 to 15",
        ),
        (lambda p: surgery.low_rank(p, "h0/attn/c_prj/w", 2), "nearest names are h0/attn/c_proj/w"),
        (lambda p: surgery.low_rank(p, "h0/attn/c_proj/b", 1), r"h0/attn/c_proj/b is \(15,\), not a matrix"),
    ],
)
def test_what_is_not_there_is_refused(edit, told):
    with pytest.raises(ValueError, match=told):
        edit(weights())


# ---- every edit


EDITS = {
    "ablate_heads": lambda c, p: (c, surgery.ablate_heads(c, p, [(1, 2), (0, 0)])),
    "ablate_heads to a mean": lambda c, p: (c, surgery.ablate_heads(c, p, [(1, 2)], np.ones((1, 5)))),
    "prune_heads": lambda c, p: (c, surgery.prune_heads(c, p, [(1, 2)])),
    "ablate_neurons": lambda c, p: (c, surgery.ablate_neurons(c, p, [(1, 2), (1, 59)])),
    "prune_neurons": lambda c, p: (c, surgery.prune_neurons(c, p, [(1, 2)], [0.5])),
    "drop_layers": lambda c, p: surgery.drop_layers(c, p, [1]),
    "repeat_layers": lambda c, p: surgery.repeat_layers(c, p, [1]),
    "swap_layers": lambda c, p: surgery.swap_layers(c, p, 0, 1),
    "arrange_layers": lambda c, p: surgery.arrange_layers(c, p, [1] * c.n_layer),
    "low_rank": lambda c, p: (c, surgery.low_rank(p, "h1/attn/c_attn/w", 3)),
    "interpolate": lambda c, p: (c, surgery.interpolate(p, other(c, p), 0.3)),
    "average": lambda c, p: (c, surgery.average([p, other(c, p)])),
    "apply_task_vector": lambda c, p: (c, surgery.apply_task_vector(p, weights(c, seed=7), 0.1)),
    "join_heads": lambda c, p: (c, surgery.join_heads(c, p, 0, surgery.split_heads(c, p, 1))),
    "map_params": lambda c, p: (c, surgery.map_params(lambda _, w: w + w, p, "ln_1/g")),
    "fold_layer_norm": lambda c, p: (c, folding.fold_layer_norm(c, p)),
    "center_unembed": lambda c, p: (c, folding.center_unembed(p)),
}


def other(config, params):
    """Return different weights, as NumPy arrays of the same dtype."""
    return jax.tree.map(lambda leaf, new: new.astype(leaf.dtype), params, weights(config, seed=7))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(np.array, "float32"), (np.array, "bfloat16"), (jnp.asarray, "bfloat16")],
    ids=["f32", "bf16", "jax"],
)
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_every_edit_leaves_its_input_alone_and_gives_a_whole_gpt2(edit, kind, dtype):
    config, params = CONFIG.replace(param_dtype=dtype), weights(dtype=jnp.dtype(dtype), kind=kind)
    before = bits(params)
    dicts = {id(branch) for branch in branches(params)}
    edited_config, edited = edit(config, params)
    assert bits(params) == before
    check_params(edited_config, edited)
    assert bits(edited) != before
    assert {isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(edited)} == {kind is jnp.asarray}
    assert not dicts & {id(branch) for branch in branches(edited)}  # changes of the new tree do not reach the old


def branches(tree):
    yield tree
    for branch in tree.values():
        if isinstance(branch, dict):
            yield from branches(branch)


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_every_edit_under_jit(edit):
    params = weights(kind=jnp.asarray)
    traced = flatten(jax.jit(lambda params: edit(CONFIG, params)[1])(params))
    for name, leaf in flatten(edit(CONFIG, params)[1]).items():
        assert_close(traced[name], leaf, 3e-6)  # measured: 7e-7, of low_rank


def test_every_edit_generates():
    whole = CONFIG.replace(n_layer=2)
    for edit in EDITS.values():
        config, params = edit(whole, weights(whole, kind=jnp.asarray))
        if config == whole:  # another depth takes seconds to compile
            found = gpt2_jax.generate(config, params, [[1, 2, 3]], 2, temperature=0.0)
            by_hand = numpy_reference.forward(params, np.array([[1, 2, 3]]), config.n_head)[0, -1]
            assert found[0][0] == by_hand.argmax()


def test_repeated_layers_are_saved_and_loaded(tmp_path):
    """An array that is used twice is saved twice: no form can store one array under two names."""
    config, params = surgery.repeat_layers(CONFIG, surgery.prune_heads(CONFIG, weights(), [(1, 2)]), [1])
    gpt2_jax.save(tmp_path / "model", config, params, format="huggingface")
    loaded_config, loaded = gpt2_jax.load(tmp_path / "model")
    assert loaded_config == config
    assert bits(loaded) == bits(params)
