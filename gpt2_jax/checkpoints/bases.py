"""The frozen weights of a run with LoRA, its base. Checkpoints name them with a hash of each tensor, and hold the rest.

RUN/base holds them, written once by `parts`, unless the model that the run started from has them.
"""

from __future__ import annotations

import concurrent.futures
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax import processes
from gpt2_jax.checkpoints import orbax_arrays, parts, runs
from gpt2_jax.checkpoints.ahead import read_ahead
from gpt2_jax.checkpoints.integrity import DamagedError, Leaves, sha256
from gpt2_jax.files import expanded, put_in_place

Base = Mapping[str, Any]
"""As JSON: {"source": what `load` takes, or "" for RUN/base, "path": the absolute path of a local source or None,
"leaves": {name: [dtype, shape, sha256]}}."""
Open = Callable[[str, np.dtype], Leaves]
"""Opens the model of a source, to be cast to a dtype: `gpt2_jax.checkpoints.loading.open_leaves`."""


def describe(leaves: Iterable[tuple[str, Any]], dtype: Any = None) -> dict[str, list[Any]]:
    """Return {name: [dtype, shape, sha256]} of arrays, cast to a dtype if one is given. 500 MB take about 0.5 s."""

    def one(pair: tuple[str, Any]) -> list[Any]:
        array = np.asarray(pair[1], dtype)
        return [array.dtype.name, list(array.shape), sha256(array)]

    pairs = list(leaves)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # hashlib releases the GIL
        return {name: found for (name, _), found in zip(pairs, pool.map(one, pairs), strict=True)}


def of_source(source: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base whose tensors the model of a source has."""
    path = expanded(source)
    return {"source": source, "path": os.fspath(path.resolve()) if path.exists() else None, "leaves": dict(leaves)}


def of_run(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base that is in RUN/base."""
    return {"source": "", "path": None, "leaves": dict(leaves)}


def abstract(base: Base | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of a base's tensors; without a base, an empty dict."""
    leaves = {} if base is None else base["leaves"]
    return {name: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype)) for name, (dtype, shape, _) in leaves.items()}


def write(run_dir: Path, base: Base, flat: Mapping[str, jax.Array]) -> None:
    """Write RUN/base, unless it holds these tensors. With several processes, all of them call this.

    It is a model: `load` takes it too. `flat` has all params, also those that are not frozen.

    Raises:
      OSError: the folder cannot be written.
    """
    path = run_dir.resolve() / runs.BASE
    if processes.on_first(lambda: _holds(path, base)):
        return
    temporary = path.with_name(f".{runs.BASE}.saving")

    def clear() -> None:
        for leftover in parts.leftovers(temporary):
            shutil.rmtree(leftover, ignore_errors=True)

    def put() -> None:
        put_in_place(temporary, path)
        clear()  # the one that was replaced

    processes.on_first(clear)
    parts.start_writing(temporary, 0, {runs.PARAMS: flat}, tensors=base["leaves"])()
    processes.on_first(put)


def read(base: Base, run_dir: Path | None, open_model: Open, source: str = "") -> Leaves:
    """Read the tensors of a base onto the host, one after the other. Each is compared with its hash.

    Args:
      base: the base that a checkpoint names.
      run_dir: the run's folder; None if it is unknown.
      open_model: opens a model that is not in the run's folder.
      source: where that model is; "" means where run.json says.

    Raises:
      FileNotFoundError: the model is gone.
      DamagedError: it is another model now, or its files are damaged.
    """
    where = (run_dir or Path()) / runs.BASE if base["source"] == "" else _where(base, run_dir, source)
    shapes, missing = abstract(base), set(base["leaves"])
    advice = f"restore it, or set model.source in {runs.RUN} of the run to where it is now" if base["source"] else ""
    if isinstance(where, Path):
        leaves = _of_folder(where, shapes)
    else:
        try:
            leaves = open_model(where, next(iter(shapes.values())).dtype)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"LoRA was trained on {where}, which is gone: {advice} ({error})") from error
    changed = f"LoRA was trained on {where}, which has changed" + (f": {advice}" if advice else "")
    for name, leaf in leaves:
        if name not in missing:
            continue
        leaf = np.asarray(leaf, shapes[name].dtype)
        if leaf.shape != shapes[name].shape or sha256(leaf) != base["leaves"][name][2]:
            raise DamagedError(f"{changed} (the sha256 of {name} differs)")
        missing.remove(name)
        yield name, leaf
        del leaf  # before the next one is read
    if missing:
        raise DamagedError(f"{changed} ({min(missing)} is missing)")


def _where(base: Base, run_dir: Path | None, source: str) -> str:
    """Return where the model of a base is: the source, or what run.json says now.

    If that is what it was at first, it is the absolute path at that time, if that exists.
    """
    said = source or base["source"]
    if not source and run_dir is not None and runs.is_run(run_dir):
        said = runs.read_fields(run_dir)["recipe"].get("model", {}).get("source") or said
    path = base["path"] if said == base["source"] else None
    return path if path is not None and Path(path).exists() else said


def _of_folder(path: Path, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Leaves:
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is missing: it holds the frozen weights of a run with LoRA, copy it there too")
    parts.check_files(path, parts.read_manifest(path), (runs.PARAMS,))

    def read_one(name: str) -> np.ndarray:
        return orbax_arrays.read(
            path.resolve() / runs.PARAMS, name.replace("/", "."), shapes[name].dtype, shapes[name].shape
        )

    return read_ahead(shapes, read_one)


def _holds(path: Path, base: Base) -> bool:
    """Return whether a folder holds the tensors of a base, complete and undamaged."""
    try:
        manifest = parts.read_manifest(path)
        parts.check_files(path, manifest, (runs.PARAMS,))
    except DamagedError:
        return False
    return manifest.get("tensors") == base["leaves"]
