"""The metrics of labels are those of scikit-learn, and the picture has every number."""

import numpy as np
import pytest

from gpt2_jax import figures
from gpt2_jax.evaluate.label_metrics import confusion, draw_confusions, label_metrics, summary


@pytest.mark.parametrize("n_labels", [2, 3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_metrics_are_those_of_scikit_learn(n_labels, seed):
    """Also with labels that no text has, or that no text got. Measured: equal to the last bit or two."""
    sk = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    true, got = rng.integers(0, n_labels - seed % 2, 23), rng.integers(seed % 2, n_labels, 23)
    names = [f"label {i}" for i in range(n_labels)]
    found = label_metrics(confusion(true, got, n_labels), names)
    assert found["confusion"] == sk.confusion_matrix(true, got, labels=range(n_labels)).tolist()
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(true, got), rel=1e-12)
    assert found["macro_f1"] == pytest.approx(sk.f1_score(true, got, average="macro"), rel=1e-12)
    columns = sk.precision_recall_fscore_support(true, got, labels=range(n_labels), zero_division=0)
    for i, name in enumerate(names):
        expected = dict(zip(("precision", "recall", "f1", "examples"), (column[i] for column in columns), strict=True))
        assert found["by_label"][name] == pytest.approx(expected, rel=1e-12)


def test_metrics_by_hand():
    """Of 4 ham, 3 are found; of 2 spam, 1. No text has or got the third label, so it does not count in macro F1."""
    found = label_metrics(confusion([0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0], 3), ["ham", "spam", "news"])
    assert found["confusion"] == [[3, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert found["by_label"]["ham"] == {"precision": 0.75, "recall": 0.75, "f1": 0.75, "examples": 4}
    assert found["by_label"]["news"] == {"precision": 0, "recall": 0, "f1": 0, "examples": 0}
    assert found["macro_f1"] == 0.625
    assert summary(found) == "accuracy 66.7 %, macro F1 0.625"
    assert summary(label_metrics(np.zeros((2, 2)), ["a", "b"])) == "no examples"


@pytest.mark.parametrize("n_labels", [2, 8, 20])
def test_the_picture_has_each_count_and_each_name_inside_it(tmp_path, n_labels):
    rng = np.random.default_rng(1)
    names = [f"label {i} $x" for i in range(n_labels - 1)] + ["a very long name of a label " * 3]
    splits = (f"{split}\naccuracy 99.9 %, macro F1 0.123" for split in ("train", "val", "test"))
    matrices = {split: rng.integers(0, 2000, (n_labels, n_labels)) for split in splits}
    figure = draw_confusions(matrices, names)
    figures.save(figure, tmp_path / "confusion.png")
    for axes, matrix in zip(figure.axes, matrices.values(), strict=True):
        shown = [text.get_text().split("\n")[0] for text in axes.texts]
        assert sorted(shown) == sorted(f"{count:,}" for count in matrix.ravel() if count or n_labels <= 8)
        (image,) = axes.images
        np.testing.assert_allclose(image.get_array(), matrix / matrix.sum(1, keepdims=True))
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    for axes in figure.axes:
        for label in (*axes.get_xticklabels(), *axes.get_yticklabels(), axes.title):
            box = label.get_window_extent()
            assert 0 <= box.x0 <= box.x1 <= width, label
            assert 0 <= box.y0 <= box.y1 <= height, label
