"""The loss curve: the drawn points equal the file, everything is labeled, and the picture is complete or absent."""

import json
import math
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import matplotlib.image
import numpy as np
import pytest

from gpt2_jax.training import curve

NO_POINTS = np.zeros((0, 2))


def line(ax, label):
    """The points of the line whose label begins with `label`."""
    (found,) = [found for found in ax.get_lines() if found.get_label().startswith(label)]
    return found.get_xydata()


def points(*losses, every=1):
    return np.array([(every * (i + 1), loss) for i, loss in enumerate(losses)], np.float64).reshape(-1, 2)


def write(path, train, validation):
    lines = [{"step": int(s), "loss": None if math.isnan(v) else v} for s, v in train]
    lines += [{"step": int(s), "val_loss": v, "perplexity": math.exp(v), "best": True} for s, v in validation]
    path.write_text("".join(json.dumps(record) + "\n" for record in lines) + '{"step": 99, "lo')


def test_what_is_drawn_is_the_file(tmp_path):
    """Every step in a light color, the mean in a dark color, and validation losses, with the best one labeled."""
    rng = np.random.default_rng(3)
    train = points(*rng.normal(3, 0.1, 211))
    train[17, 1] = np.nan
    validation = points(3.5, 3.25, 3.75, every=70)
    write(tmp_path / "metrics.jsonl", train, validation)
    figure = curve.draw(*curve.read_losses(tmp_path / "metrics.jsonl"))
    ax = figure.axes[0]
    np.testing.assert_array_equal(line(ax, "training, each step"), train)
    mean = line(ax, "training, mean of 5 steps")
    assert mean[100, 1] == pytest.approx(train[98:103, 1].mean(), rel=1e-12)
    assert mean[18, 1] == pytest.approx(train[[16, 18, 19, 20], 1].mean(), rel=1e-12)  # without the NaN
    assert np.isnan(mean[17, 1])
    assert mean[[0, -1], 1] == pytest.approx(train[[0, -1], 1], rel=1e-12)
    np.testing.assert_array_equal(line(ax, "validation"), validation)
    assert line(ax, "best: 3.250 at step 140 (perplexity 25.79)").tolist() == [[140, 3.25]]


def test_everything_is_labelled():
    """Both axes with their units, a legend, and perplexity on the right, with round numbers."""
    figure = curve.draw(points(*np.linspace(7, 3, 50)), points(5.0, 3.1, every=25))
    ax = figure.axes[0]
    assert ax.get_xlabel() == "optimizer steps"
    assert ax.get_ylabel() == "loss (nats a token)"
    assert ax.get_legend() is not None
    (right,) = ax.child_axes
    assert right.get_ylabel().startswith("perplexity")
    assert set(right.get_yticks()) >= {30, 100, 300, 1000}


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        (NO_POINTS, NO_POINTS),
        (points(3.5), NO_POINTS),
        (points(3.5), points(3.25)),
        (NO_POINTS, points(3.25, 3.5)),
        (points(math.nan, math.nan), NO_POINTS),
        (points(math.nan, 3.5, math.inf, 3.25), points(math.nan, 3.5)),
        (points(0.0, 0.0, 0.0), points(0.0)),
        (points(1e30, 1e-30), points(700.0)),
    ],
)
def test_little_or_strange_is_drawn_too(tmp_path, train, validation):
    """There is always a picture, and no warning; a single point is visible."""
    figure = curve.draw(train, validation)
    figure.savefig(tmp_path / "loss.png")
    assert matplotlib.image.imread(tmp_path / "loss.png").shape[2] == 4
    finite = np.isfinite(train[:, 1]).sum()
    if finite == 1:
        assert line(figure.axes[0], "training, each step").shape == train.shape
        assert figure.axes[0].get_lines()[0].get_marker() == "o"
    if not finite and not len(validation):
        assert figure.axes[0].texts[0].get_text() == "no loss is a finite number"


@hypothesis.given(low=st.floats(-1, 12), range_=st.floats(0.01, 12))
@hypothesis.settings(max_examples=60)
def test_perplexity_has_a_few_round_numbers(low, range_):
    """For any range of the scale there are a few numbers inside it."""
    ends = math.exp(low), math.exp(low + range_)
    found = curve._round_numbers(*ends)
    assert 2 <= len(found) <= 20
    assert all(ends[0] <= n * (1 + 1e-9) and n <= ends[1] * (1 + 1e-9) for n in found)


def test_a_spike_does_not_flatten_the_curve():
    losses = np.full(1000, 3.0) + np.sin(np.arange(1000))
    losses[500] = 1e6
    ax = curve.draw(points(*losses), points(3.5, every=700)).axes[0]
    low, high = ax.get_ylim()
    assert low < 2
    assert 4 < high < 1e5


def test_a_long_run_is_drawn_as_a_range():
    """Many steps are drawn as the range of a few steps each. Its highest and lowest values are losses of steps."""
    losses = np.random.default_rng(5).normal(3, 0.1, 6007)
    ax = curve.draw(points(*losses), NO_POINTS).axes[0]
    (band,) = ax.collections
    assert band.get_label() == "training, range of 4 steps"
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.max() == losses.max()
    assert heights.min() == losses.min()
    assert len(heights) < 4 * curve.MOST_POINTS


def test_the_file_is_replaced_or_as_it_was(tmp_path, monkeypatch):
    """The old picture stays until the new one is complete; no other file is left in the folder."""
    png, metrics = tmp_path / "loss.png", tmp_path / "metrics.jsonl"
    png.write_bytes(b"the old picture")
    write(metrics, points(3.5, 3.25), points(3.4))

    def fail(figure, path, **options):
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", fail)
        with pytest.raises(OSError, match="the disk is full"):
            curve.plot_curve(metrics, png)
    assert png.read_bytes() == b"the old picture"
    curve.plot_curve(metrics, png)
    assert matplotlib.image.imread(png).std() > 0.05
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        curve.plot_curve(tmp_path / "none.jsonl", tmp_path / "loss.png")
    (tmp_path / "metrics.jsonl").write_text("step 1\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1 is not a JSON object"):
        curve.plot_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_no_state_of_pyplot(tmp_path):
    """pyplot is not imported, so drawing works in a thread and does not affect a user's own figures."""
    write(tmp_path / "metrics.jsonl", points(3.5, 3.25), points(3.4))
    code = (
        "import sys; from gpt2_jax.training.curve import plot_curve; assert 'matplotlib' not in sys.modules;"
        "plot_curve('metrics.jsonl', 'loss.png'); print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_classifier_has_its_accuracy_in_place_of_perplexity(tmp_path):
    lines = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.5}]
    lines += [{"step": s, "val_loss": 0.6 / s, "accuracy": 0.4 * s, "macro_f1": 0.3 * s, "best": True} for s in (1, 2)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in lines))
    curve.plot_curve(path, tmp_path / "loss.png")
    figure = curve.draw(*curve.read_losses(path), curve.read_accuracies(path))
    loss, accuracy = figure.axes
    assert loss.get_ylabel() == "loss (nats a text)"
    assert not loss.child_axes
    assert line(loss, "best: 0.300 at step 2").tolist() == [[2, 0.3]]
    np.testing.assert_allclose(line(accuracy, "validation accuracy"), [[1, 40], [2, 80]])
    np.testing.assert_allclose(line(accuracy, "validation macro F1"), [[1, 30], [2, 60]])
    low, high = accuracy.get_ylim()
    assert low < 30
    assert high > 100
