"""Evaluation and samples between the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax import processes
from gpt2_jax.checkpoints import runs
from gpt2_jax.checkpoints.bases import Base
from gpt2_jax.data.examples import Examples, PreparedExamples
from gpt2_jax.data.templates import template_of
from gpt2_jax.data.token_files import Prepared, Tokens
from gpt2_jax.evaluate.label_metrics import label_metrics
from gpt2_jax.generation import generate
from gpt2_jax.params import Params
from gpt2_jax.recipe import OWN
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.training import hosts
from gpt2_jax.training.frozen import save_best
from gpt2_jax.training.objective import val_batches
from gpt2_jax.training.plan import Plan
from gpt2_jax.training.records import METRICS, SAMPLES, read_records
from gpt2_jax.training.report import Report
from gpt2_jax.training.signals import Stop
from gpt2_jax.training.state import TrainState
from gpt2_jax.training.step import averaged_params, make_eval_step
from gpt2_jax.training.verbatim import verbatim_shares

NO_TARGET = -1.0  # in place of a validation loss, which is never negative
SEARCHED = 10**8  # maximum tokens of the training text that samples are compared with


class Observer:
    """Evaluates and samples at the steps that the recipe names, once per step, and keeps the best model.

    Earlier results are read from the run's files, so that a resumed run repeats none and skips none.

    Args:
      plan: the plan of the run.
      data: the data of the run; the loss of its validation part decides which model is the best one.
      run_dir: the run's folder.
      tokenizer: the tokenizer, for samples; None writes none.
      report: what the results are reported to.
      stop: a signal.
      name: the name of the validation part, "" if it has none.
      others: the data with other validation parts, by name. They are measured, too.

    Attributes:
      best_step: the step of the best validation loss so far; None if none was measured.
      best_loss: that loss in nats a token (for classification, a text); infinite if none was measured.
      n_worse: evaluations since the best one.
      evaluated: the step of the last evaluation; None if there was none.
      last_is_finite: whether the loss of the last evaluation is a finite number.
      missed: whether a signal prevented work that was due.
      base: where the frozen params are that the best model leaves out: see `frozen`. None if it has all params.
      without_targets: whether the validation text has no target that counts, so that it is measured once only.
    """

    def __init__(
        self,
        plan: Plan,
        data: Prepared | PreparedExamples,
        run_dir: Path,
        tokenizer: Tokenizer | None,
        report: Report,
        stop: Stop,
        name: str = "",
        others: Mapping[str, Prepared | PreparedExamples] | None = None,
    ):
        self.name, self.others = name, others or {}
        self.plan, self.data, self.run_dir, self.tokenizer = plan, data, run_dir, tokenizer
        self.recipe, self.report, self.stop = plan.recipe, report, stop
        self.eval_step = make_eval_step(plan)
        self.missed = self.without_targets = False
        self.base: Base | None = None
        earlier = processes.on_first(self._evaluated_so_far)
        self.best_step, self.best_loss, self.n_worse, self.evaluated, self.last_is_finite = earlier
        self.sampled = processes.on_first(self._sampled_so_far)

    def is_due(self, step: int) -> bool:
        """Return whether work is due at a step and has not been done."""
        return self._evaluation_is_due(step) or self._samples_are_due(step)

    def look(self, step: int, state: TrainState) -> None:
        """Do what is due at a step, unless a signal came."""
        if self.is_due(step):
            params = averaged_params(self.plan, state)
            if self.data.val is not None and self._evaluation_is_due(step):
                self._evaluate(step, state.averaged(), params, self.data.val)
            if self.tokenizer is not None and self._samples_are_due(step):
                self._sample(step, params, self.tokenizer)

    def out_of_patience(self) -> str:
        """Return why training should end; "" if it should not."""
        patience = self.recipe.monitor.patience
        if not patience or self.n_worse < patience:
            return ""
        best = "not finite" if self.best_step is None else f"no better than step {self.best_step:,}"
        return f"{self.n_worse} evaluations in a row were {best}"

    def sum_up(self) -> None:
        """Report the best step."""
        if self.best_step is None:
            return
        said = f"the best validation loss is {self.best_loss:.4f}, after step {self.best_step:,}"
        if self.n_worse and not self.last_is_finite:
            said += "; the validation losses since then are not finite: the model is broken, not overfitted"
        elif self.n_worse:
            counted = "one evaluation" if self.n_worse == 1 else f"{self.n_worse} evaluations"
            said += f"; {counted} since then found no better one: if the training loss still fell, the model overfits"
        self.report.message(said)

    def _evaluation_is_due(self, step: int) -> bool:
        every = self.recipe.monitor.evaluate_every
        measured = self.data.val is not None and not self.without_targets
        return measured and due(step, every, self.recipe.steps) and self.evaluated != step

    def _samples_are_due(self, step: int) -> bool:
        monitor = self.recipe.monitor
        wanted = step and self.tokenizer is not None and monitor.prompts and not self.plan.config.labels
        return bool(wanted) and due(step, monitor.sample_every, self.recipe.steps) and self.sampled != step

    def _evaluate(self, step: int, state: TrainState, params: Params, val: Tokens | Examples) -> None:
        """Measure the validation loss, and keep the model if it is the best so far."""
        by_name = {self.name: self.measure(params, val)}
        for name, other in self.others.items():
            assert other.val is not None
            by_name[name] = self.measure(params, other.val, data=other)
        measured = by_name[self.name]
        if measured is None or None in by_name.values():
            return
        loss, confusion_LL = measured
        if loss == NO_TARGET:
            self.without_targets = True
            ends = "; monitor.patience does not end the run" if self.recipe.monitor.patience else ""
            self.report.message(f"no validation loss: the windows of {val.path} have no target that counts{ends}")
            return
        best, self.last_is_finite = loss < self.best_loss, math.isfinite(loss)  # False for NaN
        if best:
            self.best_step, self.best_loss, self.n_worse = step, loss, 0
            save_best(self.plan, state, self.base, self.run_dir, self.tokenizer)
        else:
            self.n_worse += 1
        self.evaluated = step
        named = {name: math.nan if one is None or one[0] == NO_TARGET else one[0] for name, one in by_name.items()}
        named = {name: one for name, one in named.items() if name not in ("", OWN)}
        if confusion_LL is None:
            self.report.evaluation(step, loss, math.exp(loss) if loss < 700 else math.inf, best, named)
        else:
            self.report.classification(step, loss, label_metrics(confusion_LL, self.plan.config.labels), best)

    def measure(
        self,
        params: Params,
        split: Tokens | Examples,
        at_most: int | None = None,
        data: Prepared | PreparedExamples | None = None,
    ) -> tuple[float, np.ndarray | None] | None:
        """Return the loss of a split, in nats a token or text, and a classifier's confusion matrix.

        The loss is NO_TARGET if no target counts. None means that a signal came meanwhile. `at_most` is as in
        `val_batches`. `data` holds the split; None is the data of the run.
        """
        n_rows = self.recipe.batch_size // self.recipe.accumulate
        n_labels = len(self.plan.config.labels) if self.recipe.objective == "classification" else 0
        totals: list[Any] = [jnp.float32(0), jnp.float32(0)]
        totals += [np.zeros((n_labels, n_labels), np.int32)] if n_labels else []
        for batch in val_batches(self.plan, data or self.data, split, n_rows, at_most):
            self.stop.agree()
            if self.stop:
                self.missed = True
                return None
            if processes.count() > 1:
                batch = jax.tree.map(lambda array: hosts.put(array, self.plan.over_rows()), batch)
            parts = self.eval_step(params, batch)
            totals = [total + part for total, part in zip(totals, parts, strict=True)]
        nats, weights, *confusions = totals
        loss = float(nats) / float(weights) if weights else NO_TARGET
        return loss, np.asarray(confusions[0]) if confusions else None

    def _sample(self, step: int, params: Params, tokenizer: Tokenizer) -> None:
        """Continue the prompts, always with the same seed. Report how much of each sample is in the training text."""
        if self.stop:
            self.missed = True
            return
        if processes.count() > 1:  # generation is process 0's alone: what it runs depends on what it generates
            params = hosts.gathered(params)
        processes.on_first(lambda: self._write_samples(step, params, tokenizer))
        self.sampled = step

    def _write_samples(self, step: int, params: Params, tokenizer: Tokenizer) -> None:
        """Generate on the devices of this process."""
        if processes.count() > 1:
            params = hosts.on_own_devices(params, self.plan.mesh)
        monitor = self.recipe.monitor
        if self.recipe.objective == "instruction":
            template = template_of(self.recipe.instruction)
            prompts = [template.prompt_ids(tokenizer, prompt) for prompt in monitor.prompts]
        else:
            prompts = [tokenizer.prompt(prompt) for prompt in monitor.prompts]
        stop_ids = [] if tokenizer.eot is None else [tokenizer.eot]
        settings = {"temperature": 1.0, "top_k": 40, "seed": self.recipe.seed, "stop_ids": stop_ids}
        config = self.plan.config.replace(attention="auto")  # "fused" is what the recipe demands of a training step
        rows: Any = generate(
            config, params, prompts, monitor.sample_tokens, overflow="slide", tokenizer=tokenizer, **settings
        )
        train = self.data.train
        train = train.tokens if isinstance(train, Examples) else train
        overlaps = verbatim_shares(rows, train, at_most=SEARCHED)
        for prompt, row, overlap in zip(monitor.prompts, rows, overlaps, strict=True):
            self.report.sample(step, prompt, tokenizer.decode(row), overlap.share)
            self.report.message(str(overlap))

    def _sampled_so_far(self) -> int:
        return max((record["step"] for record in read_records(self.run_dir / SAMPLES)), default=0)

    def _evaluated_so_far(self) -> tuple[int | None, float, int, int | None, bool]:
        """Return what earlier evaluations found: `best_step`, `best_loss`, `n_worse`, `evaluated`, `last_is_finite`."""
        step, loss, n_worse, last, finite = None, math.inf, 0, None, True
        for record in read_records(self.run_dir / METRICS):
            if "val_loss" not in record:
                continue
            last, value = record["step"], record["val_loss"]
            finite = value is not None
            if value is not None and value < loss:
                step, loss, n_worse = last, value, 0
            else:
                n_worse += 1
        if step is not None and not (self.run_dir / runs.BEST).is_dir():  # it went back to a step before
            return None, math.inf, 0, last, finite
        return step, loss, n_worse, last, finite


def due(step: int, every: int, last: int) -> bool:
    """Return whether something that happens every `every` steps and at the last step is due; 0 means never."""
    return bool(every) and (step % every == 0 or step == last)
