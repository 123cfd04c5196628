"""`gpt2-train`, and `gpt2-finetune`, its older name: train or fine-tune a model with a recipe."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from gpt2_jax.commands import _command, _model, _processes
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


def run(args: Args) -> int:
    """Train, and print the run's folder. Return the exit status: 0, 1 if skipped steps ended it, or 128 + signal."""
    _command.check_text("--monitor.prompts", args.recipe.monitor.prompts)
    from gpt2_jax import processes
    from gpt2_jax.training import fit, start_data, start_model, start_plan, start_tokenizer, start_validation
    from gpt2_jax.training.early import check_early

    _model.keep_compiled()
    folder = expanded(args.run or Path("runs") / (args.config.stem if args.config else "finetune"))
    recipe = args.recipe
    processes.on_first(lambda: check_early(recipe, folder))
    tokenizer = start_tokenizer(recipe, folder)
    if recipe.objective == "language_modeling":
        start_plan(recipe, tokenizer, folder)  # refuses a model that does not fit into memory before text is read
    data = start_data(recipe, tokenizer, folder / "data")
    validation = start_validation(recipe, tokenizer, folder)
    plan, params, tokenizer = start_model(recipe, folder, data)
    if not validation and recipe.objective == "language_modeling" and data.manifest is not None:
        split, share = data.manifest["split"], data.manifest["val_fraction"]
        if recipe.data.split not in ("auto", split) or recipe.data.val_fraction != share:
            print(f"the split of the prepared text is used: {split}, val_fraction {share:g}", file=sys.stderr)
    parts = [text.val or text.train for text in validation.values()] or [data.val]
    n_val = sum(part.n_tokens for part in parts if part)
    print(
        f"{plan.config.n_params:,} parameters; {data.train.n_tokens:,} training tokens, {n_val:,} validation tokens",
        file=sys.stderr,
    )
    fitted = fit(plan, params, data, folder, tokenizer, donate=True, from_step=args.from_step, validation=validation)
    print(f"to generate text: gpt2-generate --model {shlex.quote(str(folder))}", file=sys.stderr)
    _command.print_result(folder)
    if fitted.signal:
        return 128 + signal.Signals[fitted.signal].value
    return int(fitted.failed)
