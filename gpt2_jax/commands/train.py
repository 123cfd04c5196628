"""`gpt2-train`, and `gpt2-finetune`, its older name: train or fine-tune a model with a recipe."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from gpt2_jax.commands import _command, _model, _processes, _responses
from gpt2_jax.files import expanded
from gpt2_jax.recipe import Recipe


@dataclasses.dataclass
class Args:
    """Train or fine-tune a model with a recipe, and print the run's folder. The same command resumes a stopped run.

    Every recipe field is also an option, for example --optimizer.learning-rate 1e-3.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """The recipe, a TOML file, for example configs/finetune_shakespeare.toml. Without it, all fields have defaults."""
    run: Annotated[
        Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: runs/NAME of the recipe)")
    ] = None
    """The run's folder: checkpoints, best model, metrics, samples and loss curve. gpt2-generate --model takes it."""
    from_step: Annotated[
        int | None, tyro.conf.arg(metavar="STEP", help_behavior_hint="(default: the newest whole checkpoint)")
    ] = None
    """Resume from the checkpoint of this step. What came after it is kept in RUN/aside."""
    find_learning_rate: bool = False
    """Instead of training, take 100 steps with rising learning rates, from 1e-7 to 1. Print the one at which the loss
    falls fastest, and draw all losses into RUN/learning_rate.png. Use it, or a somewhat smaller one, as the peak."""
    processes: _processes.Processes = dataclasses.field(default_factory=_processes.Processes)


def main(argv: Sequence[str] | None = None, prog: str = "gpt2-train") -> None:
    """Run the command."""
    again = f"the last checkpoint is complete; {_processes.AGAIN}"
    _command.call(prog, Args, run, argv, start=lambda: _start(argv, prog), again=again)


def finetune(argv: Sequence[str] | None = None) -> None:
    """Run the command under its older name."""
    main(argv, "gpt2-finetune")


def _start(argv: Sequence[str] | None, prog: str) -> Args:
    """Return the arguments with the recipe of --config. The other options change them."""
    first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    for name in ("--epochs", "--steps"):
        first.add_argument(name)
    given = first.parse_known_args(argv)[0]
    recipe = Recipe.from_toml(given.config) if given.config else Recipe()
    if given.epochs is not None and given.steps is None:  # an option replaces the steps of the recipe, and the reverse
        recipe = dataclasses.replace(recipe, steps=0)
    elif given.steps is not None and given.epochs is None:
        recipe = dataclasses.replace(recipe, epochs=0.0)
    return Args(recipe)


def _tell_about(manifest: dict[str, Any], recipe: Recipe, began: bool) -> None:
    """Say how the text was read: once, when a run begins. Say if settings of the recipe were not used for it."""
    from gpt2_jax.data.notes import notes_on
    from gpt2_jax.data.token_files import is_prepared

    if recipe.objective == "language_modeling":
        split, share, marker = manifest["split"], manifest["val_fraction"], manifest.get("end_of_text", "text")
        if recipe.data.split not in ("auto", split) or recipe.data.val_fraction != share:
            print(f"the split of the prepared text is used: {split}, val_fraction {share:g}", file=sys.stderr)
        if recipe.data.end_of_text != marker:
            print(f"the prepared text is used as it is: it has end_of_text {marker}", file=sys.stderr)
    prepared = is_prepared(recipe.data.path)
    option = "prepare the text again with --end-of-text split" if prepared else "pass --data.end-of-text split"
    for note in notes_on(manifest, option) if began else ():
        print(note, file=sys.stderr)


def _find_learning_rate(plan: Any, params: Any, data: Any, tokenizer: Any, folder: Path) -> int:
    """Print the suggested learning rate, and draw the losses."""
    from gpt2_jax.checkpoints import runs
    from gpt2_jax.training.rate_finder import find_learning_rate, plot_rates

    if params is None:
        raise ValueError(f"{folder} has a run that has begun: choose another folder to try learning rates")
    test = find_learning_rate(plan, params, data, donate=True, tokenizer=tokenizer)
    picture = folder / runs.RATES
    plot_rates(test, picture)
    print(f"the losses are in {picture}; the loss falls fastest at this learning rate:", file=sys.stderr)
    print(f"{test.suggested:.2g}")
    return 0


def run(args: Args) -> int:
    """Train, and print the run's folder. Return the exit status: 0, 1 if skipped steps ended it, or 128 + signal."""
    _command.check_text("--monitor.prompts", args.recipe.monitor.prompts)
    from gpt2_jax.processes import on_first
    from gpt2_jax.training import described, fit, start_data, start_model, start_plan, start_tokenizer, start_validation
    from gpt2_jax.training.early import check_early

    _model.keep_compiled()
    folder = expanded(args.run or Path("runs") / (args.config.stem if args.config else "finetune"))
    recipe = args.recipe
    on_first(lambda: check_early(recipe, folder))
    tokenizer = start_tokenizer(recipe, folder)
    if recipe.objective == "language_modeling":
        start_plan(recipe, tokenizer, folder)  # refuses a model that does not fit into memory before text is read
    data = start_data(recipe, tokenizer, folder / "data")
    validation = start_validation(recipe, tokenizer, folder)
    plan, params, tokenizer = start_model(recipe, folder, data, tokenizer)
    if not validation and recipe.objective == "language_modeling" and data.manifest is not None:
        _tell_about(data.manifest, recipe, began=params is not None)
    print("\n".join(described(plan, data, validation)), file=sys.stderr)
    if args.find_learning_rate:
        return _find_learning_rate(plan, params, data, tokenizer, folder)
    fitted = fit(plan, params, data, folder, tokenizer, donate=True, from_step=args.from_step, validation=validation)
    if recipe.objective == "instruction" and not fitted.signal and not fitted.failed:
        on_first(lambda: _responses.after_training(folder))
    use = "classify texts: gpt2-classify" if plan.config.labels else "generate text: gpt2-generate"
    print(f"to {use} --model {shlex.quote(str(folder))}{' TEXT' * bool(plan.config.labels)}", file=sys.stderr)
    _command.print_result(folder)
    if fitted.signal:
        return 128 + signal.Signals[fitted.signal].value
    return int(fitted.failed)
