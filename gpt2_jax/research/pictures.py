"""Pictures of what the other modules compute: heat maps, attention patterns, lenses and bars, labelled with tokens.

Each function draws into a matplotlib Figure and returns it. A notebook shows it as the value of a cell, and
`save(figure, path)` writes it into a file. matplotlib is imported when something is drawn.

Shape letters: T query token, S key token, L layers, N heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_jax import figures
from gpt2_jax.figures import save as save  # part of this module's interface
from gpt2_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gpt2_jax.research.lens import Lens

VISIBLE = {" ": "·", "\n": "⏎", "\t": "⇥"}
CELL = 0.32  # inches per cell, in a map that is not larger than LARGEST
LARGEST = 16  # inches
LARGEST_OF_MANY = 5  # inches, for one of several attention patterns
MOST_LABELS = 64  # labels of one axis: with more, every second, third, ... label is drawn
COLUMNS = 4  # attention patterns side by side


def token_labels(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    r"""Return the axis label of each token: "·the", "⏎", or "\xe2" for the first byte of a longer character."""
    return [_visible(tokenizer.token_bytes(int(i)).decode("utf-8", "backslashreplace")) for i in ids]


def _visible(text: str) -> str:
    glyphs = _glyphs()
    shown = (VISIBLE.get(character, character) for character in text)
    return "".join(c if ord(c) in glyphs and c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


@functools.cache
def _glyphs() -> frozenset[int]:
    """Return the characters of matplotlib's default font. For others it warns and draws boxes."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())


def heat_map(
    values: Any,
    rows: Sequence[Any] | None = None,
    columns: Sequence[Any] | None = None,
    *,
    title: str = "",
    row_name: str = "",
    column_name: str = "",
    value_name: str = "",
    signed: bool | None = None,
) -> Figure:
    """Draw numbers [rows, columns] as colors, for example a patching grid or head scores.

    Args:
      values: the numbers; NaN stays white.
      rows, columns: the labels of the rows and columns, such as those of `token_labels`; None numbers them.
      title: the title above the map.
      row_name, column_name, value_name: the names of the two axes and of the color bar.
      signed: True draws numbers above 0 in red and below 0 in blue. None does so if there are numbers of both signs.

    Raises:
      ValueError: the values do not have two axes, or are none, or the number of labels is wrong.
    """
    values = _matrix(values, rows, columns)
    figure = figures.Figure(figsize=_size(values.shape), layout="constrained")
    square = figure.subplots()
    image = _draw_map(square, values, rows, columns, title, row_name, column_name, _limits(values, signed))
    figure.colorbar(image, ax=square, label=value_name, shrink=0.8)
    return figure


def attention_patterns(pattern_NTS: Any, tokens: Sequence[Any], heads: Sequence[int] | None = None) -> Figure:
    """Draw attention patterns, one square for each head: query tokens go down, key tokens go across.

    Args:
      pattern_NTS: "h3/attn/pattern" of one row, as `forward` captures it.
      tokens: the labels of the row's tokens, such as those of `token_labels`.
      heads: the numbers of these heads; None numbers them from 0.

    Raises:
      ValueError: the shape is not [N, T, T], or the number of labels is wrong.
    """
    pattern_NTS = np.asarray(pattern_NTS, np.float64)
    if pattern_NTS.ndim != 3:
        raise ValueError(f"attention patterns must have the shape [N, T, T], of one row, not {pattern_NTS.shape}")
    heads = range(len(pattern_NTS)) if heads is None else heads
    if not len(heads) or len(heads) != len(pattern_NTS):
        raise ValueError(f"there are {len(pattern_NTS)} patterns, but {len(heads)} head numbers")
    for pattern_TS in pattern_NTS:
        _matrix(pattern_TS, tokens, tokens)
    n_columns = min(COLUMNS, len(heads))
    n_rows = math.ceil(len(heads) / n_columns)
    width, height = _size(pattern_NTS.shape[1:], LARGEST_OF_MANY)
    figure = figures.Figure(figsize=(width * n_columns, height * n_rows), layout="constrained")
    squares = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    for square in squares[len(heads) :]:
        square.set_axis_off()
    images = []
    for square, head, pattern_TS in zip(squares, heads, pattern_NTS, strict=False):
        above = np.triu(np.ones(pattern_TS.shape, bool), 1)
        shown = np.where(above & (pattern_TS == 0), np.nan, pattern_TS)  # masked cells stay white
        images.append(_draw_map(square, shown, tokens, tokens, f"head {head}", "query token", "key token", (0, 1)))
    figure.colorbar(images[-1], ax=squares, label="attention", shrink=0.6)
    return figure


def lens_picture(lens: Lens, tokenizer: Tokenizer, tokens_T: Sequence[int], row: int = 0) -> Figure:
    """Draw what each layer predicts at each token of one row: the most likely token, colored by its probability.

    Args:
      lens: the result of `logit_lens`.
      tokenizer: the model's tokenizer.
      tokens_T: the ids of the row.
      row: the number of the row in `lens`.

    Raises:
      ValueError: the row has a different number of tokens.
    """
    probability_LT = np.exp(np.asarray(lens.logprobs, np.float64)[:, row, :, 0])
    ids_LT = np.asarray(lens.ids)[:, row, :, 0]
    order = slice(None, None, -1)  # the last layer is on top
    columns = token_labels(tokenizer, tokens_T)
    figure = heat_map(
        probability_LT[order],
        list(lens.names)[order],
        columns,
        title="most likely next token after each layer",
        value_name="probability of this token",
        signed=False,
    )
    figure.set_size_inches(2.5 + 0.72 * len(columns), 1.6 + CELL * len(lens.names))
    square = figure.axes[0]
    for y, (ids_T, probability_T) in enumerate(zip(ids_LT[order], probability_LT[order], strict=True)):
        for x, label in enumerate(token_labels(tokenizer, ids_T)):
            colour = "white" if probability_T[x] > 0.5 else "black"
            square.text(x, y, label, ha="center", va="center", fontsize=7, color=colour, parse_math=False)
    return figure


def bars(labels: Sequence[str], values: Any, *, title: str = "", value_name: str = "", most: int = 20) -> Figure:
    """Draw the numbers with the largest absolute values as bars, the largest first, for example an attribution.

    Args:
      labels: the label of each number.
      values: the numbers, [n].
      title: the title above the bars.
      value_name: what the numbers are, with their unit.
      most: how many bars to draw at most.

    Raises:
      ValueError: the number of labels is wrong.
    """
    values = np.asarray(values, np.float64)
    if values.shape != (len(labels),):
        raise ValueError(f"there are {len(labels)} labels, but values of shape {values.shape}")
    chosen = np.argsort(-abs(values), kind="stable")[:most]
    figure = figures.Figure(figsize=(7, 1.2 + 0.25 * len(chosen)), layout="constrained")
    axes = figure.subplots()
    axes.barh(np.arange(len(chosen)), values[chosen], color=["#d55e00" if values[i] > 0 else "#0072b2" for i in chosen])
    axes.set_yticks(np.arange(len(chosen)), [str(labels[i]) for i in chosen], fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_title(title, parse_math=False)
    axes.set_xlabel(value_name)
    return figure


def _matrix(values: Any, rows: Sequence[Any] | None, columns: Sequence[Any] | None) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"a heat map needs numbers of shape [rows, columns], not {values.shape}")
    for what, labels, count in (("rows", rows, values.shape[0]), ("columns", columns, values.shape[1])):
        if labels is not None and len(labels) != count:
            raise ValueError(f"there are {count} {what}, but {len(labels)} labels for them")
    return values


def _size(shape: tuple[int, int], largest: float = LARGEST) -> tuple[float, float]:
    height, width = (min(CELL * n, largest) for n in shape)
    return 2.2 + width, max(2.6, 1.6 + height)


def _limits(values: np.ndarray, signed: bool | None) -> tuple[float, float]:
    """Return the numbers at the two ends of the color bar. 0 is white if the map is signed."""
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    signed = low < 0 < high if signed is None else signed
    return (-max(-low, high), max(-low, high)) if signed else (min(low, 0.0), max(high, 0.0))


def _draw_map(
    axes: Any,
    values: np.ndarray,
    rows: Sequence[Any] | None,
    columns: Sequence[Any] | None,
    title: str,
    row_name: str,
    column_name: str,
    limits: tuple[float, float],
) -> Any:
    """Draw one map with its labels, and return the image."""
    colours = "RdBu_r" if limits[0] < 0 else "Blues"
    image = axes.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="nearest")
    sides = ((axes.yaxis, rows, row_name), (axes.xaxis, columns, column_name))
    for count, (axis, labels, name) in zip(values.shape, sides, strict=True):
        places = range(0, count, -(-count // MOST_LABELS))
        written = [str(i if labels is None else labels[i]) for i in places]
        axis.set_ticks(places, written, parse_math=False, fontsize=8)
        axis.set_label_text(name)
    axes.tick_params(axis="x", rotation=90)
    axes.set_title(title, fontsize=10, parse_math=False)
    return image
