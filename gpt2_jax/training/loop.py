"""`fit`: a whole training run, which can be stopped, killed and resumed at any step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2_jax.checkpoints import runs
from gpt2_jax.data.batching import Batch, batches
from gpt2_jax.data.token_files import Prepared
from gpt2_jax.files import expanded
from gpt2_jax.params import Params
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.training.checkpoints import Checkpoints
from gpt2_jax.training.curve import plot_curve
from gpt2_jax.training.memory import check_memory, gigabytes
from gpt2_jax.training.observer import Observer, due
from gpt2_jax.training.plan import Plan
from gpt2_jax.training.records import METRICS, read_records
from gpt2_jax.training.report import Report
from gpt2_jax.training.signals import Stop, stopping
from gpt2_jax.training.start import check_data, check_tokenizer
from gpt2_jax.training.state import TrainState, model_params
from gpt2_jax.training.step import init_state, make_train_step

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
    plan: Plan, params: Params | None, data: Prepared, run_dir: str | os.PathLike, tokenizer: Tokenizer | None = None
) -> Fitted:
    """Train a model, or go on where a run in `run_dir` ended, was stopped or was killed.

    A resumed run does what one that was never interrupted would have done: bit for bit on a CPU, and on accelerators as
    far as XLA's programs give the same twice (on GPUs --xla_gpu_deterministic_ops makes them). Ctrl-C and SIGTERM save
    and return; a kill loses the steps since the last save. With more `steps` than before it goes on with
    the learning rates of a run of so many from the beginning: where they have fallen already, that is a step up.

    Args:
      plan: `make_plan(config, recipe)`, or what `start_model` gives; the recipe's `model.source` and `data.path` are
        not read.
      params: to start from, `load(...)[1]` or `init_params(...)`; they are copied. None goes on with a run alone.
      data: `open_prepared(folder)`.
      run_dir: the run's folder: checkpoints, the best model, metrics, samples, the loss curve. `load(run_dir)` and
        `load_tokenizer(run_dir)` take it.
      tokenizer: for the samples, and to be kept with the model; None writes no samples.

    Raises:
      ValueError: recipe, model, data and devices do not fit together, the run in `run_dir` is another one, or the
        memory of the devices is too small.
      OSError: something cannot be written.
    """
    if not isinstance(plan, Plan):
        raise ValueError(f"plan must be a Plan, make_plan(config, recipe), not a {type(plan).__name__}")
    if jax.process_count() > 1:
        raise ValueError("fit runs in one process with all its devices; train_step can be used from several")
    run_dir, n_steps, save_every = expanded(run_dir), plan.recipe.steps, plan.recipe.monitor.save_every
    memory = check_memory(plan)
    check_tokenizer(plan, tokenizer)
    check_data(plan, data)
    n_steps_before = runs.read_run(run_dir).recipe.steps if runs.is_run(run_dir) else n_steps
    runs.write_run(run_dir, plan.config, plan.recipe, {"sha256": data.digests()}, tokenizer)
    with contextlib.ExitStack() as resources:
        checkpoints = resources.enter_context(Checkpoints(run_dir))
        first_step = checkpoints.latest() or 0
        state = checkpoints.restore(plan.state) if first_step else _begin(plan, params, run_dir)
        report = resources.enter_context(Report(plan, run_dir, first_step))
        stop = resources.enter_context(stopping())
        _announce(report, memory, n_steps_before, n_steps, first_step)
        train_step = make_train_step(plan)
        steps = _Steps(plan, report)
        observer = Observer(plan, data, run_dir, tokenizer, report, stop)
        step = saved = first_step
        _observe(observer, steps, step, state)  # a signal may have come before what was due was done
        with contextlib.closing(_batches(plan, data, step)) as stream:
            while step < n_steps and not stop and not steps.why:
                batch, started = next(stream), time.monotonic()
                state, metrics = train_step(state, batch)
                step += 1
                steps.dispatched(step, metrics, started)
                _observe(observer, steps, step, state)
                if due(step, save_every, n_steps):
                    steps.fetch()
                    checkpoints.save(step, state)
                    saved = step
        steps.fetch()
        if saved != step:
            checkpoints.save(step, state)
        checkpoints.wait()
        fitted = _fitted(plan, state, step, steps, observer, stop, report)
    plot_curve(run_dir / METRICS, run_dir / CURVE)
    return fitted


def _begin(plan: Plan, params: Params | None, run_dir: Path) -> TrainState:
    """Return the first state, where there is something to begin with, and nothing that would be lost."""
    if params is None:
        raise ValueError(f"{run_dir} holds no checkpoint to go on from: pass params")
    path = run_dir / METRICS
    reached = max((record["step"] for record in read_records(path)), default=0) if path.exists() else 0
    if reached > 2 * plan.recipe.monitor.save_every > 0:  # by then the first was complete
        raise ValueError(
            f"{run_dir} has metrics up to step {reached:,}, but no checkpoint any more: it cannot go on, and would "
            "begin anew over what there is; choose another folder"
        )
    return init_state(plan, params)


def _announce(report: Report, memory: dict[str, int], n_steps_before: int, n_steps: int, first_step: int) -> None:
    """Say what the run needs, and where it goes on."""
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in memory.items() if size and name != "total")
    report.message(f"each device needs about {gigabytes(memory['total'])} of memory: {parts}")
    if n_steps_before != n_steps:
        was = f"the run was begun with steps = {n_steps_before:,} and has {n_steps:,} now"
        report.message(f"{was}: the learning rate goes on as in a run of so many from the beginning")
    if first_step >= n_steps:
        report.message(f"all {n_steps:,} steps are done; with more, --steps {2 * n_steps} say, the run goes on")
    elif first_step:
        report.message(f"going on after step {first_step:,}")


def _batches(plan: Plan, data: Prepared, first_step: int) -> Generator[Batch, None, None]:
    """Yield what each step reads, in the parts of a step, on the devices."""
    recipe, sharding = plan.recipe, plan.over_rows(None)

    def place(array: np.ndarray) -> jax.Array:
        return jax.device_put(array.reshape(recipe.accumulate, -1, array.shape[-1]), sharding)

    stream = batches(data.train, plan.n_tokens, recipe.batch_size, recipe.seed, first_step)
    with contextlib.closing(stream):
        for batch in stream:
            yield jax.tree.map(place, batch)


def _observe(observer: Observer, steps: _Steps, step: int, state: TrainState) -> None:
    """Let the observer do what is due at this step, once all before it is known and well."""
    if observer.is_due(step):
        steps.fetch()
    if not steps.why:
        observer.look(step, state)
        steps.why = observer.out_of_patience()


def _fitted(
    plan: Plan, state: TrainState, step: int, steps: _Steps, observer: Observer, stop: Stop, report: Report
) -> Fitted:
    """Say how the run ended, and return it."""
    signal = stop.signal if step < plan.recipe.steps or observer.missed else None
    why = steps.why or (f"{signal} came" if signal else "")
    if why:
        saved = "which is saved" if step else "before the first: nothing is saved"
        report.message(f"stopped after step {step:,}, {saved}: {why}")
    observer.sum_up()
    params = model_params(state, plan.recipe)
    return Fitted(params, step, observer.best_step, observer.best_loss, why, signal, steps.failed)


class _Steps:
    """The steps that were dispatched. The metrics of one are fetched when the next one is on its way.

    Attributes:
      why: why the run should end, "" while it should not.
      failed: whether that is a loss that is no number, or a spike.
    """

    def __init__(self, plan: Plan, report: Report):
        self.why, self.failed = "", False
        self._report, self._monitor = report, plan.recipe.monitor
        self._n_tokens = plan.recipe.batch_size * plan.n_tokens
        self._pending: tuple[int, dict[str, Any], float] | None = None
        self._last_end = -math.inf  # of a step, in seconds
        self._n_skipped = 0

    def dispatched(self, step: int, metrics: dict[str, Any], started: float) -> None:
        """Note a step that is on its way, and report the one before it."""
        self.fetch()
        self._pending = step, metrics, started

    def fetch(self) -> None:
        """Wait for the last step that was dispatched, and report it."""
        if self._pending is None:
            return
        (step, metrics, started), self._pending = self._pending, None
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        seconds, self._last_end = now - max(started, self._last_end), now
        self._report.step(step, values, self._n_tokens, seconds)
        self._n_skipped = self._n_skipped + 1 if values["skipped"] else 0
        if values["skipped"]:
            self._skipped(step, values)

    def _skipped(self, step: int, values: dict[str, Any]) -> None:
        """Say why a step changed nothing, and end the run if the recipe says so, or if it goes on like this."""
        if not values["n_tokens"]:
            what, choice = "no target in its batch counts", "skip"
        elif math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            what, choice = f"the loss, {values['loss']:.4g}, is a spike", self._monitor.on_spike
        else:
            what, choice = "the loss or its gradient is not a finite number", self._monitor.on_nan
        self._report.message(f"step {step:,} changed nothing: {what}")
        if (choice == "stop" or self._n_skipped >= MOST_SKIPPED) and not self.why:  # the next is on its way already
            again = f" like the {MOST_SKIPPED - 1} before it" if choice != "stop" else ""
            self.failed = True
            self.why = f"step {step:,} changed nothing{again}: {what}; run again, it goes on behind it"
