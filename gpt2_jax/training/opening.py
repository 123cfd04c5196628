"""How `fit` opens a run's folder: it begins a run, resumes one, or goes back to an earlier step of one."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2_jax import processes
from gpt2_jax.checkpoints import runs
from gpt2_jax.checkpoints.saving import check_replaceable
from gpt2_jax.data.templates import FILE as TEMPLATE
from gpt2_jax.data.templates import save_template, template_of
from gpt2_jax.params import Params
from gpt2_jax.tokenizer import Tokenizer, fingerprint
from gpt2_jax.training.boards import WANDB_ID
from gpt2_jax.training.checkpoints import Checkpoints
from gpt2_jax.training.plan import Plan
from gpt2_jax.training.records import METRICS, read_records
from gpt2_jax.training.state import TrainState
from gpt2_jax.training.step import init_state

ASIDE = "aside"  # RUN/aside/1, ...: what came after a step that a run went back to


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run that is open, with run.json written.

    Attributes:
      state: the state before the next step.
      step: optimizer steps done.
      messages: what to report.
    """

    state: TrainState
    step: int
    messages: list[str]


def has_begun(run_dir: Path) -> bool:
    """Return whether the run of a folder took a step: it has a checkpoint, or the record of a step.

    Any settings may replace those of a run that did not.
    """
    return runs.is_run(run_dir) and (bool(runs.steps(run_dir)) or any(record["step"] for record in _metrics(run_dir)))


def open_run(
    plan: Plan,
    params: Params | None,
    data: Mapping[str, Any],
    checkpoints: Checkpoints,
    tokenizer: Tokenizer | None,
    donate: bool,
    from_step: int | None,
) -> Opened:
    """Begin or resume a run whose checkpoints are open, and write its run.json.

    Args:
      plan: the plan of the run.
      params: the initial params; None only resumes.
      data: as in `runs.write_run`: hashes of the text.
      checkpoints: those of the run, open.
      tokenizer: the tokenizer; None if there is none.
      donate: as in `fit`.
      from_step: the checkpoint to go back to; None is the newest whole one.

    Raises:
      ValueError: the run has other settings, more steps than the recipe, or no checkpoint to resume from.
      FileNotFoundError: there is no checkpoint of `from_step`.
      DamagedError: no checkpoint is whole, or that of `from_step` is not.
    """
    run_dir, n_steps = checkpoints.run_dir, plan.recipe.steps

    def check() -> list:
        if not has_begun(run_dir):
            return [False, n_steps]
        before, identity = runs.read_run(run_dir), tokenizer and fingerprint(tokenizer)
        runs.check_resumable(run_dir, before, runs.Run(plan.config, plan.recipe, dict(data), identity))
        done = from_step or max(runs.steps(run_dir), default=0)
        if done > n_steps:
            raise ValueError(
                f"{run_dir} has done {done:,} steps, more than steps = {n_steps:,}: set at least {done:,}, or choose "
                "an earlier checkpoint with --from-step (from_step in Python)"
            )
        return [True, before.recipe.steps]

    begun, n_steps_before = processes.on_first(check)
    messages, checkpoints.source = [], plan.recipe.model.source
    if from_step is None:
        step, damaged = checkpoints.newest_whole(plan.state)
        messages += [damaged] * bool(damaged)
        state = _begin(plan, params, run_dir, donate) if step is None else checkpoints.restore(plan.state, step, False)
    else:
        step, state = from_step, checkpoints.restore(plan.state, from_step)
        messages += processes.on_first(lambda: _set_later_aside(run_dir, from_step))

    def write() -> None:
        if not begun and (run_dir / runs.BEST).is_dir():  # of a start that failed before its first step
            check_replaceable(run_dir / runs.BEST, with_vocabulary=True)
            shutil.rmtree(run_dir / runs.BEST)
        runs.write_run(run_dir, plan.config, plan.recipe, data, tokenizer, anew=not begun)
        if plan.recipe.objective == "instruction":
            save_template(template_of(plan.recipe.instruction), run_dir)
        elif not begun:  # of a start that failed, on instructions
            (run_dir / TEMPLATE).unlink(missing_ok=True)

    processes.on_first(write)
    if n_steps_before != n_steps:
        was = f"the run was started with steps = {n_steps_before:,} and now has {n_steps:,}"
        messages.append(f"{was}: the learning rate now follows the schedule of the new length")
    return Opened(state, step or 0, messages)


def _begin(plan: Plan, params: Params | None, run_dir: Path, donate: bool) -> TrainState:
    """Return the initial state. Refuse if there are no params, or if the files of an earlier run would be lost."""
    if params is None:
        raise ValueError(f"{run_dir} has no checkpoint to resume from: pass params")
    reached = processes.on_first(lambda: _reached(run_dir))
    if reached > 2 * plan.recipe.monitor.save_every > 0:  # by then the first checkpoint was complete
        raise ValueError(
            f"{run_dir} has metrics up to step {reached:,}, but its checkpoints are gone: the run cannot resume, and "
            "a new run would overwrite its files; choose another folder"
        )
    return init_state(plan, params, donate)


def _set_later_aside(run_dir: Path, step: int) -> list[str]:
    """Move what came after a step into a folder RUN/aside/N, which is a run of its own. Return messages about it."""
    later = [other for other in runs.steps(run_dir) if other > step]
    if not later and _reached(run_dir) <= step:
        return []
    folder = next(path for n in itertools.count(1) if not (path := run_dir / ASIDE / str(n)).exists())
    (folder / runs.CHECKPOINTS).mkdir(parents=True)
    for path in run_dir.iterdir():
        if path.is_file() and path.suffix in (".json", ".jsonl", ".bpe", ".txt"):  # also the vocabulary
            shutil.copy2(path, folder)
    (run_dir / WANDB_ID).unlink(missing_ok=True)  # it is that of the run that was set aside
    if (run_dir / runs.BASE).is_dir():  # the frozen weights of LoRA: both runs need them
        shutil.copytree(run_dir / runs.BASE, folder / runs.BASE)
    best = max((record["step"] for record in _metrics(run_dir) if record.get("best")), default=0)
    if best > step and (run_dir / runs.BEST).is_dir():
        (run_dir / runs.BEST).rename(folder / runs.BEST)
    for other in reversed(later):  # a kill here leaves a run that resumes from what is left
        (run_dir / runs.CHECKPOINTS / str(other)).rename(folder / runs.CHECKPOINTS / str(other))
    return [f"going back to step {step:,}: the later checkpoints, metrics and samples are kept in {folder}"]


def _metrics(run_dir: Path):
    """Yield the records of a run's metrics; none if there is no such file."""
    path = run_dir / METRICS
    return read_records(path) if path.exists() else iter(())


def _reached(run_dir: Path) -> int:
    """Return the last step that the metrics of a run have."""
    return max((record["step"] for record in _metrics(run_dir)), default=0)
