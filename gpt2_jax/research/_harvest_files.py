"""The folder of stored activations: begun, continued, and written shard by shard in a thread."""

from __future__ import annotations

import concurrent.futures
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax import files
from gpt2_jax.research import stored
from gpt2_jax.research._harvest_plan import Batch, Plan

DIFFERENCES = {
    "params": "another model",
    "documents": "other texts",
    "activations": "other activations, or another dtype for them",
    "windows": "another max_tokens, skip_first or shard size",
    "computed": "another device, compute dtype or version of JAX",
    "checksums": "another choice of checksums",
}


def missing_shards(path: Path, manifest: Mapping[str, Any]) -> list[int]:
    """Return the numbers of the shards that are still to be written. Nothing is written.

    Raises:
      FileExistsError: the folder has other files.
      ValueError: it was begun by another call.
    """
    if not (path / stored.MANIFEST).is_file():
        files.check_replaceable(path, "stored activations", lambda names: names)
    else:
        there, own = stored.read_manifest(path), json.loads(json.dumps(manifest))
        if other := next((what for name, what in DIFFERENCES.items() if there.get(name) != own[name]), None):
            raise ValueError(
                f"{path} was begun with {other}: repeat the command that began it to continue, or choose another folder"
            )
    return [i for i in range(len(manifest["shards"])) if not (path / stored.shard_name(i)).is_dir()]


def begin(path: Path, manifest: Mapping[str, Any]) -> None:
    """Create the folder with its manifest, unless it has one."""
    if (path / stored.MANIFEST).is_file():
        return

    def check() -> None:
        files.check_replaceable(path, "stored activations", lambda names: names)

    with files.replacing(path, check) as new:
        (new / stored.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def remove_leftovers(path: Path) -> None:
    """Remove the parts of shards that killed processes have left. The caller holds the lock."""
    for leftover in path.glob(".shard-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def tell_size(path: Path, plan: Plan, left: Sequence[int], row_bytes: int, tell: Callable[[str], None]) -> None:
    """Tell how much is written.

    Raises:
      OSError: the disk has less room.
    """
    n_rows, n_left = sum(plan.counts), sum(plan.counts[i] for i in left)
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    n_bytes, free = n_left * row_bytes, shutil.disk_usage(there).free
    if plan.n_divided:
        tell(f"texts of more than {plan.max_tokens:,} tokens, which are read in windows: {plan.n_divided:,}")
    shards = f"{len(plan.counts):,} shard{'' if len(plan.counts) == 1 else 's'}"
    tell(f"size: {size(n_rows * row_bytes)}, {n_rows:,} tokens of {size(row_bytes)} each, in {shards}")
    if n_left < n_rows:
        tell(f"already there: {len(plan.counts) - len(left):,} of {shards}; left: {size(n_bytes)}")
    if n_bytes > free:
        raise OSError(
            f"the activations need {size(n_bytes)}, but the disk of {path} has {size(free)} left: capture fewer, store "
            "float16, or choose a folder on another disk"
        )


def size(n_bytes: float) -> str:
    """Return a number of bytes in words: 1.23 GB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:,.2f} {name}"
    return f"{n_bytes:.0f} bytes"


class Writer:
    """Collects the rows of a shard, and writes it in a thread while the next one is computed. A context manager."""

    def __init__(
        self, path: Path, plan: Plan, row_shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, checksums: bool
    ):
        self.path, self.plan, self.checksums = path, plan, checksums
        self.kinds = {name: (shape, stored.as_stored(dtype)) for name, shape in row_shapes.items()}
        self.shard, self.arrays, self.n_rows = -1, {}, 0
        self.pool = concurrent.futures.ThreadPoolExecutor(1)
        self.writing: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        with self.pool:  # a shard that is being written is finished
            self._wait()

    def put(self, batch: Batch, values: Mapping[str, np.ndarray]) -> int:
        """Put the rows of a batch into their places. Return their number."""
        plan = self.plan
        if batch.shard != self.shard:
            self.shard, self.n_rows = batch.shard, 0
            kinds = self.kinds | dict.fromkeys(stored.INDEX, ((), stored.INDEX_DTYPE))
            self.arrays = {
                name: np.empty((plan.counts[batch.shard], *shape), dtype) for name, (shape, dtype) in kinds.items()
            }
        n_before = self.n_rows
        for b, w in enumerate(batch.windows):
            skipped, length = plan.skip_first, int(plan.length_W[w])
            rows = slice(plan.row_W[w], plan.row_W[w] + length - skipped)
            for name, (_, dtype) in self.kinds.items():
                self.arrays[name][rows] = values[name][b, skipped:length].view(dtype)
            self.arrays["tokens"][rows] = plan.id_N[plan.offset_W[w] + skipped :][: length - skipped]
            self.arrays["document"][rows] = plan.document_W[w]
            self.arrays["position"][rows] = plan.position_W[w] + np.arange(skipped, length)
            self.n_rows += length - skipped
        if self.n_rows == plan.counts[batch.shard]:
            self._wait()
            self.writing = self.pool.submit(self.write, batch.shard, self.arrays)
            self.arrays = {}
        return self.n_rows - n_before

    def _wait(self) -> None:
        if self.writing is not None:
            self.writing.result()

    def write(self, shard: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a shard in one step."""
        with files.replacing(self.path / stored.shard_name(shard)) as new:
            for name, array in arrays.items():
                path = new / f"{name}.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:  # numpy.save does not say that a disk is full
                    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
                    file.write(array.reshape(-1).view(np.uint8).data)
            if self.checksums:
                digests = files.hash_files(new)
                (new / stored.DIGESTS).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
