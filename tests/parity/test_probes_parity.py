"""Linear probes equal scikit-learn's LogisticRegression and Ridge: weights, and scores on the same folds."""

import jax
import numpy as np
import pytest

from gpt2_jax.research.probes import linear_probe

sklearn = pytest.importorskip("sklearn")
from sklearn.linear_model import LogisticRegression, Ridge  # noqa: E402
from sklearn.model_selection import PredefinedSplit, cross_val_predict, cross_val_score  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402


def some_data(n_classes, n, width, seed=0):
    """Return activations of two layers with channels of very different widths, and labels."""
    rng = np.random.default_rng(seed)
    x_LnD = rng.normal(size=(2, n, width)) * np.exp(2 * rng.normal(size=width)) + 5
    if not n_classes:
        return x_LnD, x_LnD[0] @ rng.normal(size=width) + rng.normal(size=n)
    y_n = rng.integers(0, n_classes, n)
    return x_LnD + rng.normal(size=(n_classes, width))[y_n], y_n * 3 - 1


def level(logits_nK):
    """Return logits minus their mean, if there is one of each class: softmax does not determine the mean."""
    return logits_nK - logits_nK.mean(-1, keepdims=True) if logits_nK.shape[-1] > 1 else logits_nK


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize(("n_classes", "n", "width"), [(2, 83, 7), (4, 97, 11), (2, 41, 53), (0, 83, 7), (0, 41, 53)])
def test_weights_and_scores(n_classes, n, width, standardize):
    """n < D is separable. The tolerances of their solvers are set so that they go on to the end."""
    l2, fold_n = 0.3, np.random.default_rng(1).permutation(n) % 3
    x_LnD, y_n = some_data(n_classes, n, width)
    with jax.enable_x64(True):
        found = linear_probe(x_LnD, y_n, l2=l2, standardize=standardize, folds=fold_n)
    found = jax.tree.map(np.asarray, found)
    assert found.converged.all()
    their = LogisticRegression(C=1 / l2, tol=1e-13, max_iter=10_000, solver="newton-cholesky")
    model = make_pipeline(*[StandardScaler()] * standardize, their if n_classes else Ridge(alpha=l2))
    for layer, x_nD in enumerate(x_LnD):
        model.fit(x_nD, y_n)
        scale_D = model[0].scale_ if standardize else 1
        expected = np.atleast_2d(model[-1].coef_) / scale_D
        assert np.abs(found.weights[layer].T - expected).max() < 1e-9 * np.abs(expected).max()  # measured: 4e-11
        ours = x_nD @ found.weights[layer] + found.bias[layer]
        theirs = (model.decision_function if n_classes else model.predict)(x_nD).reshape(n, -1)
        assert np.abs(level(ours) - level(theirs)).max() < 1e-8 * np.abs(theirs).max()  # measured: 2e-11
        split = PredefinedSplit(fold_n)
        np.testing.assert_allclose(found.fold_scores[layer], cross_val_score(model, x_nD, y_n, cv=split), atol=1e-9)
        method = "decision_function" if n_classes else "predict"
        theirs = cross_val_predict(model, x_nD, y_n, cv=split, method=method).reshape(n, -1)
        assert (
            np.abs(level(found.held_out[layer]) - level(theirs)).max() < 1e-8 * np.abs(theirs).max()
        )  # measured: 2e-10
    np.testing.assert_allclose(found.scores, found.fold_scores.mean(-1))


def test_activations_in_float32_are_fitted_in_float64():
    x_LnD, y_n = some_data(2, 41, 53)
    found = np.asarray(linear_probe(x_LnD.astype(np.float32), y_n, l2=0.01).weights)
    assert found.dtype == np.float32
    model = LogisticRegression(C=100, tol=1e-13, max_iter=10_000, solver="newton-cholesky")
    model.fit(StandardScaler().fit_transform(x_LnD[1].astype(np.float32).astype(np.float64)), y_n)
    expected = model.coef_[0] / x_LnD[1].astype(np.float32).std(0, dtype=np.float64)
    assert np.abs(found[1, :, 0] - expected).max() < 3e-7 * np.abs(expected).max()  # measured: 4e-8
