"""The model of a command: the option, its name in messages, its weights, and its compiled programs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

import gpt2_jax
from gpt2_jax.files import cache_dir

if TYPE_CHECKING:
    from gpt2_jax import GPT2Config
    from gpt2_jax.params import Params

LARGEST = 2**30  # bytes of compiled programs that are kept; the least recently used are deleted first
EMBEDDED = "the embedded Shakespeare model"

SIZES = "124M, 355M, 774M or 1558M"
OTHER_SOURCES = (
    "Or a folder with a model: OpenAI's or Hugging Face's files, Flax, Orbax, safetensors of nanoGPT, or a training "
    "run. Or one of several TensorFlow checkpoints (run1/model-1000), a model file of llm.c, or a hub id (owner/name "
    "or owner/name@revision)."
)
SOURCES = f"A size: {SIZES} (downloaded if it is not in the cache). {OTHER_SOURCES}"
"""What names a model, for --help. `gpt2_jax.checkpoints.locate` has the details."""

ModelOption = Annotated[
    str | None,
    tyro.conf.arg(metavar="MODEL", help_behavior_hint="(default: embedded)", help=SOURCES),
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16"] | None,
    tyro.conf.arg(metavar="{float32,bfloat16}", help_behavior_hint="(default: the checkpoint's)"),
]


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How many devices share the work. -1 means all that are left."""

    data: int = 1
    """Devices that share the rows of a batch. Each holds all weights, or its share of them along --mesh.model."""
    model: int = 1
    """Devices that share heads, neurons and weights. A model may then be larger than the memory of one device."""


def source(model: str | None) -> str | Path:
    """Return the model of the option, for `gpt2_jax.load`; None means the embedded one."""
    return gpt2_jax.embedded_model() if model is None else model


def title(model: str | None) -> str:
    """Return the model's name in messages."""
    return EMBEDDED if model is None else model


def load(model: str | None, dtype: str | None, mesh: Mesh) -> tuple[GPT2Config, Params]:
    """Return config and params, with `dtype` for storage and computation; None keeps the checkpoint's dtype.

    Raises:
      as `gpt2_jax.load`; ValueError too if the mesh does not fit the devices.
    """
    config, params = gpt2_jax.load(source(model), dtype=dtype, sharding=_shardings(model, mesh))
    return (config if dtype is None else config.replace(compute_dtype=dtype)), params


def _shardings(model: str | None, mesh: Mesh) -> Params | None:
    """Return where each parameter goes; None means the default device."""
    if mesh == Mesh():
        return None
    import jax

    from gpt2_jax.params import flatten, unflatten
    from gpt2_jax.sharding import DATA, make_mesh, param_shardings

    for name, n in dataclasses.asdict(mesh).items():
        if n < 1 and n != -1:
            raise ValueError(f"--mesh.{name} must be 1 or more, or -1 for all devices that are left, not {n}")
    if mesh.data == mesh.model == -1:
        raise ValueError("--mesh.data and --mesh.model cannot both be -1: set one of them")
    shapes = flatten(gpt2_jax.abstract_params(gpt2_jax.load_config(source(model))))
    own = make_mesh(mesh.data, mesh.model, jax.local_devices())  # each process has the whole model
    return unflatten(param_shardings(shapes, own, gathered=(DATA,)))


def keep_compiled() -> None:
    """Keep every program that is compiled from now on in the cache folder, and use the programs that are there.

    Call this before anything is compiled. JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false turns it off. If the cache folder cannot be written, nothing is kept, because JAX
    would warn about every program.
    """
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        try:
            directory = cache_dir() / "compiled"
            directory.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        if not os.access(directory, os.W_OK):
            return
        _remove_incomplete(directory)
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_compilation_cache_max_size", LARGEST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _remove_incomplete(directory: Path, age: float = 60) -> None:
    """Remove programs that a killed process did not write to the end: `NAME-cache` without `NAME-atime`.

    Because of one such file, JAX would keep no more programs, and warn about each. Files younger than `age` seconds may
    be those of a process that still writes.
    """
    complete = {path.name.removesuffix("-atime") for path in directory.glob("*-atime")}
    for path in directory.glob("*-cache"):
        if path.name.removesuffix("-cache") not in complete:
            with contextlib.suppress(OSError):  # another process may have removed it
                if time.time() - path.stat().st_mtime > age:
                    path.unlink()
