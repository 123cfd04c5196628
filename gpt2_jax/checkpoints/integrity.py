"""What a checkpoint says of itself: the config and a sha256 of each tensor, under a digest of their own."""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import DROPOUT_RATES, HPARAMS, GPT2Config

Leaves = Iterator[tuple[str, np.ndarray]]
"""Every parameter once: its flat name ("h0/attn/c_attn/w") and its array on the host, in the params tree's shape."""

STORED_DTYPES = ("float32", "bfloat16", "float16")
KEPT = (*HPARAMS, *DROPOUT_RATES, "qkv_bias")


class DamagedError(ValueError):
    """The bytes of a checkpoint are not those that were written."""


def sha256(array: np.ndarray) -> str:
    """Return the sha256 of an array's bytes, row by row and little-endian, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def write_manifest(config: GPT2Config, hashes: Mapping[str, str], **more: Any) -> str:
    """Return as JSON: the config (compute_dtype is a choice of each run), each tensor's sha256, and their digest."""
    kept = {name: getattr(config, name) for name in KEPT} | {"param_dtype": config.param_dtype.name}
    manifest = {"config": kept, "sha256": dict(hashes), **more}
    return sealed(manifest)


def read_manifest(text: str, source: object) -> tuple[GPT2Config, dict[str, Any]]:
    """Return the config and the rest of what `write_manifest` wrote.

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
    """Check one tensor against the hash that was written with it, where there is one.

    Raises:
      DamagedError: it is another.
    """
    if hashes is not None and sha256(array) != hashes.get(name):
        raise DamagedError(f"{source} is damaged: {name} is not what was written (its sha256 is another)")


def stored_dtype(dtypes: Iterable[Any], source: object) -> np.dtype:
    """Return the dtype that most tensors have.

    Args:
      dtypes: anything with a `name`, for each tensor.
      source: for the message.

    Raises:
      ValueError: it is not float32, bfloat16 or float16.
    """
    (name, _), *_ = collections.Counter(dtype.name for dtype in dtypes).most_common(1) or [("nothing", 0)]
    if name not in STORED_DTYPES:
        raise ValueError(
            f"{source} holds {name}: tensors must be {', '.join(STORED_DTYPES[:-1])} or {STORED_DTYPES[-1]}"
        )
    return jnp.dtype(name)


def count_strange(array: np.ndarray) -> int:
    """Return how many values are NaN or infinite, looking at a million at a time."""
    flat = array.reshape(-1)
    chunks: Iterable[np.ndarray] = (flat[i : i + 2**20] for i in range(0, flat.size, 2**20))
    with np.errstate(invalid="ignore"):  # a signalling NaN is counted like any other
        return sum(chunk.size - int(np.count_nonzero(np.isfinite(chunk))) for chunk in chunks)


def one_line(error: BaseException) -> str:
    """Return what an error of another library says, on one line and not too long."""
    return " ".join(str(error).split())[:300]


def sealed(manifest: Mapping[str, Any]) -> str:
    """Return an object as JSON, with a sha256 of it all under "digest"."""
    return json.dumps({**manifest, "digest": _digest(manifest)})


def unsealed(text: str) -> dict[str, Any]:
    """Return the object that `sealed` was given.

    Raises:
      ValueError: the text is not what was written.
    """
    try:
        manifest = json.loads(text)
        digest = manifest.pop("digest")
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(one_line(error)) from error
    if digest != _digest(manifest):
        raise ValueError("it has another digest")
    return manifest


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
