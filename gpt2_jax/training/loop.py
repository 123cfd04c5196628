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
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt2_jax.checkpoints import runs
from gpt2_jax.checkpoints.folders import expanded
from gpt2_jax.checkpoints.saving import save
from gpt2_jax.config import GPT2Config
from gpt2_jax.generation import generate
from gpt2_jax.params import Params
from gpt2_jax.sharding import DATA, make_mesh
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.training.batch import Batch
from gpt2_jax.training.checkpoints import Checkpoints
from gpt2_jax.training.curve import plot_curve
from gpt2_jax.training.data import batches, windows
from gpt2_jax.training.memory import gigabytes
from gpt2_jax.training.recipe import Recipe
from gpt2_jax.training.records import read_records
from gpt2_jax.training.report import Report
from gpt2_jax.training.run_folder import read_run, write_run
from gpt2_jax.training.signals import Stop, stopping
from gpt2_jax.training.start import check_data, check_model
from gpt2_jax.training.step import (
    TrainState,
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
    model_params,
    training_config,
)
from gpt2_jax.training.token_files import Prepared
from gpt2_jax.training.verbatim import verbatim_shares

SEARCHED = 10**8  # tokens of the training text that samples are compared with, at most
METRICS, SAMPLES, CURVE = "metrics.jsonl", "samples.jsonl", "loss.png"


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

    """

    params: Params
    step: int
    best_step: int | None
    best_loss: float
    stopped: str = ""
    signal: str | None = None


def fit(
    config: GPT2Config,
    params: Params,
    data: Prepared,
    run_dir: str | os.PathLike,
    recipe: Recipe,
    tokenizer: Tokenizer | None = None,
) -> Fitted:
    """Train a model, or go on where a run in `run_dir` ended, was stopped or was killed.

    A resumed run does what one that was never interrupted would have done, bit for bit on the same devices. Ctrl-C and
    SIGTERM save and return; a kill loses the steps since the last save. With more `steps` than before it goes on with
    the learning rates of a run of so many from the beginning: where they have fallen already, that is a step up.

    Args:
      config: of the model; the recipe's dropout and dtypes take the place of its own.
      params: to start from, `load(...)[1]` or `init_params(...)`; they are copied.
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
        self.config, self.data, self.run_dir, self.recipe, self.tokenizer = config, data, run_dir, recipe, tokenizer
        self.mesh, self.checkpoints, self.report, self.stop, self.state = mesh, checkpoints, report, stop, state
        self.n_tokens = recipe.data.n_tokens or config.n_ctx
        self.train_step = make_train_step(config, recipe, mesh)
        self.eval_step = make_eval_step(config, recipe, mesh)
        self.pending: tuple[int, dict[str, Any], float] | None = None
        self.why, self.missed = "", False  # missed: a signal kept something from being done that was due
        self.best_step, self.best_loss, self.n_worse, self.evaluated = self._evaluated_so_far()
        self.sampled = max((record["step"] for record in read_records(run_dir / SAMPLES)), default=0)

    def run(self, first_step: int) -> Fitted:
        """Take all steps from `first_step` on, and do what is due between them."""
        last = self.recipe.steps
        if first_step >= last:
            self.report.message(f"all {last:,} steps are done; with more, --steps {2 * last} say, the run goes on")
        elif first_step:
            self.report.message(f"going on after step {first_step:,}")
        self._look(first_step)  # at a state that was saved when a signal came, what was due may be missing
        self._check_patience()
        saved, step = first_step, first_step
        with contextlib.closing(self._batches(first_step)) as stream:
            while step < last and not self.stop and not self.why:
                step = self._step(step, next(stream))
                self._look(step)
                if _due(step, self.recipe.monitor.save_every, last):
                    self._fetch()
                    self.checkpoints.save(step, self.state)
                    saved = step
        self._fetch()
        if saved != step:
            self.checkpoints.save(step, self.state)
        self.checkpoints.wait()
        return self._fitted(step)

    def _fitted(self, step: int) -> Fitted:
        signal = self.stop.signal if step < self.recipe.steps or self.missed else None
        why = self.why or (f"{signal} came" if signal else "")
        if why:
            saved = "which is saved" if step else "before the first: nothing is saved"
            self.report.message(f"stopped after step {step:,}, {saved}: {why}")
        if self.best_step is not None:
            best = f"the best validation loss is {self.best_loss:.4f}, after step {self.best_step:,}"
            if self.n_worse:
                counted = "one evaluation" if self.n_worse == 1 else f"{self.n_worse} evaluations"
                best += f"; {counted} since found no better: the model overfits"
            self.report.message(best)
        return Fitted(model_params(self.state, self.recipe), step, self.best_step, self.best_loss, why, signal)

    # ---- a step

    def _batches(self, first_step: int) -> Iterator[Batch]:
        """Yield what each step reads, on the devices."""
        index, count = jax.process_index(), jax.process_count()
        recipe = self.recipe
        sharding = NamedSharding(self.mesh, PartitionSpec(None, DATA))

        def place(array: np.ndarray) -> jax.Array:
            parts = array.reshape(recipe.accumulate, -1, array.shape[-1])
            return jax.make_array_from_process_local_data(sharding, parts)

        stream = batches(self.data.train, self.n_tokens, recipe.batch_size, recipe.seed, first_step, index, count)
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
        if values["skipped"]:
            monitor = self.recipe.monitor
            finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
            choice = monitor.on_spike if finite else monitor.on_nan
            what = "a spike in the loss" if finite else "the loss or its gradient is not a finite number"
            self.report.message(f"step {step:,} changed nothing: {what} ({values['loss']:.4g}; {choice})")
            if choice == "stop":
                # The next is on its way already, and may be no better: the first is the reason.
                self.why = self.why or f"{what} at step {step:,}"

    last_end = -math.inf

    # ---- what is due between steps

    def _look(self, step: int) -> None:
        """Evaluate and sample, if that is due at this step and has not been done before."""
        monitor, last = self.recipe.monitor, self.recipe.steps
        if self.data.val is not None and _due(step, monitor.evaluate_every, last) and self.evaluated != step:
            self._evaluate(step)
        prompts = monitor.prompts if step and self.tokenizer is not None else ()
        if prompts and _due(step, monitor.sample_every, last) and self.sampled != step:
            self._sample(step)

    def _evaluate(self, step: int) -> None:
        """Measure the validation loss; keep the model if it is the best so far, and stop if patience is at its end."""
        self._fetch()
        loss = self._validation_loss()
        if loss is None:
            self.missed = True
            return
        best = loss < self.best_loss  # NaN is not
        if best:
            self.best_step, self.best_loss, self.n_worse = step, loss, 0
            save(self.run_dir / runs.BEST, *self._kept(), "orbax", self.tokenizer)
        else:
            self.n_worse += 1
        self.report.evaluation(step, loss, math.exp(loss) if loss < 700 else loss, best)
        self._check_patience()

    def _check_patience(self) -> None:
        patience = self.recipe.monitor.patience
        if patience and self.n_worse >= patience:
            best = "none was finite" if self.best_step is None else f"no better than step {self.best_step:,}"
            self.why = f"{self.n_worse} evaluations in a row: {best}"

    def _validation_loss(self) -> float | None:
        """Return nats a token over the fixed windows; None if a signal came meanwhile."""
        rows = -(-self.recipe.batch_size // (self.recipe.accumulate * self.mesh.shape[DATA])) * self.mesh.shape[DATA]
        params, nats, weights = self._params(), jnp.float32(0), jnp.float32(0)
        for batch in windows(self.data.val, self.n_tokens, rows, self.recipe.monitor.evaluate_windows):
            if self.stop:
                return None
            part_nats, part_weights = self.eval_step(params, batch)
            nats, weights = nats + part_nats, weights + part_weights
        return float(nats) / max(float(weights), 1.0)

    def _sample(self, step: int) -> None:
        """Continue the prompts, with the same draws each time, and say how much of it stands in the training text."""
        monitor = self.recipe.monitor
        if self.stop:
            self.missed = True
            return
        self._fetch()
        prompts = [self.tokenizer.encode(prompt) or [self.tokenizer.eot] for prompt in monitor.prompts]
        settings = {"temperature": 1.0, "top_k": 40, "seed": self.recipe.seed, "stop_ids": [self.tokenizer.eot]}
        rows = generate(self.config, self._params(), prompts, monitor.sample_tokens, overflow="slide", **settings)
        overlaps = verbatim_shares(rows, self.data.train, at_most=SEARCHED)
        for prompt, row, overlap in zip(monitor.prompts, rows, overlaps, strict=True):
            self.report.sample(step, prompt, self.tokenizer.decode(row))
            self.report.message(str(overlap))

    def _params(self) -> Params:
        return model_params(self.state, self.recipe)

    def _kept(self) -> tuple[GPT2Config, Params]:
        """Return config and params as they are kept: float32, also after training in more."""
        config = self.config.replace(param_dtype="float32", compute_dtype="float32")
        return config, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), self._params())

    def _evaluated_so_far(self) -> tuple[int | None, float, int, int | None]:
        """Return step and loss of the best evaluation yet, how many came after it, and the step of the last."""
        step, loss, n_worse, last = None, math.inf, 0, None
        for record in read_records(self.run_dir / METRICS):
            if "val_loss" not in record:
                continue
            last, value = record["step"], record["val_loss"]
            if value is not None and value < loss:
                step, loss, n_worse = last, value, 0
            else:
                n_worse += 1
        return step, loss, n_worse, last


def _due(step: int, every: int, last: int) -> bool:
    """Say whether something that happens every so many steps, and at the last, is due; 0 is never."""
    return bool(every) and (step % every == 0 or step == last)
