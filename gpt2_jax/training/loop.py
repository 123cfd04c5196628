"""`fit`: a whole training run, which can be stopped, killed and resumed at any step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt2_jax.checkpoints import runs
from gpt2_jax.checkpoints.runs import read_run, write_run
from gpt2_jax.config import GPT2Config
from gpt2_jax.data.batching import Batch, batches
from gpt2_jax.data.token_files import Prepared
from gpt2_jax.files import expanded
from gpt2_jax.params import Params
from gpt2_jax.recipe import Recipe
from gpt2_jax.sharding import DATA, make_mesh
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.training.checkpoints import Checkpoints
from gpt2_jax.training.curve import plot_curve
from gpt2_jax.training.memory import gigabytes
from gpt2_jax.training.observer import METRICS, Observer, due
from gpt2_jax.training.records import read_records
from gpt2_jax.training.report import Report
from gpt2_jax.training.signals import Stop, stopping
from gpt2_jax.training.start import check_data, check_model
from gpt2_jax.training.step import (
    TrainState,
    abstract_state,
    init_state,
    make_train_step,
    model_params,
    training_config,
)

MOST_SKIPPED = 100  # steps in a row that change nothing, before a run ends that would skip for ever
CURVE = "loss.png"


@dataclasses.dataclass(frozen=True)
class Fitted:
    """How a run ended.

    Attributes:
      params: the model's, after the last step; on the devices of the run's mesh.
      step: optimizer steps done, in this run and those that it resumed.
      best_step: the step of the best validation loss; None where none was measured.
      best_loss: that loss in nats a token.
      stopped: why it ended before its last step; "" where it did not.
      signal: the signal among these reasons, "SIGINT" say.
      failed: whether the reason is a loss that is no number, or a spike.

    """

    params: Params
    step: int
    best_step: int | None
    best_loss: float
    stopped: str = ""
    signal: str | None = None
    failed: bool = False


def fit(
    config: GPT2Config,
    params: Params | None,
    data: Prepared,
    run_dir: str | os.PathLike,
    recipe: Recipe,
    tokenizer: Tokenizer | None = None,
) -> Fitted:
    """Train a model, or go on where a run in `run_dir` ended, was stopped or was killed.

    A resumed run does what one that was never interrupted would have done: bit for bit on a CPU, and on accelerators as
    far as XLA's programs give the same twice (on GPUs --xla_gpu_deterministic_ops makes them). Ctrl-C and SIGTERM save
    and return; a kill loses the steps since the last save. With more `steps` than before it goes on with
    the learning rates of a run of so many from the beginning: where they have fallen already, that is a step up.

    Args:
      config: of the model; the recipe's dropout and dtypes take the place of its own.
      params: to start from, `load(...)[1]` or `init_params(...)`; they are copied. None goes on with a run alone.
      data: `open_prepared(folder)`.
      run_dir: the run's folder: checkpoints, the best model, metrics, samples, the loss curve. `load(run_dir)` and
        `load_tokenizer(run_dir)` take it.
      recipe: everything else; `recipe.model.source` and `recipe.data.path` are taken for granted here.
      tokenizer: for the samples, and to be kept with the model; None writes no samples.

    Returns:
      Fitted.

    Raises:
      ValueError: recipe, model, data and devices do not fit together, the run in `run_dir` is another one, or the
        memory of the devices is too small.
      OSError: something cannot be written.

    """
    if jax.process_count() > 1:
        raise ValueError("fit runs in one process with all its devices; train_step can be used from several")
    config = training_config(config, recipe)
    mesh = make_mesh(recipe.mesh.data, recipe.mesh.model)
    memory = check_model(config, recipe, tokenizer, mesh)
    check_data(config, recipe, data)
    run_dir = expanded(run_dir)
    begun = read_run(run_dir).recipe if runs.is_run(run_dir) else recipe
    write_run(run_dir, config, recipe, {"sha256": data.digests()}, tokenizer)
    with Checkpoints(run_dir) as checkpoints:
        first_step = checkpoints.latest() or 0
        if first_step:
            state = checkpoints.restore(abstract_state(config, recipe, mesh))
        else:
            _check_new(run_dir, recipe, params)
            state = init_state(config, recipe, params, mesh)
        devices = list(mesh.devices.flat)
        with Report(run_dir, recipe, config, first_step, devices) as report, stopping() as stop:
            parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in memory.items() if size and name != "total")
            report.message(f"each device needs about {gigabytes(memory['total'])} of memory: {parts}")
            if begun.steps != recipe.steps:
                was = f"the run was begun with steps = {begun.steps:,} and has {recipe.steps:,} now"
                report.message(f"{was}: the learning rate goes on as in a run of so many from the beginning")
            run = _Run(config, data, run_dir, recipe, tokenizer, mesh, checkpoints, report, stop, state)
            fitted = run.run(first_step)
    plot_curve(run_dir / METRICS, run_dir / CURVE)
    return fitted


def _check_new(run_dir: Path, recipe: Recipe, params: Params | None) -> None:
    """Check that there is something to begin with, and nothing that would be lost."""
    if params is None:
        raise ValueError(f"{run_dir} holds no checkpoint to go on from: pass params")
    path = run_dir / METRICS
    reached = max((record["step"] for record in read_records(path)), default=0) if path.exists() else 0
    if reached > 2 * recipe.monitor.save_every > 0:  # by then the first was complete
        raise ValueError(
            f"{run_dir} has metrics up to step {reached:,}, but no checkpoint any more: it cannot go on, and would "
            "begin anew over what there is; choose another folder"
        )


class _Run:
    """A run while it goes on. Metrics of a step are fetched when the next one has been dispatched."""

    def __init__(
        self,
        config: GPT2Config,
        data: Prepared,
        run_dir: Path,
        recipe: Recipe,
        tokenizer: Tokenizer | None,
        mesh: Mesh,
        checkpoints: Checkpoints,
        report: Report,
        stop: Stop,
        state: TrainState,
    ):
        self.data, self.recipe, self.mesh, self.checkpoints = data, recipe, mesh, checkpoints
        self.report, self.stop, self.state = report, stop, state
        self.n_tokens = recipe.data.n_tokens or config.n_ctx
        self.train_step = make_train_step(config, recipe, mesh)
        self.observer = Observer(config, data, run_dir, recipe, tokenizer, mesh, report, stop)
        self.pending: tuple[int, dict[str, Any], float] | None = None
        self.last_end = -math.inf  # of a step, in seconds
        self.why, self.failed, self.n_skipped = "", False, 0

    def run(self, first_step: int) -> Fitted:
        """Take all steps from `first_step` on, and do what is due between them."""
        last = self.recipe.steps
        if first_step >= last:
            self.report.message(f"all {last:,} steps are done; with more, --steps {2 * last} say, the run goes on")
        elif first_step:
            self.report.message(f"going on after step {first_step:,}")
        self._look(first_step)  # at a state that was saved when a signal came, what was due may be missing
        saved, step = first_step, first_step
        with contextlib.closing(self._batches(first_step)) as stream:
            while step < last and not self.stop and not self.why:
                step = self._step(step, next(stream))
                self._look(step)
                if due(step, self.recipe.monitor.save_every, last):
                    self._fetch()
                    self.checkpoints.save(step, self.state)
                    saved = step
        self._fetch()
        if saved != step:
            self.checkpoints.save(step, self.state)
        self.checkpoints.wait()
        return self._fitted(step)

    def _look(self, step: int) -> None:
        """Let the observer do what is due at this step, once all before it is known and well."""
        if self.observer.is_due(step):
            self._fetch()
        if not self.why:
            self.observer.look(step, self.state)
            self.why = self.observer.out_of_patience()

    def _fitted(self, step: int) -> Fitted:
        observer = self.observer
        signal = self.stop.signal if step < self.recipe.steps or observer.missed else None
        why = self.why or (f"{signal} came" if signal else "")
        if why:
            saved = "which is saved" if step else "before the first: nothing is saved"
            self.report.message(f"stopped after step {step:,}, {saved}: {why}")
        observer.sum_up()
        params = model_params(self.state, self.recipe)
        return Fitted(params, step, observer.best_step, observer.best_loss, why, signal, self.failed)

    # ---- a step

    def _batches(self, first_step: int) -> Iterator[Batch]:
        """Yield what each step reads, on the devices."""
        recipe = self.recipe
        sharding = NamedSharding(self.mesh, PartitionSpec(None, DATA))

        def place(array: np.ndarray) -> jax.Array:
            parts = array.reshape(recipe.accumulate, -1, array.shape[-1])
            return jax.device_put(parts, sharding)

        stream = batches(self.data.train, self.n_tokens, recipe.batch_size, recipe.seed, first_step)
        with contextlib.closing(stream):
            for batch in stream:
                yield jax.tree.map(place, batch)

    def _step(self, step: int, batch: Batch) -> int:
        """Dispatch one step, and report the one before it."""
        before, self.pending = self.pending, None
        started = time.monotonic()
        self.state, metrics = self.train_step(self.state, batch)
        if before is not None:
            self._told(*before)
        self.pending = (step + 1, metrics, started)
        return step + 1

    def _fetch(self) -> None:
        """Wait for the last step that was dispatched, and report it."""
        before, self.pending = self.pending, None
        if before is not None:
            self._told(*before)

    def _told(self, step: int, metrics: dict[str, Any], started: float) -> None:
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        seconds, self.last_end = now - max(started, self.last_end), now
        n_tokens = self.recipe.batch_size * self.n_tokens
        self.report.step(step, values, n_tokens, seconds)
        self.n_skipped = self.n_skipped + 1 if values["skipped"] else 0
        if values["skipped"]:
            self._skipped(step, values)

    def _skipped(self, step: int, values: dict[str, Any]) -> None:
        """Say why a step changed nothing, and end the run if the recipe says so, or if it goes on like this."""
        monitor = self.recipe.monitor
        if not values["n_tokens"]:
            what, choice = "no target in its batch counts", "skip"
        elif math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            what, choice = f"the loss, {values['loss']:.4g}, is a spike", monitor.on_spike
        else:
            what, choice = "the loss or its gradient is not a finite number", monitor.on_nan
        self.report.message(f"step {step:,} changed nothing: {what}")
        if (choice == "stop" or self.n_skipped >= MOST_SKIPPED) and not self.why:  # the next is on its way already
            again = f" like the {MOST_SKIPPED - 1} before it" if choice != "stop" else ""
            self.failed = True
            self.why = f"step {step:,} changed nothing{again}: {what}; run again, it goes on behind it"
