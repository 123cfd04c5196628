"""One picture of a model's weights: distributions, sizes by layer, and the two embeddings."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from gpt2_jax import figures
from gpt2_jax.config import GPT2Config
from gpt2_jax.params import Params, flatten

# matplotlib is imported when something is drawn: the rest of the package works without it.

DENSE = {  # color and line style; a dashed line over a solid one shows both where they coincide
    "attn/c_attn": ("#0072b2", "-"),
    "attn/c_proj": ("#56b4e9", "-"),
    "mlp/c_fc": ("#d55e00", "--"),
    "mlp/c_proj": ("#e69f00", "--"),
}
EMBEDDINGS = {"wte": ("#222222", "-"), "wpe": ("#009e73", "--"), "lm_head": ("#cc79a7", "--")}
NORMS = {"ln_1": ("#0072b2", "-"), "ln_2": ("#d55e00", "--")}
CHUNK = 2**18  # values converted to float64 at a time
BINS = 201  # odd: so one bin is centered on zero
WIDEST = 10  # the histograms end at this many times the largest root mean square of a kind, or earlier
POSITIONS = 256  # at most this many rows in the similarity picture


def plot(config: GPT2Config, params: Params, path: str | os.PathLike) -> None:
    """Draw a model's weights into a file. Its extension gives the format: .png, .svg or .pdf.

    The picture is written to a temporary file in the same folder, which is then renamed.

    Raises:
      ValueError: the extension is not one of these.
      FileNotFoundError: the folder for the file does not exist.
    """
    path = figures.check_path(path)
    figures.save(draw(config, params), path)


def draw(config: GPT2Config, params: Params) -> Any:
    """Return a matplotlib Figure of six panels. NaN and infinite values are left out.

    Upper row: distributions, sizes by layer, LayerNorm gains. Lower row: similarity of positions, sizes of wpe's rows,
    sizes of wte's rows.
    """
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    flat = {name: np.asarray(leaf) for name, leaf in flatten(params).items()}
    figure = figures.Figure(figsize=(17, 9.6), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    axes = figure.subplots(2, 3)
    figure.suptitle(
        f"GPT-2, {config.n_params:,} parameters in {config.param_dtype.name}: {config.n_layer} layers of width "
        f"{config.n_embd:,}, {config.n_ctx:,} positions, {config.n_vocab:,} token ids",
        fontsize=15,
    )
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        _draw_distributions(axes[0, 0], config, flat)
        _draw_sizes(axes[0, 1], config, flat)
        _draw_gains(axes[0, 2], config, flat)
        _draw_similarity(axes[1, 0], figure, flat["wpe"])
        _draw_position_norms(axes[1, 1], flat["wpe"])
        _draw_token_norms(axes[1, 2], flat["wte"])
    for ax in (*axes[0], *axes[1, 1:]):
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[1, 2].xaxis.set_major_formatter("{x:,.0f}")
    return figure


def _draw_distributions(ax: Any, config: GPT2Config, flat: dict[str, np.ndarray]) -> None:
    """Draw the share of the values in each bin, on a log scale. There, an exponential tail is a straight line."""
    kinds = {kind: [flat[f"h{i}/{kind}/w"] for i in range(config.n_layer)] for kind in DENSE}
    kinds |= {kind: [flat[kind]] for kind in EMBEDDINGS if kind in flat}
    sizes = {kind: _rms(arrays) for kind, arrays in kinds.items()}
    most = max(max(_extent(array) for array in arrays) for arrays in kinds.values())
    limit = min(most, WIDEST * max((size for size in sizes.values() if np.isfinite(size)), default=0)) or 1.0
    edges = np.linspace(-limit, limit, BINS + 1)
    for kind, arrays in kinds.items():
        counts, total = _histogram(arrays, edges)
        outside = total - counts.sum()
        label = f"{kind}, RMS {sizes[kind]:.3f}" + (f", {outside:,} outside" if outside else "")
        shares = np.where(counts > 0, counts / max(total, 1), np.nan)  # an empty bin is a gap: log(0)
        colour, style = (DENSE | EMBEDDINGS)[kind]
        ax.stairs(shares, edges, baseline=None, color=colour, linestyle=style, linewidth=1.4, label=label)
    ax.set_yscale("log")
    ax.set(title="Distribution of the weights, all layers together", xlabel="value of a weight")
    ax.set_ylabel(f"share of the values in a bin of {edges[1] - edges[0]:.2g}")
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # outside the panel


def _draw_sizes(ax: Any, config: GPT2Config, flat: dict[str, np.ndarray]) -> None:
    """Draw the root mean square of each dense layer's w. Unlike the norm, it is comparable between shapes."""
    layers = range(config.n_layer)
    for kind, (colour, style) in DENSE.items():
        sizes = [_rms([flat[f"h{i}/{kind}/w"]]) for i in layers]
        ax.plot(layers, sizes, marker="o", markersize=4, color=colour, linestyle=style, label=f"{kind}/w")
    ax.axhline(0.02, color="grey", linestyle=":", label="0.02: OpenAI's initial value")
    _from_zero(ax)
    ax.set(title="Size of the weights by layer", xlabel="layer", ylabel="root mean square (L2 norm / √count)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(fontsize=8)


def _draw_gains(ax: Any, config: GPT2Config, flat: dict[str, np.ndarray]) -> None:
    """Draw the median gain g of each LayerNorm, and the band with the middle 80 % of its channels. ln_f comes last."""
    layers = np.arange(config.n_layer)
    for norm, (colour, style) in NORMS.items():
        low, middle, high = np.transpose([_deciles(flat[f"h{i}/{norm}/g"]) for i in layers])
        ax.plot(layers, middle, marker="o", markersize=4, color=colour, linestyle=style, label=f"{norm}/g")
        ax.fill_between(layers, low, high, color=colour, alpha=0.18, linewidth=0)
    low, middle, high = _deciles(flat["ln_f/g"])
    bars = [[middle - low], [high - middle]]
    ax.errorbar([config.n_layer], [middle], bars, color="#222222", marker="s", markersize=5, capsize=3, label="ln_f/g")
    ax.axhline(1, color="grey", linestyle=":", label="1: initial value")
    _from_zero(ax)
    ax.set(title="LayerNorm gains by layer", xlabel="layer (ln_f: after the last)")
    ax.set_ylabel("gain g: median, and the middle 80 % of channels")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(fontsize=8)


def _draw_similarity(ax: Any, figure: Any, wpe: np.ndarray) -> None:
    """Draw the cosine similarity of the embeddings of each two positions. If there are many, it draws every n-th."""
    step = -(-len(wpe) // POSITIONS)
    rows = wpe[::step].astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    end = len(rows) * step - step / 2
    image = ax.imshow(
        rows @ rows.T,
        cmap="RdBu_r",
        vmin=-1,
        vmax=1,
        origin="lower",
        extent=(-step / 2, end, -step / 2, end),
        interpolation="nearest",
    )
    label = "position" if step == 1 else f"position (one in {step} drawn)"
    ax.set(title="Similarity of positions: rows of wpe", xlabel=label, ylabel=label)
    figure.colorbar(image, cax=ax.inset_axes((1.04, 0, 0.05, 1)), label="cosine of the two embeddings")


def _draw_position_norms(ax: Any, wpe: np.ndarray) -> None:
    """Draw the norm of each position's embedding."""
    ax.plot(_row_norms(wpe), color=EMBEDDINGS["wpe"][0], linewidth=1.2)
    _from_zero(ax)
    ax.set(title="Position embeddings: size of each row of wpe", xlabel="position", ylabel="L2 norm of the row")


def _draw_token_norms(ax: Any, wte: np.ndarray) -> None:
    """Draw the norm of each token's embedding, and the median of each hundredth of the ids."""
    norms = _row_norms(wte)
    groups = np.array_split(np.arange(len(norms)), min(100, len(norms)))
    ax.plot(norms, ".", color="#999999", markersize=2, alpha=0.35, rasterized=True, label="a token")
    middles = [np.median(norms[group]) for group in groups]
    ax.plot([group.mean() for group in groups], middles, color="#d55e00", label=f"median of {len(groups[0]):,} ids")
    _from_zero(ax)
    ax.set(title="Token embeddings: size of each row of wte", ylabel="L2 norm of the row")
    ax.set_xlabel("token id (256 bytes, then merges in order)")
    ax.legend(fontsize=8)


def _from_zero(ax: Any) -> None:
    """Start the axis at zero, or lower for negative values, so that heights are comparable. Leave room above."""
    low, high = ax.dataLim.intervaly
    if np.isfinite([low, high]).all():
        ax.set_ylim(min(0, 1.08 * low), 1.08 * high if high > 0 else 1)


def _chunks(array: np.ndarray) -> Any:
    """Yield the finite values of an array in float64, a chunk at a time."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        values = flat[start : start + CHUNK].astype(np.float64)
        yield values[np.isfinite(values)]


def _histogram(arrays: list[np.ndarray], edges: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the number of finite values in each bin, and the number of all finite values."""
    counts, total = np.zeros(len(edges) - 1, np.int64), 0
    for values in (values for array in arrays for values in _chunks(array)):
        counts += np.histogram(values, bins=len(edges) - 1, range=(edges[0], edges[-1]))[0]
        total += values.size
    return counts, total


def _rms(arrays: list[np.ndarray]) -> float:
    """Return the root mean square of the finite values of several arrays."""
    parts = [(values @ values, values.size) for array in arrays for values in _chunks(array)]
    squares, count = map(sum, zip(*parts, strict=True))
    return float(np.sqrt(squares / count)) if count else np.nan


def _extent(array: np.ndarray) -> float:
    return max(float(np.abs(values).max(initial=0)) for values in _chunks(array))


def _deciles(array: np.ndarray) -> tuple[float, float, float]:
    """Return the first, fifth and ninth decile of an array's finite values."""
    values = np.concatenate(list(_chunks(array)))
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9]) if values.size else [np.nan] * 3
    return low, middle, high


def _row_norms(array: np.ndarray) -> np.ndarray:
    """Return the L2 norm of each row in float64. It is NaN for a row with a value that is not finite."""
    step = max(1, CHUNK // array.shape[1])
    parts = [array[i : i + step].astype(np.float64) for i in range(0, len(array), step)]
    norms = np.concatenate([np.linalg.norm(part, axis=1) for part in parts])
    return np.where(np.isfinite(norms), norms, np.nan)
