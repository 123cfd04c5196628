"""The inspector's picture: it draws the values of the arrays, labels everything, and writes a whole file or none."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import tiny_models
from matplotlib.figure import Figure

import gpt2_jax
from gpt2_jax.inspection import plot

CONFIG = tiny_models.CONFIG
KINDS = ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")
POSITIONAL = "Similarity of positions"


@pytest.fixture
def params():
    return tiny_models.random_params(CONFIG, 13)


def panel(figure, title: str):
    """Return the axes whose title begins with this text."""
    (found,) = [ax for ax in figure.axes if ax.get_title().startswith(title)]
    return found


def line(ax, label: str) -> np.ndarray:
    """Return the heights of the line with this label in the legend."""
    (found,) = [found for found in ax.get_lines() if found.get_label() == label]
    return np.asarray(found.get_ydata(), np.float64)


def weights(params, kind: str) -> list[np.ndarray]:
    """Return the arrays of a kind in float64, one for each layer."""
    if kind in params:
        return [np.asarray(params[kind], np.float64)]
    module, dense = kind.split("/")
    return [np.asarray(params[f"h{i}"][module][dense]["w"], np.float64) for i in range(CONFIG.n_layer)]


def rms(array) -> float:
    return np.linalg.norm(array) / np.sqrt(array.size)


def test_everything_is_labelled(params):
    """All six panels have a title and named axes. The color bar has a name, and several lines have a legend."""
    figure = plot.draw(CONFIG, params)
    assert len(figure.axes) == 6
    for ax in figure.axes:
        assert ax.get_title()
        assert ax.get_xlabel()
        assert ax.get_ylabel()
        assert ax.get_legend() or len(ax.get_lines()) <= 1
    (bar,) = panel(figure, POSITIONAL).child_axes
    assert "cosine" in bar.get_ylabel()
    assert f"{CONFIG.n_params:,} parameters" in figure.get_suptitle()


@pytest.mark.parametrize("kind", [*KINDS, "wte", "wpe"])
def test_distributions(params, kind):
    """Shares of all values of a kind on a log scale. An empty bin is a gap. The legend gives the root mean square."""
    ax = panel(plot.draw(CONFIG, params), "Distribution")
    (drawn,) = [patch for patch in ax.patches if patch.get_label().startswith(f"{kind}, ")]
    values = np.concatenate([array.ravel() for array in weights(params, kind)])
    shares = np.histogram(values, drawn.get_data().edges)[0] / values.size
    np.testing.assert_allclose(drawn.get_data().values, np.where(shares, shares, np.nan), rtol=1e-12)
    assert shares.sum() == pytest.approx(1)
    assert drawn.get_label() == f"{kind}, RMS {rms(values):.3f}"
    assert ax.get_yscale() == "log"


def test_a_value_far_away_does_not_flatten_the_distributions(params):
    """The axis ends at ten root mean squares, and the legend counts the values outside."""
    params["wte"] = params["wte"].at[3, 5].set(1000).at[4, 5].set(-1000)
    ax = panel(plot.draw(CONFIG, params), "Distribution")
    wte = np.asarray(params["wte"], np.float64)
    (drawn,) = [patch for patch in ax.patches if patch.get_label().startswith("wte, ")]
    assert drawn.get_label().endswith("2 outside")
    assert drawn.get_data().edges[[0, -1]] == pytest.approx([-10 * rms(wte), 10 * rms(wte)])
    assert np.nansum(drawn.get_data().values) == pytest.approx(1 - 2 / wte.size)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_by_layer(params, kind):
    ax = panel(plot.draw(CONFIG, params), "Size of the weights")
    assert line(ax, f"{kind}/w") == pytest.approx([rms(array) for array in weights(params, kind)], rel=1e-12)
    assert ax.get_ylim()[0] == 0


def test_gains(params):
    """The median of each norm's gain by layer, the band with 80 % of the channels, and ln_f after the last layer."""
    ax = panel(plot.draw(CONFIG, params), "LayerNorm gains")
    gains = {
        norm: np.array([np.asarray(params[f"h{i}"][norm]["g"], np.float64) for i in range(CONFIG.n_layer)])
        for norm in ("ln_1", "ln_2")
    }
    for norm, band in zip(gains, ax.collections, strict=False):
        assert line(ax, f"{norm}/g") == pytest.approx(np.median(gains[norm], axis=1), rel=1e-12)
        edges = {tuple(point) for point in band.get_paths()[0].vertices.round(9)}
        for i, gain in enumerate(gains[norm]):
            assert {(i, edge) for edge in np.quantile(gain, [0.1, 0.9]).round(9)} <= edges
    (last,) = ax.containers
    point, _, (bar,) = last.lines
    final = np.asarray(params["ln_f"]["g"], np.float64)
    assert point.get_xydata().tolist() == [[CONFIG.n_layer, pytest.approx(np.median(final))]]
    assert bar.get_segments()[0][:, 1] == pytest.approx(np.quantile(final, [0.1, 0.9]))


@pytest.mark.parametrize(("n_ctx", "step"), [(41, 1), (256, 1), (257, 2), (521, 3)])
def test_similarity_of_positions(n_ctx, step):
    """Cosines between rows of all positions, or of every n-th, at the positions that the axes show."""
    config = CONFIG.replace(n_ctx=n_ctx)
    params = tiny_models.random_params(config, 17)
    ax = panel(plot.draw(config, params), POSITIONAL)
    (image,) = ax.images
    rows = np.asarray(params["wpe"], np.float64)[::step]
    cosines = [[a @ b / np.sqrt((a @ a) * (b @ b)) for b in rows] for a in rows]
    np.testing.assert_allclose(image.get_array(), cosines, atol=1e-12)
    assert (image.get_clim(), image.origin) == ((-1, 1), "lower")
    left, right, bottom, top = image.get_extent()
    assert (left, right) == (bottom, top) == (-step / 2, (len(rows) - 1) * step + step / 2)
    assert ("one in" in ax.get_xlabel()) == (step > 1)


def test_sizes_of_embedded_rows(params):
    """The norm of every position and of every token, and medians over consecutive ids."""
    config = CONFIG.replace(n_vocab=307)
    params = tiny_models.random_params(config, 19)
    figure = plot.draw(config, params)
    (positions,) = panel(figure, "Position embeddings").get_lines()
    assert positions.get_ydata() == pytest.approx(np.linalg.norm(np.asarray(params["wpe"], np.float64), axis=1))
    norms = np.linalg.norm(np.asarray(params["wte"], np.float64), axis=1)
    ax = panel(figure, "Token embeddings")
    assert line(ax, "a token") == pytest.approx(norms)
    middles = [np.median(norms[:4]), np.median(norms[4:8])]  # 307 ids in 100 groups: seven of 4, the others of 3
    assert line(ax, "median of 4 ids")[:2] == pytest.approx(middles)
    assert line(ax, "median of 4 ids")[-1] == pytest.approx(np.median(norms[-3:]))


def test_models_that_are_hard_to_draw(params, tmp_path):
    """Some NaN values, a tensor of only inf or NaN, all zeros, one layer, bfloat16: a picture without a warning."""
    params["wpe"] = params["wpe"].at[3].set(jnp.nan)
    params["h0"]["mlp"]["c_fc"]["w"] = jnp.full((12, 48), jnp.inf)
    params["h1"]["ln_2"]["g"] = jnp.full(12, jnp.nan)
    figure = plot.draw(CONFIG, params)
    sizes = line(panel(figure, "Size of the weights"), "mlp/c_fc/w")
    assert np.isnan(sizes[0])
    assert sizes[1] == pytest.approx(rms(weights(params, "mlp/c_fc")[1]))
    plot.plot(CONFIG, params, tmp_path / "nan.png")
    one = CONFIG.replace(n_layer=1, n_ctx=1, n_vocab=1, param_dtype="bfloat16")
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), gpt2_jax.abstract_params(one))
    plot.plot(one, zeros, tmp_path / "zeros.png")
    plot.plot(one, tiny_models.random_params(one, 23), tmp_path / "one.png")


# ---- the file


def test_a_png_worth_looking_at(params, tmp_path):
    """The picture has a readable size and is not blank. Nothing else is left in the folder."""
    plot.plot(CONFIG, params, tmp_path / "weights.PNG")
    image = matplotlib.image.imread(tmp_path / "weights.PNG", "png")
    height, width, _ = image.shape
    assert 700 < height < width < 4000
    inked = (image[..., :3] != 1).any(-1)
    for rows in np.array_split(inked, 2):
        for tile in np.array_split(rows, 3, axis=1):
            assert 0.01 < tile.mean() < 0.9
    assert [path.name for path in tmp_path.iterdir()] == ["weights.PNG"]


@pytest.mark.parametrize(("name", "start"), [("a.svg", b"<?xml"), ("b.pdf", b"%PDF-")])
def test_other_formats_by_extension(params, tmp_path, name, start):
    plot.plot(CONFIG, params, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_a_failure_leaves_the_old_picture(params, tmp_path, monkeypatch):
    """A partly written picture never has the final name."""
    path = tmp_path / "weights.png"
    path.write_bytes(b"old")

    def fail(self, target, **options):
        target.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space left"):
        plot.plot(CONFIG, params, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["weights.gif", "weights", "png", ".png", "weights.png.txt"])
def test_other_extensions_are_refused(params, tmp_path, name):
    with pytest.raises(ValueError, match=r"\.png, \.svg, \.pdf"):
        plot.plot(CONFIG, params, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_none_is_refused(params, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        plot.plot(CONFIG, params, tmp_path / "nowhere" / "weights.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        plot.plot(CONFIG, params, tmp_path / "folder.png")


def test_the_users_own_figures_are_left_alone():
    """pyplot is not imported: its state is global, and it may need a screen."""
    code = (
        "import sys, tiny_models; from gpt2_jax.inspection import plot;"
        "plot.draw(tiny_models.CONFIG, tiny_models.random_params(tiny_models.CONFIG, 1));"
        "print('matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    here = Path(__file__).parents[1] / "support"
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
