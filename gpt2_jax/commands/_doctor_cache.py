"""What `gpt2-doctor` reports about the cache folder and the models in it. It writes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpt2_jax.commands._doctor_packages import Item
from gpt2_jax.commands._model import LARGEST
from gpt2_jax.files import cache_dir

_ELSEWHERE = "set GPT2_JAX_CACHE to another folder"


def cache() -> Item:
    """Return where the cache folder is and what it contains.

    Returns:
      path (None if there is none), exists, writable, bytes (of all files), free_bytes (of its disk); copies: number and
      bytes of the kept copies of TensorFlow checkpoints; compiled: path, number and bytes of the kept compiled
      programs, limit_bytes (None if JAX_COMPILATION_CACHE_DIR names the folder), and on; problem; do.
    """
    try:
        folder = cache_dir()
    except (OSError, ValueError) as error:
        return {"path": None, "problem": str(error), "do": _ELSEWHERE}
    ground = _nearest(folder)
    writable = ground.is_dir() and os.access(ground, os.W_OK | os.X_OK)
    return {
        "path": str(folder),
        "exists": folder.is_dir(),
        "writable": writable,
        "bytes": _count(folder.rglob("*"))["bytes"],
        "free_bytes": shutil.disk_usage(ground).free,
        "copies": _count((folder / "copies").glob("*.safetensors")),
        "compiled": _compiled(folder),
        "problem": None if writable else f"the cache folder cannot be written: {ground} is not a writable folder",
        "do": None if writable else _ELSEWHERE,
    }


def _compiled(folder: Path) -> dict[str, Any]:
    own = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    path = Path(own) if own else folder / "compiled"
    is_on = os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "true").lower() not in ("0", "false", "no", "off", "f", "n")
    programs = _count(path.glob("*-cache"))
    return {"path": str(path), "on": is_on, **programs, "limit_bytes": None if own else LARGEST}


def _nearest(folder: Path) -> Path:
    """Return the folder if it exists, else its nearest parent that exists."""
    return next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder.absolute())


def _count(paths: Iterable[Path]) -> dict[str, int]:
    """Return the number and bytes of files. Files that disappear meanwhile are left out."""
    sizes = [size for path in paths if (size := _size(path)) is not None]
    return {"number": len(sizes), "bytes": sum(sizes)}


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def releases() -> list[Item]:
    """Return which released sizes are in the cache folder.

    Returns:
      For each size: size; directory; state: "complete", "partial" or "absent"; bytes: of the files that are there;
      weights_bytes: of the complete weights; copy_bytes: of the kept copy, 0 without one; wrong: {file: what is wrong},
      for each file that is absent or wrong; do: the command that downloads the rest; problem: what is wrong with a
      partial size, else None.
    """
    from gpt2_jax.checkpoints.copies import copy_path
    from gpt2_jax.config import SIZES
    from gpt2_jax.release import download

    items = []
    for size, config in SIZES.items():
        directory = download.directory_of(size)
        names = [directory / f"{name}{suffix}" for name in download.FILES for suffix in ("", ".part")]
        there = _count(names)
        wrong = wrong_files(size, directory)
        state = "absent" if not there["number"] else "partial" if wrong else "complete"
        items.append(
            {
                "size": size,
                "directory": str(directory),
                "state": state,
                "bytes": there["bytes"],
                "weights_bytes": 4 * config.n_params,
                "copy_bytes": _size(copy_path(directory)) or 0,
                "wrong": wrong,
                "problem": _problem(size, directory, wrong) if state == "partial" else None,
                "do": f"gpt2-download {size}" if wrong else None,
            }
        )
    return items


def _problem(size: str, directory: Path, wrong: dict[str, str]) -> str:
    absent = [name for name in wrong if not (directory / name).exists()]
    parts = [f"{name}: {what}" for name, what in wrong.items() if name not in absent]
    parts += [f"absent: {', '.join(absent)}"] if absent else []
    return f"{size} is not complete ({'; '.join(parts)})"


def wrong_files(size: str, directory: Path) -> dict[str, str]:
    """Return {file: what is wrong} for the absent and wrong files of a released size. Tensors are not read."""
    from gpt2_jax.release import download

    found = {name: expected.wrong(directory / name) for name, expected in download.expectations(size).items()}
    return {name: what for name, what in found.items() if what is not None}


def embedded_model() -> list[Item]:
    """Return where the embedded model is. There is a problem if one of its files is absent."""
    import gpt2_jax
    from gpt2_jax.release import download

    directory = gpt2_jax.embedded_model()
    absent = [name for name in download.FILES if not (directory / name).is_file()]
    problem = f"the embedded model is not complete: {directory} lacks {', '.join(absent)}" if absent else None
    return [{"path": str(directory), "problem": problem, "do": "install gpt2-jax again" if absent else None}]
