"""`load` and `load_config`, for any source and format."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.checkpoints import (
    copies,
    flax_msgpack,
    foreign_orbax,
    huggingface,
    llmc,
    orbax,
    peft,
    placing,
    run_weights,
    runs,
    tensorflow,
)
from gpt2_jax.checkpoints.forms import FormName
from gpt2_jax.checkpoints.integrity import STORED_DTYPES, DtypeNeededError, Leaves, count_non_finite, warn
from gpt2_jax.checkpoints.released import use_release
from gpt2_jax.checkpoints.sources import Found, find, locate, size_meant
from gpt2_jax.config import SIZES, GPT2Config, float_dtype
from gpt2_jax.model import abstract_params
from gpt2_jax.params import Params, flatten, unflatten
from gpt2_jax.progress import reading


def load(
    source: str | os.PathLike, dtype: Any = None, sharding: Any = None, keep_copy: bool = True
) -> tuple[GPT2Config, Params]:
    """Load a model from any source, in any format. Every tensor is checked, and nothing is transposed.

    Tensors are read and placed one after the other. Beside the params, the host needs memory for little more than the
    largest tensor (all of flax_model.msgpack, and twice the largest of compressed arrays of Orbax).

    Args:
      source: a directory, a file, a size, or an id on the Hugging Face hub.
        A directory holds a TensorFlow checkpoint in OpenAI's layout, Hugging Face's config.json and safetensors, a
        model that `save` wrote, a training run (its best model is loaded, or its newest checkpoint if there is no best
        model) or one checkpoint of a run ("RUN/checkpoints/1600"); LoRA is merged. It may hold a LoRA adapter that
        PEFT wrote: it is merged into its base model, which it names. It may also hold the weights of
        Flax, nanoGPT, the build-an-LLM book or Orbax (`checkpoints.forms.FORMS` lists all).
        A file is a model of llm.c. "run1/model-1000" is one of several TensorFlow checkpoints.
        A size is "124M", "355M", "774M" or "1558M" (or "117M", "gpt2", "gpt2-xl", ...); it is fetched if it is not
        there yet. A hub id is, for example, "distilbert/distilgpt2", or with a revision "distilbert/distilgpt2@main".
        "shakespeare" is the model in this package.
      dtype: float32, bfloat16 or float16. Each tensor is cast to it. None keeps the stored dtype, which must then be
        one of these, and the same for all tensors.
      sharding: where the params go: a jax Device or Sharding for all of them, or a tree of these with the structure of
        the params. None is the default device.
      keep_copy: keep a copy of a TensorFlow checkpoint as safetensors in the cache folder. The next load reads the
        copy, a few times faster and without TensorFlow. GPT2_JAX_KEEP_COPY=0 in the environment turns copies off too.

    Returns:
      config, params. The config's param_dtype is the dtype of the params. The params are nested plain dicts of jax
      arrays with OpenAI's names, shapes and orientation: `params["h0"]["attn"]["c_attn"]["w"]` is (n_embd, 3 * n_embd).

    Warns:
      UserWarning: a tensor holds values that are NaN or infinite; a head for another task than language modeling or
        classification is left out; or config.json says that the output head is tied, but another head is stored: it
        is loaded as `lm_head`.

    Raises:
      FileNotFoundError: there is no such source, or one of its files is missing.
      ValueError: a file is malformed or damaged, does not match its config, or holds a model that is not GPT-2.
      OSError: the model cannot be fetched.
    """
    dtype = None if dtype is None else float_dtype("dtype", dtype, STORED_DTYPES)

    def open_and_place(path: Path) -> tuple[GPT2Config, Params]:
        return _place(*read(path, keep_copy, dtype), dtype, sharding)

    size = size_meant(source)
    if size is not None:
        return use_release(size, None, open_and_place)
    return runs.read_steadily(source, lambda: open_and_place(locate(source)))


def read(
    path: Path, keep_copy: bool = True, dtype: np.dtype | None = None
) -> tuple[GPT2Config, Generator[tuple[str, np.ndarray], None, None]]:
    """Read the model at a path that `locate` returned onto the host.

    Args:
      path: a directory, a file, or the prefix of a TensorFlow checkpoint.
      keep_copy: as in `load`.
      dtype: the dtype into which the caller casts. Then the tensors of a file may have any float dtypes.
    """
    found = find(path)
    if found.form == "tensorflow" and keep_copy and os.environ.get("GPT2_JAX_KEEP_COPY", "1") != "0":
        config, leaves = copies.read(found.path, dtype)
    else:
        config, leaves = READERS[found.form](found.path, dtype)
    return config, reading(leaves, f"reading {path.name}", config.param_bytes)


def open_leaves(source: str, dtype: np.dtype) -> Leaves:
    """Read the params of a source onto the host, to be cast to a dtype: the model that LoRA was trained on.

    Raises:
      FileNotFoundError, ValueError, OSError: as `load`.
    """
    return open_model(source, np.dtype(dtype))[1]


def open_model(source: str, dtype: np.dtype | None) -> tuple[GPT2Config, Leaves]:
    """Read a model onto the host, to be cast to a dtype if that is not None: the base model of an adapter.

    Raises:
      FileNotFoundError, ValueError, OSError: as `load`.
    """
    return read(locate(source), dtype=dtype)


READERS: Mapping[FormName, Callable[[Path, np.dtype | None], tuple[GPT2Config, Leaves]]] = {
    "tensorflow": tensorflow.read,
    "huggingface": huggingface.read,
    "flax": flax_msgpack.read,
    "orbax_tree": foreign_orbax.read,
    "peft": lambda path, dtype: peft.read(path, dtype, open_model),
    # The others have one dtype, which can always be loaded.
    "llmc": lambda path, _: llmc.read(path),
    "orbax": lambda path, _: orbax.read(path, open_leaves),
    "checkpoint": lambda path, _: run_weights.read(path, open_leaves),
}


def _place(
    config: GPT2Config, leaves: Generator[tuple[str, np.ndarray], None, None], dtype: np.dtype | None, sharding: Any
) -> tuple[GPT2Config, Params]:
    """Cast every leaf and put it on its device, one after the other."""
    if isinstance(sharding, Mapping):
        sharding = flatten(dict(sharding))
        if wrong := sorted(sharding.keys() ^ flatten(abstract_params(config)).keys()):
            raise ValueError(f"sharding must have the structure of the params: {wrong[0]} is in only one of the two")
    flat, non_finite, overflown = {}, {}, {}
    try:
        with contextlib.closing(leaves):
            for name, stored in leaves:
                where = sharding[name] if isinstance(sharding, Mapping) else sharding
                flat[name], n_non_finite = placing.place(stored, dtype or config.param_dtype, where)
                if n_non_finite:
                    (non_finite if count_non_finite(stored) else overflown)[name] = n_non_finite
                del stored  # before the next one is read
    except BaseException:
        for leaf in flat.values():  # a traceback may keep this frame for long
            leaf.delete()
        raise
    warn_of_non_finite(non_finite, "these weights hold NaN or infinite values")
    warn_of_non_finite(overflown, f"values too large for {dtype} have become infinite")
    return config if dtype is None else config.replace(param_dtype=dtype), unflatten(flat)


def warn_of_non_finite(counts: Mapping[str, int], what: str) -> None:
    """Warn about tensors. `counts` maps their names to the number of affected values; if it is empty, do nothing."""
    if counts:
        message = ", ".join(f"{name} ({n})" for name, n in list(counts.items())[:5])
        more = f" and {len(counts) - 5} more tensors" if len(counts) > 5 else ""
        warn(f"{what}: {message}{more}")


def load_config(source: str | os.PathLike) -> GPT2Config:
    """Load only a model's config, the same that `load` returns. For a size, no file is needed.

    Most formats need only the config's file, and the names, shapes and dtypes of the tensors. All weights are read for
    Flax and for trees of other programs in Orbax, and the output head and `wte` where other formats store both.

    Where `load` needs a dtype (float64, or tensors of several dtypes), it is the config that dtype="float32" gives.

    Raises:
      FileNotFoundError, ValueError, OSError: as in `load`.
    """
    if size := size_meant(source):
        return SIZES[size]
    return runs.read_steadily(source, lambda: _config(find(locate(source))))


def _config(found: Found) -> GPT2Config:
    if found.form == "tensorflow":
        return _tensorflow_config(found)
    quick = {"orbax": orbax.read_config, "checkpoint": run_weights.read_config, "llmc": llmc.read_config}
    if found.form in quick:
        return quick[found.form](found.path)
    return _config_of_any_dtype(found)


def _config_of_any_dtype(found: Found) -> GPT2Config:
    """Return the config of a model. Where `load` needs a dtype, param_dtype is float32."""
    try:
        return READERS[found.form](found.path, None)[0]
    except DtypeNeededError:
        return READERS[found.form](found.path, np.dtype("float32"))[0]


def _tensorflow_config(found: Found) -> GPT2Config:
    config = tensorflow.read_hparams(found.path)
    try:
        data = tensorflow.data_files(found.path)
    except FileNotFoundError:
        return config
    if sum(path.stat().st_size for path in data) != 4 * config.n_params:  # not float32, or not only the model
        return copies.read_config(found.path) or _config_of_any_dtype(found)
    return config
