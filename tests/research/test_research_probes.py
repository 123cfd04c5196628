"""Linear probes on constructed data: they find the label where it is, and score as a constant where it is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.research import probes
from gpt2_jax.research.probes import linear_probe


def layers(n=600, width=5, seed=0):
    """Return a label, and layers where it is not, is one channel among others, is noisy, and is an XOR of two."""
    rng = np.random.default_rng(seed)
    label_n = rng.integers(0, 2, n)
    x_LnD = rng.normal(size=(4, n, width)).astype(np.float32)
    x_LnD[1, :, 3] = label_n
    x_LnD[2, :, 0] += 2 * label_n
    x_LnD[3, :, 1] = (2 * label_n - 1) * np.sign(x_LnD[3, :, 2]) + 0.1 * x_LnD[3, :, 1]
    return x_LnD, label_n


def test_scores_tell_where_the_label_is():
    x_LnD, label_n = layers()
    found = linear_probe(x_LnD, label_n, l2=0.1)
    assert found.scores[1] == 1
    np.testing.assert_allclose(found.scores[2], 0.841, atol=0.04)  # the normal distribution at 1
    assert abs(found.scores[0] - 0.5) < 0.07
    assert abs(found.scores[3] - 0.5) < 0.07
    assert abs(found.chance - 0.5) < 0.05
    assert np.abs(found.weights[1, :, 0]).argmax() == 3
    assert found.weights[2, 0, 0] > 0.5  # towards the second class
    assert found.classes == (0, 1)
    assert (found.fold_scores.shape, found.held_out.shape) == ((4, 5), (4, 600, 1))
    np.testing.assert_array_equal(((found.held_out[..., 0] > 0) == label_n).mean(-1) > 0.9, [False, True, False, False])


@pytest.mark.parametrize("classes", [2, 3, None])
def test_a_channel_that_varies_only_in_the_held_out_fold_has_no_weight(classes):
    """Its variance in the fitted examples is rounding. Divided by it, the channel would decide everything."""
    x_LnD, label_n = layers(n=60)
    x_nD, label_n = x_LnD[2], np.arange(60) % classes if classes else x_LnD[2, :, 0] + 0.1
    fold_n = np.arange(60) // 12
    without = linear_probe(x_nD, label_n, folds=fold_n)
    with_it = linear_probe(np.c_[x_nD, np.where(np.arange(60) == 7, 5, 0.1)].astype(np.float32), label_n, folds=fold_n)
    found, expected = (np.asarray(probe.held_out[:12], np.float64) for probe in (with_it, without))
    if classes == 3:  # a number that is added to all logits means nothing
        found, expected = found - found.mean(-1, keepdims=True), expected - expected.mean(-1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)  # measured: 7e-8; 7 to 1e17 if it is
    assert float(with_it.fold_scores[0]) == pytest.approx(float(without.fold_scores[0]), abs=1e-6)


def test_leading_axes_and_dicts_are_kept():
    x_LnD, label_n = layers(n=120)
    flat = linear_probe(x_LnD, label_n)
    grid = linear_probe(x_LnD.reshape(2, 2, 120, 5), label_n)
    named = linear_probe({f"h{i}/resid_post": jnp.asarray(x) for i, x in enumerate(x_LnD)}, label_n)
    assert named.names == ("h0/resid_post", "h1/resid_post", "h2/resid_post", "h3/resid_post")
    one = linear_probe(x_LnD[2], label_n)
    assert one.scores.shape == ()
    for found in (grid.scores.reshape(-1), named.scores, linear_probe(x_LnD, label_n == 1).scores):
        np.testing.assert_array_equal(found, flat.scores)
    np.testing.assert_allclose(one.weights, flat.weights[2], rtol=1e-6)
    np.testing.assert_allclose(grid.weights[1, 0], flat.weights[2], rtol=1e-6)


def test_groups_are_never_divided():
    """Each text has a random label and one activation for all of its tokens: a probe can only learn texts by heart."""
    rng = np.random.default_rng(0)
    group_n = np.repeat(np.arange(40), rng.integers(1, 9, 40))
    label_n, x_nD = rng.integers(0, 2, 40)[group_n], rng.normal(size=(40, 60))[group_n]
    assert linear_probe(x_nD, label_n, l2=1e-3).scores > 0.9
    found = linear_probe(x_nD, label_n, l2=1e-3, groups=group_n)
    assert abs(found.scores - 0.5) < 0.15
    for group in range(40):
        assert len(set(found.folds[group_n == group].tolist())) == 1
    sizes = np.bincount(found.folds)
    assert len(sizes) == 5
    assert np.ptp(sizes) <= 3


def test_folds_have_equal_shares_of_each_class_and_follow_the_seed():
    label_n = np.repeat([7, -2, 3], [50, 25, 10])
    x_nD = np.random.default_rng(0).normal(size=(85, 3))
    found = linear_probe(x_nD, label_n)
    assert found.classes == (-2, 3, 7)
    for label, count in ((7, 10), (-2, 5), (3, 2)):
        np.testing.assert_array_equal(np.bincount(found.folds[label_n == label]), count)
    np.testing.assert_allclose(found.chance, 50 / 85)
    np.testing.assert_array_equal(linear_probe(x_nD, label_n).folds, found.folds)
    assert (linear_probe(x_nD, label_n, seed=1).folds != found.folds).any()


def test_numbers_are_regressed():
    rng = np.random.default_rng(0)
    x_LnD = rng.normal(size=(2, 201, 4))
    y_n = x_LnD[1] @ [1.0, -2, 0, 3] + 7
    found = linear_probe(x_LnD, y_n, l2=1e-6)
    np.testing.assert_allclose(found.weights[1, :, 0], [1, -2, 0, 3], atol=1e-5)  # measured: 3e-8
    np.testing.assert_allclose(found.bias[1, 0], 7, atol=1e-5)
    assert found.fold_scores[1].min() > 0.999999
    assert found.scores[0] < 0.05
    assert found.classes is None
    assert found.chance == 0


def test_a_constant_channel_is_harmless():
    x_LnD, label_n = layers(n=120)
    wider = np.concatenate([x_LnD, np.full((4, 120, 1), 3.0, np.float32)], -1)
    found, plain = linear_probe(wider, label_n), linear_probe(x_LnD, label_n)
    np.testing.assert_allclose(found.weights[:, :-1], plain.weights, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.weights[:, -1], 0, atol=1e-6)


def test_too_few_steps_are_told(monkeypatch):
    x_LnD, label_n = layers(n=120)
    monkeypatch.setattr(probes, "NEWTON_STEPS", 2)
    probes._fit.clear_cache()
    assert not linear_probe(x_LnD, label_n).converged.any()
    probes._fit.clear_cache()


X, Y = np.zeros((6, 2)), np.array([0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activations": np.zeros(3)}, r"activations must be floats \[\.\.\., n, D\], not float64\[3\]"),
        ({"activations": np.zeros((6, 2), int)}, "activations must be floats"),
        ({"activations": np.full((6, 2), np.nan)}, "activations must be finite"),
        ({"activations": {"a": X, "b": X[:, :1]}}, r"must have one shape: they are \{'a': \[6, 2\], 'b': \[6, 1\]\}"),
        ({"labels": Y[:5]}, r"labels must be integers, bools or floats \[6\], not int64\[5\]"),
        ({"labels": list("abcdef")}, "labels must be integers"),
        ({"labels": Y * 0}, "all 6 labels are the same"),
        ({"labels": [0, 0, 0, 0, 0, np.inf]}, "labels must be finite"),
        ({"labels": [0, 0, 0, 0, 0, 1]}, r"all examples of class 1 are in fold \d: take fewer folds"),
        ({"labels": [0, 0, 0, 0, 0, 0.5], "folds": [0, 0, 0, 1, 1, 1]}, "the labels in fold 0 are all the same"),
        ({"folds": 1}, "folds must be a whole number, from 2 to 6, not 1"),
        ({"folds": [0] * 6}, "the number of folds must be a whole number, 2 or more, not 1"),
        ({"folds": [0, 1]}, r"folds must be a number of folds, or whole numbers \[6\]"),
        ({"folds": [0, 1] * 3, "groups": Y}, "pass either groups or the fold of each example"),
        ({"groups": Y}, "folds must be a whole number, from 2 to 2, not 3"),
        ({"groups": Y[:3]}, r"groups must be whole numbers \[6\]"),
        ({"l2": 0}, "l2 must be a number, above 0, not 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_probe(**({"activations": X, "labels": Y, "folds": 3} | arguments))


def test_it_is_not_traced():
    with pytest.raises(ValueError, match="linear_probe runs its own program in float64: call it outside of jit"):
        jax.jit(lambda x: linear_probe(x, Y).scores)(X)
