"""One picture of a run: the training loss of each step, and the validation losses with the best one marked.

A classifier's picture also has its accuracy and macro F1.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax import figures
from gpt2_jax.files import replacing_file
from gpt2_jax.training.records import read_records

# matplotlib is imported only when something is drawn: the rest of the package works without it.

RAW, SMOOTH, VALIDATION, SECOND = "#9cc4e4", "#0072b2", "#d55e00", "#009e73"
MOST_POINTS = 2000  # up to this many steps, each step is drawn; in longer runs, the range of every few steps
NO_ACCURACIES = np.zeros((0, 3))
SMOOTHED = 50  # a mean covers 1/50 of the steps


def plot_curve(metrics_jsonl: str | os.PathLike, png: str | os.PathLike) -> None:
    """Draw the losses in a metrics.jsonl file, and accuracies if there are any, into a PNG file, replaced in one step.

    Raises:
      FileNotFoundError: there is no such metrics file.
      ValueError: the metrics file is not in the format that `Report` writes.
    """
    figure = draw(*read_losses(metrics_jsonl), read_accuracies(metrics_jsonl))
    with replacing_file(Path(png)) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def read_losses(metrics_jsonl: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Return (step, training loss) and (step, validation loss), float64 [n, 2] each; null becomes NaN."""
    losses: dict[str, list[tuple[float, float]]] = {"loss": [], "val_loss": []}
    for record in read_records(metrics_jsonl):
        for name, points in losses.items():
            if name in record:
                points.append((record["step"], math.nan if record[name] is None else record[name]))
    train, validation = (np.array(points, np.float64).reshape(-1, 2) for points in losses.values())
    return train, validation


def read_accuracies(metrics_jsonl: str | os.PathLike) -> np.ndarray:
    """Return (step, validation accuracy, macro F1) of a classifier's run, float64 [n, 3]; else [0, 3]."""
    found = [[r["step"], r["accuracy"], r["macro_f1"]] for r in read_records(metrics_jsonl) if "accuracy" in r]
    return np.array(found, np.float64).reshape(-1, 3)


def draw(train: np.ndarray, validation: np.ndarray, accuracies: np.ndarray = NO_ACCURACIES) -> Any:
    """Return a matplotlib Figure of (step, loss) points, [n, 2] each; non-finite losses are gaps.

    With `accuracies`, [n, 3] from `read_accuracies`, losses are those of a classifier, and a second panel has these.
    """
    classifies = len(accuracies) > 0
    figure = figures.Figure(figsize=(9.6, 7.4 if classifies else 5.4), layout="constrained")
    panels = figure.subplots(2, sharex=True, height_ratios=(3, 2)) if classifies else [figure.subplots()]
    ax = panels[0]
    if classifies:
        _draw_accuracies(panels[1], accuracies)
    smooth = smoothed(train[:, 1])
    _draw_train(ax, train, smooth)
    _draw_validation(ax, validation, with_perplexity=not classifies)
    _limit(ax, train, smooth, validation)
    ax.set(title="Loss by optimizer step", ylabel=f"loss (nats a {'text' if classifies else 'token'})")
    panels[-1].set_xlabel("optimizer steps")
    _finish(ax)
    if not np.isfinite(np.concatenate([train[:, 1], validation[:, 1]])).any():
        ax.text(0.5, 0.5, "no loss is a finite number", ha="center", transform=ax.transAxes)
        return figure
    ax.legend(fontsize=9, frameon=False)
    if not classifies:
        _add_perplexity(ax)
    return figure


def _finish(ax: Any) -> None:
    from matplotlib.ticker import AutoLocator

    ax.xaxis.set_major_formatter("{x:,.0f}")
    locator = AutoLocator()
    locator.set_params(integer=True, min_n_ticks=1)
    ax.xaxis.set_major_locator(locator)
    ax.grid(alpha=0.25)
    ax.spines["top"].set_visible(False)


def _draw_accuracies(ax: Any, accuracies: np.ndarray) -> None:
    steps, accuracy, macro_f1 = accuracies.T
    ax.plot(steps, 100 * accuracy, color=VALIDATION, marker="o", markersize=4, label="validation accuracy")
    ax.plot(steps, 100 * macro_f1, color=SECOND, marker="s", markersize=3, linestyle="--", label="validation macro F1")
    ax.set(ylabel="per cent", ylim=(min(50.0, 100 * np.nanmin(accuracies[:, 1:]) - 2), 101))
    ax.legend(fontsize=9, frameon=False, loc="lower right")
    _finish(ax)


def smoothed(losses: np.ndarray) -> np.ndarray:
    """Return the mean of the finite losses around each step, float64 [n]; NaN where a step's own loss is not finite."""
    finite = np.isfinite(losses)
    sums = np.concatenate([[0], np.cumsum(np.where(finite, losses, 0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    place = np.arange(len(losses))
    # The range is symmetric, so it shrinks towards the ends. Otherwise the mean would lag behind a steep start.
    width = np.minimum(np.minimum(place, place[::-1]), _width(losses))
    first, end = place - width, place + width + 1
    means = (sums[end] - sums[first]) / np.maximum(counts[end] - counts[first], 1)
    return np.where(finite, means, np.nan)


def _width(losses: np.ndarray) -> int:
    """Return how many steps a mean covers on each side."""
    return len(losses) // SMOOTHED // 2


def _draw_train(ax: Any, train: np.ndarray, smooth: np.ndarray) -> None:
    steps, losses = train.T
    losses = np.where(np.isfinite(losses), losses, np.nan)
    n_mean = 2 * _width(losses) + 1
    colour = RAW if n_mean > 1 else SMOOTH
    size = -(-len(steps) // MOST_POINTS)
    if size > 1:  # draws every extreme with far fewer points
        starts = np.arange(0, len(steps), size)
        low, high = np.fmin.reduceat(losses, starts), np.fmax.reduceat(losses, starts)
        ax.fill_between(
            steps[starts], low, high, color=colour, linewidth=0.5, label=f"training, range of {size:,} steps"
        )
    elif len(steps):
        alone = {"marker": "o", "markersize": 4} if np.isfinite(losses).sum() < 3 else {}
        ax.plot(steps, losses, color=colour, linewidth=0.8, label="training, each step", **alone)
    if n_mean > 1:
        ax.plot(steps, smooth, color=SMOOTH, linewidth=1.6, label=f"training, mean of {n_mean:,} steps")


def _draw_validation(ax: Any, validation: np.ndarray, with_perplexity: bool) -> None:
    """Draw the validation losses, and label the best one."""
    points = validation[np.isfinite(validation[:, 1])]
    if not len(points):
        return
    ax.plot(*points.T, color=VALIDATION, marker="o", markersize=4, linewidth=1.4, label="validation")
    step, loss = points[points[:, 1].argmin()]
    perplexity = f" (perplexity {_perplexity(loss):.4g})" if with_perplexity else ""
    label = f"best: {loss:.3f} at step {step:,.0f}{perplexity}"
    ax.plot(step, loss, "*", color=VALIDATION, markeredgecolor="black", markersize=14, label=label, zorder=5)


def _perplexity(loss: Any) -> Any:
    return np.exp(np.clip(loss, -700, 700))


def _limit(ax: Any, train: np.ndarray, smooth: np.ndarray, validation: np.ndarray) -> None:
    """Set y limits that show all means, all validation losses and nearly all steps, but not every spike."""
    raw = train[np.isfinite(train[:, 1]), 1]
    ends = np.quantile(raw, [0.002, 0.998]) if len(raw) else []
    values = np.concatenate([smooth, validation[:, 1], ends])
    values = values[np.isfinite(values)]
    if len(values):
        low, high = values.min(), values.max()
        room = 0.06 * (high - low) or 0.05 * max(abs(high), 1)
        ax.set_ylim(low - room, high + room)


def _add_perplexity(ax: Any) -> None:
    """Add a perplexity scale, `e ** loss`, on the right, with round numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = ax.get_ylim()
    if not (math.isfinite(_perplexity(low)) and high < 30 and high > low):
        return
    right = ax.secondary_yaxis("right", functions=(_perplexity, lambda value: np.log(np.maximum(value, 1e-300))))
    right.set_ylabel("perplexity (e to the loss)")
    right.yaxis.set_major_locator(FixedLocator(_round_numbers(*_perplexity(np.array([low, high])))))
    right.yaxis.set_minor_locator(NullLocator())
    right.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:.4g}")
    )


def _round_numbers(low: float, high: float) -> list[float]:
    """Return about five numbers with few digits between two positive ones, spread evenly on a log scale."""
    scale = 10.0 ** math.floor(math.log10(high))
    for digits in ([1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7]):
        found = [d * 10.0**e for e in range(-3, 16) for d in digits if low <= d * 10.0**e <= high]
        if len(found) >= 4:
            return found
    for step in (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001):  # a small range: equal steps
        first = math.ceil(low / (step * scale))
        found = [n * step * scale for n in range(first, int(high / (step * scale)) + 1)]
        if len(found) >= 4:
            return found
    return [low, high]
