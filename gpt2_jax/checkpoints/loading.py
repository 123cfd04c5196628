"""`load`, `load_config` and `load_tokenizer`, for any source and format."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2_jax.checkpoints import copies, huggingface, huggingface_tokenizer, orbax, run_weights, runs, tensorflow
from gpt2_jax.checkpoints.integrity import STORED_DTYPES, Leaves, count_non_finite
from gpt2_jax.checkpoints.released import use_release
from gpt2_jax.checkpoints.sources import form_of, locate, size_meant
from gpt2_jax.config import SIZES, GPT2Config, float_dtype
from gpt2_jax.model import abstract_params
from gpt2_jax.params import Params, flatten, unflatten
from gpt2_jax.progress import reading
from gpt2_jax.tokenizer import HUGGING_FACE_FILES, OPENAI_FILES, Tokenizer


def load(
    source: str | os.PathLike, dtype: Any = None, sharding: Any = None, keep_copy: bool = True
) -> tuple[GPT2Config, Params]:
    """Load a model from any source, in any format. Every tensor is checked, and nothing is transposed.

    Args:
      source: a directory, a size, or an id on the Hugging Face hub. A directory holds a TensorFlow checkpoint in
        OpenAI's layout, Hugging Face's config.json and safetensors, a model that `save` wrote, a training run (its best
        model is loaded, or its newest checkpoint if there is no best model) or one checkpoint of a run
        ("RUN/checkpoints/1600"); LoRA is merged. A size is "124M", "355M", "774M" or "1558M" (or "117M", "gpt2",
        "gpt2-xl", ...); it is fetched if it is not there yet. A hub id is, for example, "distilbert/distilgpt2".
        "shakespeare" is the model in this package.
      dtype: float32, bfloat16 or float16. Each tensor is cast to it. None keeps the stored dtype.
      sharding: where the params go: a jax Device or Sharding for all of them, or a tree of these with the structure of
        the params. None is the default device.
      keep_copy: keep a copy of a TensorFlow checkpoint as safetensors in the cache folder. The next load reads the
        copy, a few times faster and without TensorFlow. GPT2_JAX_KEEP_COPY=0 in the environment turns copies off too.

    Returns:
      config, params. The config's param_dtype is the dtype of the params. The params are nested plain dicts of jax
      arrays with OpenAI's names, shapes and orientation: `params["h0"]["attn"]["c_attn"]["w"]` is (n_embd, 3 * n_embd).

    Warns:
      UserWarning: a tensor holds values that are NaN or infinite; or config.json says that the output head is tied, but
        another head is stored: it is loaded as `lm_head`.

    Raises:
      FileNotFoundError: there is no such source, or one of its files is missing.
      ValueError: a file is malformed or damaged, does not match its config, or holds a model that is not GPT-2.
      OSError: the model cannot be fetched.
    """
    dtype = None if dtype is None else float_dtype("dtype", dtype, STORED_DTYPES)

    def open_and_place(directory: Path) -> tuple[GPT2Config, Params]:
        return _place(*read(directory, keep_copy), dtype, sharding)

    size = size_meant(source)
    return open_and_place(locate(source)) if size is None else use_release(size, None, open_and_place)


def read(directory: Path, keep_copy: bool = True) -> tuple[GPT2Config, Leaves]:
    """Read a directory in any format onto the host."""
    form = form_of(directory)
    if form == "huggingface":
        config, leaves = huggingface.read(directory)
    elif form == "orbax":
        config, leaves = orbax.read(directory)
    elif form == "checkpoint":
        config, leaves = run_weights.read(directory)
    elif keep_copy and os.environ.get("GPT2_JAX_KEEP_COPY", "1") != "0":
        config, leaves = copies.read(directory)
    else:
        config, leaves = tensorflow.read(directory)
    return config, reading(leaves, f"reading {directory.name}", config.param_bytes)


def _place(config: GPT2Config, leaves: Leaves, dtype: np.dtype | None, sharding: Any) -> tuple[GPT2Config, Params]:
    """Cast every leaf and put it on its device, one after the other."""
    if isinstance(sharding, Mapping):
        sharding = flatten(dict(sharding))
        if wrong := sorted(sharding.keys() ^ flatten(abstract_params(config)).keys()):
            raise ValueError(f"sharding must have the structure of the params: {wrong[0]} is in only one of the two")
    flat, non_finite, overflown = {}, {}, {}
    for name, stored in leaves:
        with np.errstate(over="ignore"):  # the warning below names the tensor
            array = stored if dtype is None else stored.astype(dtype, copy=False)
        if n_non_finite := count_non_finite(array):
            (non_finite if count_non_finite(stored) else overflown)[name] = n_non_finite
        flat[name] = jax.device_put(array, sharding[name] if isinstance(sharding, Mapping) else sharding)
    warn_of_non_finite(non_finite, "these weights hold NaN or infinite values", stacklevel=5)  # 5: the caller of `load`
    warn_of_non_finite(overflown, f"values too large for {dtype} have become infinite", stacklevel=5)
    return config if dtype is None else config.replace(param_dtype=dtype), unflatten(flat)


def warn_of_non_finite(counts: Mapping[str, int], what: str, stacklevel: int) -> None:
    """Warn about tensors. `counts` maps their names to the number of affected values; if it is empty, do nothing."""
    if counts:
        message = ", ".join(f"{name} ({n})" for name, n in list(counts.items())[:5])
        more = f" and {len(counts) - 5} more tensors" if len(counts) > 5 else ""
        warnings.warn(f"{what}: {message}{more}", stacklevel=stacklevel)


def load_config(source: str | os.PathLike) -> GPT2Config:
    """Load only a model's config, the same that `load` returns. For a size, no file is needed.

    Raises:
      FileNotFoundError, ValueError, OSError: as in `load`.
    """
    if size := size_meant(source):
        return SIZES[size]
    directory = locate(source)
    form = form_of(directory)
    if form == "huggingface":
        return huggingface.read(directory)[0]
    if form == "orbax":
        return orbax.read_config(directory)
    if form == "checkpoint":
        return run_weights.read_config(directory)
    config = tensorflow.read_hparams(directory)
    try:
        data = directory.glob(tensorflow.data_pattern(tensorflow.find_checkpoint(directory)))
    except FileNotFoundError:
        return config
    if sum(path.stat().st_size for path in data) != 4 * config.n_params:  # not float32, or not complete
        return copies.read_config(directory) or tensorflow.read(directory)[0]
    return config


def load_tokenizer(source: str | os.PathLike) -> Tokenizer:
    """Load a model's tokenizer: encoder.json and vocab.bpe, vocab.json and merges.txt, or tokenizer.json.

    Raises:
      FileNotFoundError: there is no such source, or it has no vocabulary.
      ValueError: a file is malformed, or the number of ids differs from the model's n_vocab.
    """
    directory = runs.run_of(locate(source, "tokenizer"))
    if _any_of(directory, OPENAI_FILES):
        encoder, merges = (directory / name for name in OPENAI_FILES)
        tokenizer = Tokenizer.from_files(encoder, merges)
    elif _any_of(directory, HUGGING_FACE_FILES):
        tokenizer = huggingface_tokenizer.read(directory)
    else:
        raise FileNotFoundError(
            f"{directory} holds no vocabulary: encoder.json and vocab.bpe, vocab.json and merges.txt, or tokenizer.json"
        )
    for name, read_config in _CONFIGS.items():
        if (
            (directory / name).is_file()
            and (name != runs.RUN or runs.is_run(directory))
            and (n_vocab := read_config(directory).n_vocab) != tokenizer.n_vocab
        ):
            raise ValueError(
                f"the vocabulary in {directory} has {tokenizer.n_vocab} ids, but the embedding has n_vocab = {n_vocab} "
                "rows: the vocabulary belongs to another model"
            )
    return tokenizer


def has_vocabulary(source: str | os.PathLike) -> bool:
    """Return whether a source has at least one file of a vocabulary.

    Raises:
      FileNotFoundError, ValueError, OSError: the source cannot be found or fetched.
    """
    return _any_of(runs.run_of(locate(source, "tokenizer")), (*OPENAI_FILES, *HUGGING_FACE_FILES))


def _any_of(directory: Path, names: Sequence[str]) -> bool:
    return any((directory / name).is_file() for name in names)


_CONFIGS = {
    "hparams.json": tensorflow.read_hparams,
    "config.json": huggingface.read_config,
    orbax.MANIFEST: orbax.read_config,
    runs.RUN: run_weights.read_config,
}
