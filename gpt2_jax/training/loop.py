"""`fit`: a whole training run. It can be stopped, killed and resumed at any step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2_jax import processes
from gpt2_jax.checkpoints import runs
from gpt2_jax.data.batching import Batch
from gpt2_jax.data.examples import PreparedExamples
from gpt2_jax.data.token_files import Prepared
from gpt2_jax.files import expanded
from gpt2_jax.jax_defaults import under_jax_defaults
from gpt2_jax.params import Params
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.training import hosts
from gpt2_jax.training.checkpoints import Checkpoints
from gpt2_jax.training.classifying import measure_splits
from gpt2_jax.training.curve import plot_curve
from gpt2_jax.training.epochs import n_per_epoch, with_steps
from gpt2_jax.training.frozen import settle_base
from gpt2_jax.training.memory import check_compiled, check_memory, gigabytes
from gpt2_jax.training.objective import account, train_batches
from gpt2_jax.training.observer import Observer, due
from gpt2_jax.training.opening import Opened, open_run
from gpt2_jax.training.plan import Plan
from gpt2_jax.training.records import METRICS
from gpt2_jax.training.report import Report, Silence
from gpt2_jax.training.signals import Stop, stopping
from gpt2_jax.training.start import check_data, check_tokenizer
from gpt2_jax.training.start_text import whole_pairs
from gpt2_jax.training.state import TrainState
from gpt2_jax.training.step import averaged_params, lower_train_step
from gpt2_jax.training.validation import with_validation

MOST_SKIPPED = 100  # skipped steps in a row that end a run, because it may never recover
CURVE = "loss.png"


@dataclasses.dataclass(frozen=True)
class Fitted:
    """How a run ended.

    Attributes:
      params: the model's params after the last step, on the devices of the run's mesh; their average if there is one.
      step: optimizer steps done, including those before a resume.
      best_step: the step of the best validation loss; None if none was measured.
      best_loss: that loss in nats a token (for classification, a text); infinite if none was measured.
      stopped: why the run ended before its last step; "" if it did not.
      signal: the signal that stopped the run, for example "SIGINT"; None if there was none.
      failed: whether skipped steps ended the run: non-finite losses or gradients, spikes, or batches without targets.
    """

    params: Params
    step: int
    best_step: int | None
    best_loss: float
    stopped: str = ""
    signal: str | None = None
    failed: bool = False


@under_jax_defaults
def fit(
    plan: Plan,
    params: Params | None,
    data: Prepared | PreparedExamples,
    run_dir: str | os.PathLike,
    tokenizer: Tokenizer | None = None,
    donate: bool = False,
    from_step: int | None = None,
    validation: Mapping[str, Prepared | PreparedExamples] | None = None,
) -> Fitted:
    """Train a model, or resume the run in `run_dir`.

    A resumed run gives the same result as a run that was never interrupted. On a CPU the result is the same bit for
    bit. On accelerators this holds if XLA's programs are deterministic; on GPUs, the XLA flag
    `--xla_gpu_deterministic_ops` makes them deterministic. Ctrl-C and SIGTERM save a checkpoint and return. A kill
    loses the steps since the last save. If you resume with more `steps` than before, the learning rate follows the
    schedule of the new length. It jumps up if it had already decayed.

    If `jax.distributed.initialize` has connected several processes, all of them call this with the same arguments, and
    must see the same files. They run every step together, with the same result for any number of processes up to
    rounding. Process 0 writes the files, and generates the samples. Its errors, and a signal to any process, end the
    run in all of them.

    Args:
      plan: from `make_plan(config, recipe)` or `start_model`. The recipe's `data.path` is not read, nor its
        `model.source`, except to resume a run with LoRA whose frozen weights are there.
      params: the initial params, from `load(...)[1]` or `init_params(...)`; they are copied. With None, a run can only
        be resumed.
      data: from `start_data` or `open_prepared(folder)`.
      run_dir: the run's folder, for checkpoints, the best model, metrics, samples and the loss curve. You can pass it
        to `load` and `load_tokenizer`.
      tokenizer: for the samples; it is also saved with the model. With None, no samples are written.
      donate: delete the jax arrays of `params` when they are copied. Otherwise they stay in memory beside the state for
        as long as you keep them.
      from_step: go back to the checkpoint of this step. What came after it is moved to `run_dir/aside/1` (2, ...),
        which is a run of its own. None resumes from the newest whole checkpoint.
      validation: texts to validate on in place of `data.val`, by name, from `start_validation` or `open_prepared`. The
        first decides which model is the best one, and patience.

    Raises:
      ValueError: recipe, model, data and devices do not fit together, `run_dir` contains a different run that took a
        step, or the devices have too little memory.
      OSError: a file cannot be written.
    """
    if not isinstance(plan, Plan):
        raise ValueError(f"plan must be a Plan from make_plan(config, recipe), not a {type(plan).__name__}")
    run_dir, save_every = expanded(run_dir), plan.recipe.monitor.save_every
    memory = check_memory(plan)
    check_tokenizer(plan, tokenizer)
    data = given = whole_pairs(data, run_dir)
    validation = {name: whole_pairs(text, run_dir) for name, text in (validation or {}).items()}
    texts = with_validation(plan, data, validation, tokenizer)
    name = next(iter(texts), "")
    data = texts.pop(name) if texts else check_data(plan, data, tokenizer)
    plan = with_steps(plan, epoch := n_per_epoch(plan, data))
    n_steps = plan.recipe.steps
    processes.on_first(lambda: runs.check_free(run_dir))
    described = processes.on_first(lambda: _description(given, validation))  # this reads, and checks, every id
    with contextlib.ExitStack() as resources:
        checkpoints = resources.enter_context(Checkpoints(run_dir, plan.recipe.monitor.keep))
        opened = open_run(plan, params, described, checkpoints, tokenizer, donate, from_step)
        state, first_step = opened.state, opened.step
        checkpoints.base = checkpoints.base or settle_base(plan, state, run_dir)
        report = _opened_report(plan, run_dir, first_step, resources)
        stop = resources.enter_context(stopping(hosts.CommonStop(plan.mesh) if processes.count() > 1 else None))
        _announce(plan, report, memory, opened)
        for sentence in account(plan, data):
            report.message(sentence)
        train_step = _compiled(plan, report) if first_step < n_steps else None
        steps = _Steps(plan, report, epoch)
        observer = Observer(plan, data, run_dir, tokenizer, report, stop, name, texts)
        observer.base = checkpoints.base
        step = saved = first_step
        _observe(observer, steps, step, state)  # a signal may have come before the work of this step was done
        with contextlib.closing(placed_batches(plan, data, step)) as stream:
            while train_step and step < n_steps and not stop and not steps.why:
                batch, started = next(stream), time.monotonic()
                state, metrics = train_step(state, batch)
                step += 1
                steps.dispatched(step, metrics, started)
                stop.agree()
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
        if plan.recipe.objective == "classification" and isinstance(data, PreparedExamples) and not fitted.signal:
            measure_splits(plan, data, run_dir, observer, step, fitted.params)
            fitted = dataclasses.replace(fitted, signal=stop.signal)  # it may have come meanwhile
    processes.on_first(lambda: plot_curve(run_dir / METRICS, run_dir / CURVE))
    return fitted


def _description(
    data: Prepared | PreparedExamples, validation: Mapping[str, Prepared | PreparedExamples]
) -> dict[str, Any]:
    """Return the hashes of the text, which are compared when the run resumes."""
    texts = {name: text.digests() for name, text in validation.items()}
    described: dict[str, Any] = {"sha256": data.digests()} | ({"validation": texts} if texts else {})
    if isinstance(data, PreparedExamples) and "gpt2_jax_tokens" in data.manifest:  # earlier versions read windows
        described["pairs"] = True
    return described


def _opened_report(plan: Plan, run_dir: Path, first_step: int, resources: contextlib.ExitStack) -> Report:
    """Return the report, which `resources` closes. Process 0 alone writes."""
    report = (Report if processes.is_first() else Silence)(plan, run_dir, first_step)

    def open_it() -> None:
        resources.enter_context(report)

    processes.on_first(open_it)
    return report


def _announce(plan: Plan, report: Report, memory: dict[str, int], opened: Opened) -> None:
    """Report the memory that the run needs, how many parameters it trains, and the step where it resumes."""
    n_steps = plan.recipe.steps
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in memory.items() if size and name != "total")
    report.message(f"each device needs about {gigabytes(memory['total'])} of memory: {parts}")
    if plan.n_trained < plan.n_all:
        report.message(f"trains {plan.n_trained:,} of {plan.n_all:,} parameters")
    for message in opened.messages:
        report.message(message)
    if opened.step >= n_steps:
        report.message(f"all {n_steps:,} steps are done; to train further, set more, for example --steps {2 * n_steps}")
    elif opened.step:
        report.message(f"resuming after step {opened.step:,}")


def _compiled(plan: Plan, report: Report) -> Any:
    """Return the compiled step, and report the memory that it needs. Refuse if a device has less."""
    train_step = lower_train_step(plan).compile()
    if n_bytes := check_compiled(plan, train_step):
        report.message(f"the compiled step needs {gigabytes(n_bytes)} of memory on each device")
    return train_step


def placed_batches(plan: Plan, data: Prepared | PreparedExamples, first_step: int) -> Generator[Batch, None, None]:
    """Yield the batch of each step on the devices, divided into the parts of a step."""
    recipe, sharding = plan.recipe, plan.over_rows(None)
    put = hosts.put if processes.count() > 1 else jax.device_put

    def place(array: np.ndarray) -> jax.Array:
        return put(array.reshape(recipe.accumulate, -1, *array.shape[1:]), sharding)

    stream = train_batches(plan, data, first_step)
    with contextlib.closing(stream):
        for batch in stream:
            yield jax.tree.map(place, batch)


def _observe(observer: Observer, steps: _Steps, step: int, state: TrainState) -> None:
    """Report all steps so far. If none of them ended the run, let the observer do what is due at this step."""
    if observer.is_due(step):
        steps.fetch()
    if not steps.why:
        observer.look(step, state)
        steps.why = observer.out_of_patience()


def _fitted(
    plan: Plan, state: TrainState, step: int, steps: _Steps, observer: Observer, stop: Stop, report: Report
) -> Fitted:
    """Report how the run ended, and return the result."""
    signal = stop.signal if step < plan.recipe.steps or observer.missed else None
    why = steps.why or (f"received {signal}" if signal else "")
    if why:
        saved = "checkpoint saved" if step else "nothing to save"
        report.message(f"stopped after step {step:,} ({saved}): {why}")
    if step:
        n_rows = round(plan.recipe.batch_size / steps.epochs_of_step)
        counted = f"{step:,} steps are" if step > 1 else "1 step is"
        report.message(f"{counted} {step * steps.epochs_of_step:.4g} epochs of {n_rows:,} rows")
    observer.sum_up()
    params = averaged_params(plan, state)
    return Fitted(params, step, observer.best_step, observer.best_loss, why, signal, steps.failed)


class _Steps:
    """The steps that were dispatched. The metrics of a step are fetched after the next one is dispatched.

    Attributes:
      epochs_of_step: the share of an epoch that a step reads.
      why: why the run should end; "" if it should not.
      failed: whether skipped steps are the reason.
    """

    def __init__(self, plan: Plan, report: Report, n_per_epoch: int):
        self.epochs_of_step = plan.recipe.batch_size / n_per_epoch
        self.why, self.failed = "", False
        self._report, self._monitor = report, plan.recipe.monitor
        self._n_tokens = plan.recipe.batch_size * plan.n_tokens
        self._pending: tuple[int, dict[str, Any], float] | None = None
        self._last_end = -math.inf  # end of the last step, in seconds
        self._n_skipped = 0

    def dispatched(self, step: int, metrics: dict[str, Any], started: float) -> None:
        """Record a step that was dispatched, and report the one before it."""
        self.fetch()
        self._pending = step, metrics, started

    def fetch(self) -> None:
        """Wait for the last dispatched step, and report it."""
        if self._pending is None:
            return
        (step, metrics, started), self._pending = self._pending, None
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        if not values["n_tokens"]:
            values["loss"] = math.nan  # a gap in the files and the picture: the sum over no target is 0
        now = time.monotonic()
        seconds, self._last_end = now - max(started, self._last_end), now
        values["epoch"] = step * self.epochs_of_step
        self._report.step(step, values, self._n_tokens, seconds)
        self._n_skipped = self._n_skipped + 1 if values["skipped"] else 0
        if values["skipped"]:
            self._skipped(step, values)

    def _skipped(self, step: int, values: dict[str, Any]) -> None:
        """Report why a step was skipped. End the run if the recipe says so, or after too many in a row."""
        if not values["n_tokens"]:
            what, choice = "its batch has no target that counts in the loss", "skip"
        elif math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            what, choice = f"the loss, {values['loss']:.4g}, is a spike", self._monitor.on_spike
        elif values.get("loss_scale", 1) > 1:
            what, choice = f"a float16 number overflowed; the loss scale was {values['loss_scale']:,.0f}", "skip"
        else:
            what, choice = "the loss or its gradient is not a finite number", self._monitor.on_nan
        self._report.message(f"step {step:,} changed nothing: {what}")
        if (choice == "stop" or self._n_skipped >= MOST_SKIPPED) and not self.why:  # the next is already dispatched
            again = f", like the {MOST_SKIPPED - 1} before it" if choice != "stop" else ""
            self.failed = True
            self.why = f"step {step:,} changed nothing{again}: {what}; run again to resume after it"
