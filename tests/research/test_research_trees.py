"""Whole trees: merged as in NumPy, compared in both orders, selected and changed by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edited_weights import assert_close, bits, weights

from gpt2_jax.params import flatten, unflatten
from gpt2_jax.research import surgery

# ---- several trees


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_interpolation_is_a_line_through_both(dtype):
    a, b = (weights(seed=seed, dtype=jnp.dtype(dtype)) for seed in (1, 2))
    assert bits(surgery.interpolate(a, b, 0)) == bits(a)
    assert bits(surgery.interpolate(a, b, 1.0)) == bits(b)
    for t in (-0.7, 0.3, 2.0):
        line = surgery.interpolate(a, b, t)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(line)} == {dtype}
        eps = float(jnp.finfo(dtype).eps)
        for name, leaf in flatten(line).items():
            leaf_a, leaf_b = (np.asarray(flatten(tree)[name], np.float64) for tree in (a, b))
            exact = leaf_a + t * (leaf_b - leaf_a)
            assert_close(np.asarray(leaf, np.float64), exact, 2 * eps)


def test_a_loss_along_the_line_is_one_vmap():
    a, b = (weights(seed=seed, kind=jnp.asarray) for seed in (1, 2))
    ts = jnp.array([-0.5, 0.25, 1.0])
    found = jax.jit(jax.vmap(lambda t: surgery.interpolate(a, b, t)["h1"]["mlp"]["c_fc"]["w"][2, 3]))(ts)
    each = [surgery.interpolate(a, b, float(t))["h1"]["mlp"]["c_fc"]["w"][2, 3] for t in ts]
    np.testing.assert_allclose(found, each, rtol=1e-6)


def test_averages_are_numpy_s():
    trees = [weights(seed=seed) for seed in (1, 2, 3)]
    plain, weighted = surgery.average(trees), surgery.average(trees, [0.5, 1, 2.5])
    traced = jax.jit(surgery.average)(trees, jnp.array([0.5, 1, 2.5]))
    for name in flatten(plain):
        leaves = np.stack([flatten(tree)[name] for tree in trees]).astype(np.float64)
        assert_close(flatten(plain)[name], leaves.mean(0), 3e-7)  # measured: 8e-8, of all three
        assert_close(flatten(weighted)[name], np.average(leaves, 0, [0.5, 1, 2.5]), 3e-7)
        assert_close(flatten(traced)[name], np.average(leaves, 0, [0.5, 1, 2.5]), 3e-7)


def test_a_task_vector_gives_the_fine_tune_back():
    base, tuned = (weights(seed=seed, dtype=jnp.bfloat16) for seed in (1, 2))
    vector = surgery.task_vector(tuned, base)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(vector)} == {"float32"}
    assert bits(surgery.apply_task_vector(base, vector)) == bits(tuned)
    assert bits(surgery.apply_task_vector(base, vector, 0)) == bits(base)
    wide_base, wide_tuned = (jax.tree.map(lambda leaf: leaf.astype(np.float32), tree) for tree in (base, tuned))
    unlearned = surgery.apply_task_vector(wide_base, vector, -0.5)
    for name, leaf in flatten(unlearned).items():
        assert_close(leaf, flatten(wide_base)[name] * 1.5 - flatten(wide_tuned)[name] * 0.5, 3e-7)  # measured: 0


@pytest.mark.parametrize(
    "merge",
    [
        lambda a, b: surgery.interpolate(a, b, 0.5),
        lambda a, b: surgery.average([a, b]),
        surgery.task_vector,
        surgery.apply_task_vector,
        surgery.diff,
    ],
)
def test_trees_must_fit_each_other_both_ways(merge):
    a, b = flatten(weights()), flatten(weights())
    del a["h1/ln_2/g"], b["h2/mlp/c_fc/b"]
    b["wpe"] = b["wpe"][:5]
    with pytest.raises(ValueError, match="tree 1 does not fit tree 0") as refused:
        merge(unflatten(a), unflatten(b))
    assert str(refused.value).split("\n")[1:] == [
        "  missing: h2/mlp/c_fc/b float32[60]",
        "  extra: h1/ln_2/g float32[15]",
        "  misshaped: wpe is float32[5, 15], expected float32[13, 15]",
    ]


# ---- by name


def test_select_by_regex():
    params = weights()
    assert list(surgery.select(params, r"mlp/c_fc/b$")) == ["h0/mlp/c_fc/b", "h1/mlp/c_fc/b", "h2/mlp/c_fc/b"]
    chosen = surgery.select(params, ["^w", "h1/ln_.*/g"])
    assert list(chosen) == ["h1/ln_1/g", "h1/ln_2/g", "wpe", "wte"]
    assert chosen["wpe"] is params["wpe"]


def test_map_by_name():
    params, seen = weights(), []

    def double(name, w):
        seen.append(name)
        return 2 * w

    edited = surgery.map_params(double, params, r"h1/.*/g")
    assert seen == ["h1/ln_1/g", "h1/ln_2/g"]
    for name, leaf in flatten(edited).items():
        np.testing.assert_array_equal(leaf, flatten(params)[name] * (2 if name in seen else 1))


def test_diff_names_what_differs_and_by_how_much():
    b = weights()
    a = jax.tree.map(np.copy, b)
    a["h2"]["ln_1"]["g"] *= 1.5
    a["h0"]["mlp"]["c_fc"]["w"][3, 7] += 2
    a["wpe"][0, 0] = b["wpe"][0, 0] = np.nan  # the same on both sides
    a["h1"]["attn"]["c_attn"]["b"][4] = np.inf
    rows = surgery.diff(a, b)
    assert [row.name for row in rows] == ["h0/mlp/c_fc/w", "h1/attn/c_attn/b", "h2/ln_1/g"]
    assert [row.max_abs for row in rows] == pytest.approx([2, np.inf, np.abs(b["h2"]["ln_1"]["g"]).max() / 2])
    norm = np.linalg.norm(b["h0"]["mlp"]["c_fc"]["w"].astype(np.float64))
    assert [row.relative for row in rows] == pytest.approx([2 / norm, np.inf, 0.5])
    sized = surgery.diff(a, b, by="size")
    assert [row.name for row in sized] == ["h1/attn/c_attn/b", "h2/ln_1/g", "h0/mlp/c_fc/w"]
    assert str(sized[1]).split() == ["h2/ln_1/g", f"{sized[1].max_abs:.3e}", "5.000e-01"]
    a["wte"][0, 0] = np.nan  # on one side
    assert surgery.diff(a, b, by="size")[0].name == "wte"
    b["h1"]["ln_1"]["b"][:] = 0
    assert {row.name: row.relative for row in surgery.diff(a, b)}["h1/ln_1/b"] == np.inf
    assert surgery.diff(b, b) == []


def test_diff_across_dtypes():
    params = weights()
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    rows = surgery.diff(rounded, params)
    assert len(rows) == len(jax.tree.leaves(params))
    assert 0 < max(row.relative for row in rows) < 2**-8


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda p: surgery.select(p, [".", "c_atn"]), "'c_atn' matches no name"),
        (lambda p: surgery.map_params(lambda _, w: w, p, "h3/"), "'h3/' matches no name"),
        (lambda p: surgery.map_params(lambda _, w: w.T, p), r"h0/attn/c_attn/w is float32\[45, 15\]"),
        (lambda p: surgery.map_params(lambda _, w: w.astype("float64"), p), "is float64"),
        (lambda p: surgery.map_params(lambda _, w: None, p, "wte"), "must return an array for wte, not None"),
        (lambda p: surgery.diff(p, p, by="nam"), "by must be one of name, size, not 'nam'"),
        (lambda p: surgery.diff(p, None), "tree 1 must be nested dicts of arrays, not None"),
        (lambda p: surgery.average([]), "0 trees and 0 weights"),
        (lambda p: surgery.average([p, p], [1, 2, 3]), "2 trees and 3 weights"),
        (lambda p: surgery.average([p, p], [1, -1]), "finite and not 0"),
        (lambda p: surgery.average([p, p], [1, float("nan")]), "finite and not 0"),
    ],
)
def test_what_is_not_there_is_refused(edit, told):
    with pytest.raises(ValueError, match=told):
        edit(weights())
