"""Every picture is a figure that a notebook can show; matplotlib waits until one is drawn."""

import io
import pickle
import subprocess
import sys

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
import tiny_models

from gpt2_jax import figures
from gpt2_jax.inspection import plot
from gpt2_jax.research import logit_lens, pictures
from gpt2_jax.training import curve

DRAWN = {
    "heat_map": lambda: pictures.heat_map([[0.0, 1.0]]),
    "attention_patterns": lambda: pictures.attention_patterns(np.tril(np.ones((1, 2, 2))), "ab"),
    "lens_picture": lambda: _lens_picture(),
    "bars": lambda: pictures.bars("ab", [1.0, -2.0]),
    "weights": lambda: plot.draw(tiny_models.CONFIG, tiny_models.random_params(tiny_models.CONFIG, 1)),
    "loss": lambda: curve.draw(np.array([[1, 3.0], [2, 2.5]]), np.array([[2, 2.7]])),
}


def _lens_picture():
    params = tiny_models.random_params(tiny_models.CONFIG, 1)
    lens = logit_lens(tiny_models.CONFIG, params, [[3, 1]])
    return pictures.lens_picture(lens, Letters(), [3, 1])


class Letters:
    """A tokenizer whose tokens are single characters."""

    def token_bytes(self, i):
        return bytes([i + 65])


@pytest.mark.parametrize("name", DRAWN)
def test_a_notebook_can_show_a_picture(name):
    """IPython shows an object that has `_repr_png_`; a Figure made without pyplot has none of its own."""
    figure = DRAWN[name]()
    assert isinstance(figure, matplotlib.figure.Figure)
    shown = matplotlib.image.imread(io.BytesIO(figure._repr_png_()), format="png")
    assert shown.shape[:2] == tuple((figure.get_size_inches() * figure.dpi).astype(int)[::-1])
    assert shown.std() > 0.01, "the picture is blank"


@pytest.mark.parametrize("name", DRAWN)
def test_ipython_shows_a_picture_without_pyplot(name):
    """As a kernel formats the value of a cell, with the formatters that it starts with."""
    formatters = pytest.importorskip("IPython.core.formatters")
    data, _ = formatters.DisplayFormatter().format(DRAWN[name]())
    assert data["image/png"].startswith(b"\x89PNG")


def test_a_figure_can_be_pickled():
    figure = pickle.loads(pickle.dumps(DRAWN["bars"]()))
    assert type(figure) is figures.Figure
    assert [bar.get_width() for bar in figure.axes[0].patches] == [-2, 1]


def test_matplotlib_is_imported_when_a_figure_is_made():
    code = (
        "import sys; from gpt2_jax import figures; from gpt2_jax.research import pictures\n"
        "assert 'matplotlib' not in sys.modules\n"
        "assert figures.Figure is figures.Figure\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_module_has_no_other_names():
    with pytest.raises(AttributeError, match=r"module 'gpt2_jax.figures' has no attribute 'Picture'"):
        _ = figures.Picture
