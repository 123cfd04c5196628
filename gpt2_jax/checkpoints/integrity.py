"""Manifests: the config and a sha256 of each tensor, with a digest of the manifest itself."""

from __future__ import annotations

import collections
import hashlib
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import DROPOUT_RATES, HPARAMS, GPT2Config

Leaves = Iterator[tuple[str, np.ndarray]]
"""Every parameter once: its flat name ("h0/attn/c_attn/w") and its array on the host, with its shape in params.

An array need not be contiguous. Whoever yields or takes one lets go of it before the next one is read.
"""

STORED_DTYPES = ("float32", "bfloat16", "float16")
FLOATS = (*STORED_DTYPES, "float64")  # the dtypes that can be cast to one of those
KEPT = (*HPARAMS, *DROPOUT_RATES, "qkv_bias")


class DamagedError(ValueError):
    """The bytes of a checkpoint are not those that were written."""


class DtypeNeededError(ValueError):
    """The tensors are floats that can only be loaded if `load` is told a dtype."""


def sha256(array: np.ndarray) -> str:
    """Return the sha256 of an array's bytes in hexadecimal. The bytes are in row-major order and little-endian."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def write_manifest(config: GPT2Config, hashes: Mapping[str, str], **more: Any) -> str:
    """Return JSON with the config, the hashes, and a digest of all.

    The config is without compute_dtype, which each run chooses, and without the variants that the model does not use:
    a manifest of OpenAI's arithmetic is the same as before there were variants.
    """
    kept = {name: getattr(config, name) for name in KEPT} | config.variants | {"param_dtype": config.param_dtype.name}
    if config.labels:
        kept |= {"labels": config.labels, "pooling": config.pooling}
    manifest = {"config": kept, "sha256": dict(hashes), **more}
    return sealed(manifest)


def read_manifest(text: str, source: object) -> tuple[GPT2Config, dict[str, Any]]:
    """Return the config and the whole manifest from the text of `write_manifest`.

    Raises:
      DamagedError: the text is not what was written.
    """
    try:
        manifest = unsealed(text)
        return GPT2Config(**manifest["config"]), manifest
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(
            f"{source} is damaged: its list of tensors is not the one that was written ({error})"
        ) from error


def check_hash(name: str, array: np.ndarray, hashes: Mapping[str, str] | None, source: object) -> None:
    """Check one tensor against the hash that was written with it. Without hashes, nothing is checked.

    Raises:
      DamagedError: the hash differs, or is missing.
    """
    if hashes is not None and sha256(array) != hashes.get(name):
        raise DamagedError(f"{source} is damaged: {name} is not what was written (its sha256 differs)")


def stored_dtype(dtypes: Iterable[Any], source: object, wanted: np.dtype | None = None) -> np.dtype:
    """Return the dtype of the params that are loaded: the wanted one, or the one that most tensors have.

    Args:
      dtypes: one object with a `name` for each tensor.
      source: the file or folder to name in the message.
      wanted: the dtype to which the caller casts the tensors. None means that they keep their dtype.

    Raises:
      DtypeNeededError: most tensors are float64, and there is no wanted dtype.
      ValueError: the tensors are not float32, bfloat16 or float16. With a wanted dtype, float64 is accepted too.
    """
    names = [name for name, _ in collections.Counter(dtype.name for dtype in dtypes).most_common()] or ["float32"]
    if wanted is not None and set(names) <= set(FLOATS):
        return wanted
    if names[0] == "float64":
        raise DtypeNeededError(f'{source} holds float64: pass the dtype to load, as in dtype="float32"')
    if names[0] in STORED_DTYPES and wanted is None:
        return jnp.dtype(names[0])
    name = next(name for name in names if name not in FLOATS)
    raise ValueError(f"{source} holds {name}: tensors must be {', '.join(STORED_DTYPES[:-1])} or {STORED_DTYPES[-1]}")


def drain(arrays: dict[str, np.ndarray]) -> Leaves:
    """Yield every array, the largest first, and remove it from the dict, so that its memory can be freed."""
    for name in sorted(arrays, key=lambda name: -arrays[name].nbytes):
        yield name, arrays.pop(name)


def warn(message: str) -> None:
    """Warn the caller of this package: the warning names the first line outside it, which is not of functools."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and f"{frame.f_globals.get('__name__')}.".startswith(("gpt2_jax.", "functools.")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def count_non_finite(array: np.ndarray) -> int:
    """Return how many values are NaN or infinite. They are checked in chunks of 2^18."""
    flat = array.ravel("K")  # this does not copy a transposed array
    chunks: Iterable[np.ndarray] = (flat[i : i + 2**18] for i in range(0, flat.size, 2**18))
    with np.errstate(invalid="ignore"):  # a signaling NaN is counted like any other
        return sum(chunk.size - int(np.count_nonzero(np.isfinite(chunk))) for chunk in chunks)


def one_line(error: BaseException) -> str:
    """Return the message of another library's error on one line, cut to 300 characters."""
    return " ".join(str(error).split())[:300]


def sealed(manifest: Mapping[str, Any]) -> str:
    """Return an object as JSON, with its sha256 under "digest"."""
    return json.dumps({**manifest, "digest": _digest(manifest)})


def unsealed(text: str) -> dict[str, Any]:
    """Return the object that was passed to `sealed`.

    Raises:
      ValueError: the text is not what was written.
    """
    try:
        manifest = json.loads(text)
        digest = manifest.pop("digest")
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(one_line(error)) from error
    if digest != _digest(manifest):
        raise ValueError("its digest does not match")
    return manifest


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
