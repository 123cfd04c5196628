"""How well a classifier finds the labels of texts: accuracy, precision, recall, F1, and the confusion matrix.

Shape letter: L labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpt2_jax import figures

CELL = 0.55, 0.38  # inches of a cell of the picture, with shares and without
WITH_SHARES = 8  # most labels with which a cell also has its share of the row
LARGEST = 9.0  # inches of a matrix with many labels


def confusion(labels: Any, predicted: Any, n_labels: int) -> np.ndarray:
    """Return how many texts of each label (rows) got each label (columns), int64 [L, L], from numbers of labels [n]."""
    found_LL = np.zeros((n_labels, n_labels), np.int64)
    np.add.at(found_LL, (np.asarray(labels, int), np.asarray(predicted, int)), 1)
    return found_LL


def label_metrics(confusion_LL: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return the metrics of a confusion matrix as plain data, as scikit-learn defines them.

    Args:
      confusion_LL: from `confusion`: rows are the true labels.
      names: the names of the labels.

    Returns:
      examples: the number of texts; accuracy: the share that got their label; macro_f1: the mean of the labels' F1,
      without labels that no text has or got; by_label: {name: {"precision", "recall", "f1", "examples"}}; confusion: a
      list of rows. precision is the share of the texts with this label among those that got it, recall the share that
      got it among those with this label, and f1 their harmonic mean. A share of nothing is 0; accuracy and macro_f1 of
      nothing are None.
    """
    confusion_LL = np.asarray(confusion_LL)
    hits_L, got_L, true_L = np.diagonal(confusion_LL), confusion_LL.sum(0), confusion_LL.sum(1)
    precision_L, recall_L = hits_L / np.maximum(got_L, 1), hits_L / np.maximum(true_L, 1)
    f1_L = 2 * hits_L / np.maximum(got_L + true_L, 1)
    there_L, n = got_L + true_L > 0, int(confusion_LL.sum())
    by_label = {
        name: {"precision": float(p), "recall": float(r), "f1": float(f1), "examples": int(count)}
        for name, p, r, f1, count in zip(names, precision_L, recall_L, f1_L, true_L, strict=True)
    }
    return {
        "examples": n,
        "accuracy": float(hits_L.sum() / n) if n else None,
        "macro_f1": float(f1_L[there_L].mean()) if n else None,
        "by_label": by_label,
        "confusion": confusion_LL.tolist(),
    }


def summary(metrics: Mapping[str, Any]) -> str:
    """Return "accuracy 93.1 %, macro F1 0.921" of a result of `label_metrics`."""
    if not metrics["examples"]:
        return "no examples"
    return f"accuracy {100 * metrics['accuracy']:.1f} %, macro F1 {metrics['macro_f1']:.3f}"


def draw_confusions(found: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Return a matplotlib Figure of confusion matrices, one for each title. Cells have counts and shares of their rows.

    Args:
      found: {title: confusion matrix [L, L]}.
      names: the names of the labels.
    """
    n = len(names)
    side = min(max(CELL[n > WITH_SHARES] * n, 2.4), LARGEST)
    longest = max(map(len, names))
    width = side + 0.8 + 0.07 * min(longest, 30)
    size = (width * len(found), side + 1.2 + 0.07 * min(longest, 30))
    figure = figures.Figure(figsize=size, layout="constrained")
    for axes, (title, matrix) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        _draw(axes, title, np.asarray(matrix), names)
    return figure


def _draw(axes: Any, title: str, confusion_LL: np.ndarray, names: Sequence[str]) -> None:
    share_LL = confusion_LL / np.maximum(confusion_LL.sum(1, keepdims=True), 1)
    axes.imshow(share_LL, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    shown = [name if len(name) <= 30 else f"{name[:29]}…" for name in names]
    with_shares = len(names) <= WITH_SHARES
    places, small = range(len(names)), 9 if with_shares else 6.5
    axes.set_xticks(places, shown, rotation=90 if len(names) > 3 else 0, fontsize=small, parse_math=False)
    axes.set_yticks(places, shown, fontsize=small, parse_math=False)
    axes.set(xlabel="label found", ylabel="true label")
    axes.set_title(title, fontsize=10)
    for true in places:
        for got in places:
            colour = "white" if share_LL[true, got] > 0.5 else "black"
            count = f"{confusion_LL[true, got]:,}"
            text = f"{count}\n{share_LL[true, got]:.1%}" if with_shares else count
            if confusion_LL[true, got] or with_shares:
                axes.text(got, true, text, ha="center", va="center", fontsize=small, color=colour)
