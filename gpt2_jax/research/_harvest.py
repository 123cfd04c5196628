"""Activations of whole datasets: computed in batches of similar lengths, and streamed to files.

Shape letters: B batch, T query, W windows, N tokens of all documents.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gpt2_jax import activations, files, progress
from gpt2_jax.checkpoints.fingerprints import fingerprint
from gpt2_jax.checks import choice, whole_number
from gpt2_jax.config import GPT2Config
from gpt2_jax.jax_defaults import with_own_arrays
from gpt2_jax.model import check_params
from gpt2_jax.params import Params
from gpt2_jax.research import stored
from gpt2_jax.research._harvest_files import Writer, begin, missing_shards, remove_leftovers, tell_size
from gpt2_jax.research._harvest_plan import Batch, Plan, batches, make_plan
from gpt2_jax.research._harvest_program import Program, memory_told

SHARD_BYTES = 2**28
MEASURED = 8  # batches after which the time is told


def _nothing(*_: Any) -> None:
    pass


@with_own_arrays
def harvest(
    config: GPT2Config,
    params: Params,
    documents: Sequence[Sequence[int] | np.ndarray],
    folder: str | os.PathLike,
    capture: str | Sequence[str],
    *,
    store_dtype: str = "float32",
    max_tokens: int | None = None,
    skip_first: int = 0,
    shard_bytes: int = SHARD_BYTES,
    checksums: bool = False,
    about: Mapping[str, Any] | None = None,
    shown: bool | None = None,
    tell: Callable[[str], None] = _nothing,
    check: Callable[[], None] = _nothing,
) -> stored.StoredActivations:
    """Write the activations of all tokens of a dataset: `harvest(config, params, ids, "out", "resid_post$")`.

    A document of more than `max_tokens` tokens is read in windows of `max_tokens` that follow one another. Each window
    is read alone, from position 0 on, so its first tokens have little context. Windows of similar lengths run together,
    padded to one of a few lengths; each of those compiles once. The next batch is started before the values of the last
    one are fetched, and a thread writes a shard while the next one is computed. Only the blocks up to the last captured
    activation are computed.

    After a kill at any moment, the same call continues after the last whole shard, and gives the files of a call that
    was not interrupted. A shard is whole or absent. The call does nothing if the folder is complete. The ids of all
    documents and two shards are in memory.

    `gpt2_jax.research.stored` describes the files.

    Args:
      config: the model's config.
      params: the model's params, on one device or on a mesh from `make_mesh`, which divides the rows of a batch.
      documents: token ids of each document, with one id or more.
      folder: the folder to write: absent, empty, or begun by the same call.
      capture: one regular expression or several; `gpt2_jax.activations.select` chooses the activations. attn/scores and
        attn/pattern have no fixed number of values per token, and are refused.
      store_dtype: float32, float16 or bfloat16. Computation is in `config.compute_dtype`.
      max_tokens: tokens of a window, from 1 to n_ctx; None means n_ctx.
      skip_first: leave out the first tokens of each window. They attend to little else than themselves, and the first
        has far larger activations than all others (Xiao et al. 2023, arXiv:2309.17453).
      shard_bytes: bytes of a shard; a shard has at least one window.
      checksums: record a sha256 of each file, for `StoredActivations.check`.
      about: more entries for the manifest, which JSON can hold: names of the model and the texts.
      shown: show a progress bar on standard error; None shows it only on a terminal.
      tell: is called with each message: the size before anything is computed, the time after some batches, and how many
        programs were compiled at the end.
      check: is called before each batch; it may raise an exception.

    Returns:
      The reader of the folder.

    Raises:
      ValueError: an argument is invalid, no token is left, the folder was begun by another call, or a value is NaN,
        infinite or too large for `store_dtype`.
      FileExistsError: the folder has other files.
      OSError: the disk has less room than the activations need, or files cannot be written.
      MemoryError: the device has too little memory.
    """
    names = check_capture(config, capture)
    dtype = stored.DTYPES[choice("store_dtype", store_dtype, stored.DTYPES)]
    max_tokens = config.n_ctx if max_tokens is None else whole_number("max_tokens", max_tokens, 1, config.n_ctx)
    skip_first = whole_number("skip_first", skip_first, 0, max_tokens - 1)
    check_params(config, params, dtypes=False)
    row_shapes = {name: activations.shape(config, name, 1, 1)[2:] for name in names}
    row_bytes = sum(math.prod(shape) for shape in row_shapes.values()) * dtype.itemsize
    row_bytes += len(stored.INDEX) * stored.INDEX_DTYPE.itemsize
    rows_per_shard = max(max_tokens, whole_number("shard_bytes", shard_bytes, 1) // row_bytes)
    plan = make_plan(config, documents, max_tokens, skip_first, rows_per_shard)
    program = Program(config, params, names, dtype, row_bytes)
    described = {
        name: {"axes": activations.axes(name)[2:], "shape": list(shape), "dtype": dtype.name}
        for name, shape in row_shapes.items()
    }
    manifest = {
        "gpt2_jax_activations": stored.VERSION,
        **dict(about or {}),
        "params": fingerprint(config, params),
        "documents": {"count": len(documents), "tokens": len(plan.id_N), "sha256": plan.digest},
        "activations": described,
        "windows": {"max_tokens": max_tokens, "skip_first": skip_first, "rows_per_shard": rows_per_shard},
        "computed": program.described,
        "checksums": bool(checksums),
        "shards": plan.counts,
    }
    path = files.expanded(folder)
    tell_size(path, plan, missing_shards(path, manifest), row_bytes, tell)
    begin(path, manifest)
    busy = ValueError(f"another process is writing to {path}")
    with files.lock(path / ".lock", busy), progress.bars("percent", "left", shown=shown) as bars:
        remove_leftovers(path)
        left = missing_shards(path, manifest)
        _run(program, plan, left, Writer(path, plan, row_shapes, dtype, bool(checksums)), bars, tell, check)
    return stored.open_activations(path)


def check_capture(config: GPT2Config, capture: str | Sequence[str]) -> tuple[str, ...]:
    """Return the activations to store.

    Raises:
      ValueError: as `select`; or an activation has no fixed number of values per token.
    """
    names = activations.select(config, capture)
    if not names:
        raise ValueError("capture is empty: name activations, such as resid_post$")
    for name in names:
        if "S" in activations.axes(name):
            raise ValueError(
                f"{name} has as many values per token as its text has tokens, and cannot be stored as [n_tokens, ...]: "
                "leave it out, and compute it from attn/q and attn/k"
            )
    return tuple(names)


def _run(
    program: Program,
    plan: Plan,
    shards: Sequence[int],
    writer: Writer,
    bars: progress.Bars,
    tell: Callable[[str], None],
    check: Callable[[], None],
) -> None:
    """Compute and write the shards."""
    total = sum(plan.counts)
    done = total - sum(plan.counts[i] for i in shards)
    clock = _Clock(total - done, tell)
    with contextlib.closing(_computed(program, plan, shards, clock, check)) as results, writer:
        for batch, values in results:
            done += writer.put(batch, values)
            clock.after(total - done)
            bars.update("activations", done, total)
    if clock.lengths:
        lengths = ", ".join(map(str, sorted(clock.lengths)))
        tell(f"programs: {len(clock.lengths)}, for texts of up to {lengths} tokens")


def _computed(
    program: Program, plan: Plan, shards: Sequence[int], clock: _Clock, check: Callable[[], None]
) -> Generator[tuple[Batch, dict[str, np.ndarray]], None, None]:
    """Yield each batch with its values. The next batch has been started by then."""
    waiting: list[tuple[Batch, Any]] = []
    for batch in batches(plan, shards, program.tokens_per_call, program.n_devices):
        check()
        with clock.starting(batch.n_tokens):
            waiting.append((batch, program.start(plan, batch)))
        if len(waiting) > 1:
            yield _fetched(plan, *waiting.pop(0))
    for batch, results in waiting:
        yield _fetched(plan, batch, results)


def _fetched(plan: Plan, batch: Batch, results: Any) -> tuple[Batch, dict[str, np.ndarray]]:
    with memory_told(batch):
        values, finite = jax.device_get(results)
    for name, finite_B in finite.items():
        if not finite_B.all():
            document = plan.document_W[batch.windows[np.argmin(finite_B)]]
            dtype = values[name].dtype
            raise ValueError(f"{name} is NaN, infinite or too large for {dtype} in text {document}, counted from 0")
    return batch, values


class _Clock:
    """Measures how long batches take without compilation, and tells the time that is left once."""

    def __init__(self, n_rows: int, tell: Callable[[str], None]):
        self.n_rows, self.tell = n_rows, tell
        self.lengths: set[int] = set()
        self.compiling = 0.0
        self.n_batches = 0
        self.begin = 0.0
        self.rows_at_begin = 0

    @contextlib.contextmanager
    def starting(self, n_tokens: int) -> Iterator[None]:
        """Measure the time of the block if it compiles."""
        begin, compiles = time.perf_counter(), n_tokens not in self.lengths
        self.lengths.add(n_tokens)
        yield
        self.compiling += time.perf_counter() - begin if compiles else 0

    def after(self, n_left: int) -> None:
        """Note that a batch has ended, and that `n_left` rows are left."""
        self.n_batches += 1
        if self.n_batches == 1:
            self.begin, self.rows_at_begin, self.compiling = time.perf_counter(), n_left, 0.0
        elif self.n_batches == MEASURED + 1 and n_left:
            seconds = max(time.perf_counter() - self.begin - self.compiling, 1e-6)
            speed = (self.rows_at_begin - n_left) / seconds
            self.tell(f"time: about {_duration(n_left / speed)}, at {speed:,.0f} tokens per second")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
