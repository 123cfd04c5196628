"""LEACE: covariances with the labels are 0, and no other affine map that reaches this changes the data less."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edited_weights import CONFIG, weights
from forward import some_tokens
from scipy.optimize import minimize

import gpt2_jax
from gpt2_jax import research
from gpt2_jax.research import erasure


def some_data(n=83, width=7, n_classes=3, seed=0):
    """Return correlated activations whose means depend on a class, and the classes."""
    rng = np.random.default_rng(seed)
    label_n = rng.integers(0, n_classes, n)
    x_nD = rng.normal(size=(n, width)) @ rng.normal(size=(width, width)) + 5 + rng.normal(size=(9, width))[label_n]
    return x_nD, label_n


def erased(x_nD, labels):
    with jax.enable_x64(True):
        return np.asarray(erasure.leace(x_nD, labels)(x_nD))


def class_means(x_nD, label_n):
    return np.stack([x_nD[label_n == label].mean(0) for label in np.unique(label_n)])


def test_the_classes_have_equal_means():
    x_nD, label_n = some_data()
    assert np.ptp(class_means(x_nD, label_n), axis=0).max() > 0.5
    new_nD = erased(x_nD, label_n)
    assert np.ptp(class_means(new_nD, label_n), axis=0).max() < 1e-13  # measured: 5e-15
    np.testing.assert_allclose(new_nD.mean(0), x_nD.mean(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(erased(x_nD.reshape(1, 83, 7), label_n.reshape(1, 83))[0], new_nD, rtol=0, atol=1e-12)


def test_no_linear_classifier_beats_a_constant_one():
    """The loss of logistic regression on the erased data is the entropy of the labels, at zero weights."""
    x_nD, label_n = some_data(n_classes=2)
    share = label_n.mean()
    entropy = -share * np.log(share) - (1 - share) * np.log(1 - share)

    def least_loss(x_nD):
        x_nD = (x_nD - x_nD.mean(0)) / x_nD.std(0)

        def loss(weights):
            logits = x_nD @ weights[1:] + weights[0]
            return np.mean(np.logaddexp(0, logits) - label_n * logits)

        return minimize(loss, np.zeros(1 + x_nD.shape[1]), method="BFGS").fun

    assert least_loss(x_nD) < entropy - 0.05
    assert abs(least_loss(erased(x_nD, label_n)) - entropy) < 1e-9  # measured: 9e-13


@pytest.mark.parametrize("labels", ["classes", "numbers"])
def test_no_affine_map_without_covariance_changes_the_data_less(labels):
    """Each row of the least-squares map solves its own equality-constrained problem, as one system of equations."""
    x_nD, label_n = some_data(n_classes=4)
    z_nZ = np.eye(4)[label_n]
    if labels == "numbers":
        z_nZ = np.stack([x_nD[:, 0] ** 2, np.sin(x_nD[:, 1]), x_nD[:, 2] - 3], 1)
    n, width = x_nD.shape
    a_nD, c_nZ = x_nD - x_nD.mean(0), (z_nZ - z_nZ.mean(0))
    constraints = (a_nD.T @ c_nZ / n)[:, : np.linalg.matrix_rank(c_nZ)]  # classes: without the last
    k = constraints.shape[1]
    system = np.block([[a_nD.T @ a_nD / n, constraints], [constraints.T, np.zeros((k, k))]])
    maps = [np.linalg.solve(system, np.r_[a_nD.T @ a_nD[:, i] / n, np.zeros(k)])[:width] for i in range(width)]
    expected = x_nD.mean(0) + a_nD @ np.stack(maps, 1)
    new_nD = erased(x_nD, label_n if labels == "classes" else z_nZ)
    np.testing.assert_allclose(new_nD, expected, rtol=0, atol=3e-13)  # measured: 9e-15
    assert np.abs((new_nD - new_nD.mean(0)).T @ c_nZ / n).max() < 1e-12  # measured: 3e-15
    projected = a_nD @ (np.eye(width) - np.linalg.pinv(constraints.T) @ constraints.T) + x_nD.mean(0)
    assert np.square(projected - x_nD).sum() > 1.05 * np.square(new_nD - x_nD).sum()  # an orthogonal projection


def test_erasing_twice_is_erasing_once_and_a_singular_covariance_stays_finite():
    x_nD, label_n = some_data()
    x_nD = np.concatenate([x_nD, x_nD[:, :2] @ np.array([[1.0, 2], [0, 3]]), np.full((83, 1), 4.0)], 1)
    with jax.enable_x64(True):
        eraser = erasure.leace(x_nD, label_n)
        once = np.asarray(eraser(x_nD))
        np.testing.assert_allclose(eraser(once), once, rtol=0, atol=1e-12)  # measured: 2e-14
        np.testing.assert_allclose(eraser.right_KD @ eraser.left_DK, np.eye(2), rtol=0, atol=1e-12)
    assert np.ptp(class_means(once, label_n), axis=0).max() < 1e-12
    np.testing.assert_allclose(once[:, -1], 4, rtol=0, atol=1e-12)


def test_chunks_do_not_show(monkeypatch):
    x_nD, label_n = some_data()
    whole = erased(x_nD, label_n)
    monkeypatch.setattr(erasure, "CHUNK", 7 * 10)
    np.testing.assert_allclose(erased(x_nD, label_n), whole, rtol=0, atol=1e-12)  # measured: 2e-14


def test_in_lower_precision():
    """Activations of GPT-2 have a few channels that are a hundred times as wide as the others."""
    x_nD, label_n = some_data(n=301, width=23)
    x_nD[:, 5] *= 100
    expected = erased(x_nD.astype(np.float32).astype(np.float64), label_n)
    eraser = erasure.leace(jnp.asarray(x_nD, jnp.float32), label_n)
    assert eraser.left_DK.dtype == jnp.float32
    spread = x_nD.std(0)
    new_nD = eraser(x_nD.astype(np.float32))
    assert (np.abs(new_nD - expected) / spread).max() < 1e-5  # measured: 8e-7
    assert (np.ptp(class_means(np.asarray(new_nD), label_n), axis=0) / spread).max() < 5e-6  # measured: 4e-7
    assert eraser(jnp.asarray(x_nD, jnp.bfloat16)).dtype == jnp.bfloat16


def test_an_eraser_is_a_tap_and_a_pytree():
    """In the model, the erased stream of the fitted tokens has equal class means, and later layers read it."""
    params, tokens_BT = weights(kind=jnp.asarray), some_tokens(CONFIG, 5, 13)
    label_BT = tokens_BT % 3
    _, plain = research.forward(CONFIG, params, tokens_BT, capture="h1/resid_post")
    eraser = erasure.leace(plain["h1/resid_post"], label_BT)
    seen = {}

    def keep(value, position_BT):
        seen["h1"] = eraser(value, position_BT)
        return seen["h1"]

    model = gpt2_jax.GPT2(CONFIG)
    kept = model.apply({"params": params}, tokens_BT, taps={"h1/resid_post": keep}).logits
    run = jax.jit(lambda eraser: model.apply({"params": params}, tokens_BT, taps={"h1/resid_post": eraser}).logits)
    np.testing.assert_allclose(run(eraser), kept, rtol=0, atol=1e-5)
    new = np.asarray(seen["h1"]).reshape(-1, CONFIG.n_embd)
    assert np.ptp(class_means(new, label_BT.reshape(-1)), axis=0).max() < 2e-6  # measured: 4e-7
    out, _ = research.forward(CONFIG, params, tokens_BT)
    assert np.abs(out.logits - kept).max() > 0.01


@pytest.mark.parametrize(
    ("activations", "labels", "message"),
    [
        (np.zeros((3, 2)), [0, 1], r"labels must be \[3\] like the activations, not \[2\]"),
        (np.zeros((3, 2)), [[0], [1], [1]], r"labels must be \[3\]"),
        (np.zeros((3, 2)), ["a", "b", "c"], "labels must be integers, bools or floats"),
        (np.zeros((3, 2)), [1, 1, 1], "the labels of 3 examples are all the same"),
        (np.zeros((0, 2)), np.zeros(0), "the labels of 0 examples"),
        (np.zeros((3, 2)), [1, np.nan, 1], "labels must be finite"),
        (np.full((3, 2), np.inf), [1, 0, 1], "activations must be finite"),
        (np.zeros((3, 2), int), [1, 0, 1], r"activations must be floats \[\.\.\., D\], not int64\[3, 2\]"),
        (np.zeros(3), [1, 0, 1], "activations must be floats"),
    ],
)
def test_bad_arguments_are_refused(activations, labels, message):
    with pytest.raises(ValueError, match=message):
        erasure.leace(activations, labels)


def test_activations_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"the eraser takes activations \[\.\.\., 7\], not \[3, 6\]"):
        erasure.leace(*some_data())(np.zeros((3, 6)))


def test_labels_that_activations_do_not_tell_erase_nothing():
    """The covariance is 0: the eraser has rank 0."""
    x_nD, label_n = np.array([[1.0, 0], [-1, 0], [1, 2], [-1, 2]]), np.array([0, 0, 1, 1])
    np.testing.assert_allclose(erased(x_nD, label_n), [[1, 1], [-1, 1], [1, 1], [-1, 1]], atol=1e-12)
    np.testing.assert_array_equal(erased(x_nD, np.array([0, 1, 1, 0])), x_nD)
