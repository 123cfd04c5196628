"""Inspect a model before you use it: its files, counts, memory, every tensor and the vocabulary, as plain data."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax import checkpoints
from gpt2_jax.checkpoints.sources import find
from gpt2_jax.config import SIZES, GPT2Config
from gpt2_jax.inspection.files import list_files
from gpt2_jax.params import Params, flatten
from gpt2_jax.tokenizer import Tokenizer

CHUNK = 2**18  # values converted to float64 at a time: 2 MiB, which fits in a core's cache
SHOWN = 5  # tokens and merges shown from either end
EDGE = 3  # values of a row shown from either end
QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)

MEANINGS = {
    "n_vocab": "token ids: rows of the token embedding wte",
    "n_ctx": "longest text in tokens: rows of the position embedding wpe",
    "n_embd": "width of the residual stream: numbers for each token",
    "n_head": "attention heads in a block, each n_embd / n_head = {width} wide",
    "n_layer": "blocks (attention and MLP), one after another: h0, h1, ...",
}
FORMULAS = {
    "wte": ("tokens, output head", "V·D"),
    "wpe": ("positions", "C·D"),
    "attn": ("c_attn and c_proj", "L·(4·D² + 4·D)"),
    "mlp": ("c_fc and c_proj", "L·(8·D² + 5·D)"),
    "ln": ("ln_1, ln_2, ln_f", "(2·L + 1)·2·D"),
}
FORMULA = "V·D + C·D + L·(12·D² + 13·D) + 2·D"
UNTIED = {"wte": ("tokens", "V·D"), "lm_head": ("output head", "V·D")}  # with an output head of its own
SYMBOLS = {"V": "n_vocab", "C": "n_ctx", "D": "n_embd", "L": "n_layer"}


def inspect(source: str | os.PathLike, track: Callable[[list], Iterable] = iter) -> dict[str, Any]:
    """Load a model from any source that `load` takes, and return its `report`.

    Raises:
      FileNotFoundError, ValueError: as `load`. A missing or malformed vocabulary does not raise: the report says so.
    """
    directory = checkpoints.locate(source)
    return report(directory, *checkpoints.load(source), track)


def report(
    directory: Path, config: GPT2Config, params: Params, track: Callable[[list], Iterable] = iter
) -> dict[str, Any]:
    """Report on a loaded model and its directory as plain data, which `json.dumps(..., allow_nan=False)` accepts.

    Args:
      directory: the path that the model was loaded from, as `checkpoints.locate` returns it.
      config, params: the result of `load`.
      track: wraps the iteration over the list of (name, tensor), to show progress.

    Returns:
      A dict with the keys
        directory; form: "tensorflow", "huggingface", "orbax", "checkpoint" for a checkpoint of a training run, or
        "flax", "llmc" or "orbax_tree" for the files of other programs;
        size: "124M", ..., or None for a shape that was not released;
        files: see `list_files`; hyperparameters: n_vocab, n_ctx, n_embd, n_head, n_layer;
        variants: the fields in which the arithmetic differs from OpenAI's GPT-2, such as {"activation_function":
        "gelu"}, usually none; labels: those of a classifier, and pooling; both are missing if it is none;
        param_dtype: its name; parameters: see `count_parameters`; memory: see `memory`, in bytes;
        tensors: name and `describe_tensor` of each tensor: wte, wpe and lm_head first, then by layer;
        finite: True if no tensor holds NaN or an infinite value; vocabulary: see `describe_vocabulary`.
    """
    found = find(directory)
    first = {"wte": 0, "wpe": 1, "lm_head": 2}  # the embeddings come first
    named = sorted(flatten(params).items(), key=lambda item: first.get(item[0], len(first)))
    tensors = [{"name": name} | describe_tensor(leaf) for name, leaf in track(named)]
    hparams = config.to_hparams()
    return {
        "directory": str(directory),
        "form": found.form,
        "size": next((size for size, released in SIZES.items() if released.to_hparams() == hparams), None),
        "files": list_files(found.path, found.form),
        "hyperparameters": hparams,
        "variants": config.variants,
        **({"labels": list(config.labels), "pooling": config.pooling} if config.labels else {}),
        "param_dtype": config.param_dtype.name,
        "parameters": count_parameters(config, params),
        "memory": memory(config),
        "tensors": tensors,
        "finite": not any(tensor["nan"] or tensor["infinite"] for tensor in tensors),
        "vocabulary": describe_vocabulary(checkpoints.folder_of(directory)),
    }


def count_parameters(config: GPT2Config, params: Params) -> dict[str, Any]:
    """Count the parameters of each part in the tensors, and compute them from the config.

    Args:
      config: the model's config.
      params: the tree. A leaf needs only a `size`, so the result of `abstract_params` works too.

    Returns:
      A dict with the keys parts: a list with part, holds, formula, counted (in the tensors) and closed_form (from the
      config) for "wte", "wpe", "attn", "mlp", "ln", "lm_head" if the head is not tied, and "score" if the model is a
      classifier; formula, counted, closed_form: those of the whole model; agree: True if both counts are equal in
      every part; symbols: the names and values of V, C, D and L.
    """
    formulas, formula = dict(FORMULAS), FORMULA
    if not config.tie_word_embeddings:
        formulas, formula = formulas | UNTIED, f"2·{formula}"
    if config.labels:
        head = f"D·{len(config.labels)}"
        formulas, formula = formulas | {"score": ("classifier's head", head)}, f"{formula} + {head}"
    counted = dict.fromkeys(formulas, 0)
    for name, leaf in flatten(params).items():
        part = "ln" if "ln_" in name else name.split("/")[name.startswith("h")]
        counted[part] += int(leaf.size)
    closed = config.param_counts
    parts = [
        {"part": part, "holds": holds, "formula": formula, "counted": counted[part], "closed_form": closed[part]}
        for part, (holds, formula) in formulas.items()
    ]
    return {
        "parts": parts,
        "formula": formula,
        "counted": sum(counted.values()),
        "closed_form": config.n_params,
        "agree": counted == closed,
        "symbols": {letter: {"name": name, "value": getattr(config, name)} for letter, name in SYMBOLS.items()},
    }


def memory(config: GPT2Config) -> dict[str, dict[str, dict[str, int]]]:
    """Compute the bytes that the model needs, without activations and scratch space.

    Returns:
      {"inference" | "training": {"float32" | "bfloat16": {...}}}. Inference: weights, cache (the KV cache of one row
      of n_ctx tokens), total. Training with Adam, everything in that dtype: weights, gradients, moments (both of
      Adam), total: 16 bytes per parameter in float32, 8 in bfloat16.
    """
    inference, training = {}, {}
    for dtype in ("float32", "bfloat16"):
        own = config.replace(param_dtype=dtype, compute_dtype=dtype)
        weights, cache = own.param_bytes, own.cache_bytes(1, config.n_ctx)
        inference[dtype] = {"weights": weights, "cache": cache, "total": weights + cache}
        training[dtype] = {"weights": weights, "gradients": weights, "moments": 2 * weights, "total": 4 * weights}
    return {"inference": inference, "training": training}


def describe_tensor(array: Any) -> dict[str, Any]:
    """Describe an array by statistics of its finite values, computed in float64 chunk by chunk.

    Returns:
      shape, dtype (its name), count (of all values), mean, std (population), min, max, norm (L2, of all values as one
      vector), nan and infinite (how many). A statistic without a finite result is None.
    """
    array = np.asarray(array)
    flat = array.reshape(-1)
    n, mean, squares, least, most, nan, infinite = 0, 0.0, 0.0, np.inf, -np.inf, 0, 0
    with np.errstate(over="ignore", invalid="ignore"):  # squares of values beyond 1e154 overflow: None
        for start in range(0, flat.size, CHUNK):
            values = flat[start : start + CHUNK].astype(np.float64)
            finite = np.isfinite(values)
            if not finite.all():
                nan += int(np.isnan(values).sum())
                infinite += int(np.isinf(values).sum())
                values = values[finite]
            if not values.size:
                continue
            least, most = min(least, values.min()), max(most, values.max())
            own = values.mean()
            values -= own
            # Combine the means and sums of squared deviations of two sets (Chan, Golub and LeVeque 1979).
            squares += values @ values + (own - mean) ** 2 * n * values.size / (n + values.size)
            mean += (own - mean) * values.size / (n + values.size)
            n += values.size
        found = {"mean": mean, "std": np.sqrt(squares / n) if n else np.nan, "min": least, "max": most}
        found["norm"] = np.sqrt(squares + n * mean**2)
    whole = {"shape": list(array.shape), "dtype": array.dtype.name, "count": int(array.size)}
    return whole | {key: _number(x) if n else None for key, x in found.items()} | {"nan": nan, "infinite": infinite}


def examine_tensor(params: Params, name: str) -> dict[str, Any]:
    """Describe one tensor of a model in detail.

    Returns:
      name; the entries of `describe_tensor`; quantiles: {"0.5": median, ...} of the finite values; rows: {"first":
      {"first": the first values of the first row, "last": its last values}, "last": the same for the last row};
      thirds: {"q" | "k" | "v": see `describe_tensor`} for c_attn's w and b, else None.

    Raises:
      ValueError: no tensor has this name. The message gives the nearest names.
    """
    flat = flatten(params)
    if name not in flat:
        near = difflib.get_close_matches(name, flat, n=3, cutoff=0.4) or list(flat)[:3]
        raise ValueError(f"the model has no tensor {name!r}; the nearest names are {', '.join(near)}")
    array = np.asarray(flat[name])
    rows = array.reshape(-1, array.shape[-1])
    thirds = np.split(array, 3, axis=-1) if "/c_attn/" in name else None
    return {
        "name": name,
        **describe_tensor(array),
        "quantiles": _quantiles(array),
        "rows": {
            which: {"first": _numbers(row[:EDGE]), "last": _numbers(row[-EDGE:])}
            for which, row in (("first", rows[0]), ("last", rows[-1]))
        },
        "thirds": thirds and {part: describe_tensor(third) for part, third in zip("qkv", thirds, strict=True)},
    }


def _quantiles(array: np.ndarray) -> dict[str, float | None]:
    """Return the quantiles of an array's finite values, with linear interpolation like NumPy's."""
    wide = array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)  # NumPy sorts these fast
    values = wide[np.isfinite(wide)]
    if not values.size:
        return {str(q): None for q in QUANTILES}
    places = np.array(QUANTILES) * (values.size - 1)
    below = np.floor(places).astype(np.int64)
    above = np.minimum(below + 1, values.size - 1)
    values.partition(np.unique([below, above]))
    low, high = values[below].astype(np.float64), values[above].astype(np.float64)
    found = low + (high - low) * (places - below)
    return {str(q): _number(x) for q, x in zip(QUANTILES, found, strict=True)}


def describe_vocabulary(directory: Path) -> dict[str, Any]:
    """Describe the vocabulary in a model's directory, if there is one.

    Returns:
      missing: None, or the reason why there is no vocabulary; then all other values are None. n_ids; end_of_text: the
      id of `<|endoftext|>`, None if there is none; first_tokens and last_tokens: {id, token (as in the file, where Ġ is
      a space), text}; n_merges; first_merges and last_merges: pairs of tokens.
    """
    names = ("n_ids", "end_of_text", "first_tokens", "last_tokens", "n_merges", "first_merges", "last_merges")
    try:
        tokenizer = checkpoints.load_tokenizer(directory)
    except (ValueError, OSError) as error:
        return {"missing": str(error)} | dict.fromkeys(names)
    merges = [list(pair) for pair in tokenizer.merges]
    ids = range(tokenizer.n_vocab)
    values = (
        tokenizer.n_vocab,
        tokenizer.eot,
        _tokens(tokenizer, ids[:SHOWN]),
        _tokens(tokenizer, ids[-SHOWN:]),
        len(merges),
        merges[:SHOWN],
        merges[-SHOWN:],
    )
    return {"missing": None} | dict(zip(names, values, strict=True))


def _tokens(tokenizer: Tokenizer, ids: Iterable[int]) -> list[dict[str, Any]]:
    token_of = {i: token for token, i in tokenizer.tokens.items()}
    return [{"id": i, "token": token_of.get(i, ""), "text": tokenizer.decode([i])} for i in ids]


def _number(value: Any) -> float | None:
    """Return a number that JSON can hold: None for NaN and infinite values."""
    return float(value) if np.isfinite(value) else None


def _numbers(values: Iterable[Any]) -> list[float | None]:
    return [_number(value) for value in values]
