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
    path = first.parse_known_args(argv)[0].config
    return Args(Recipe.from_toml(path) if path else Recipe())


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


def run(args: Args) -> int:
    """Train, and print the run's folder. Return the exit status: 0, 1 if skipped steps ended it, or 128 + signal."""
    _command.check_text("--monitor.prompts", args.recipe.monitor.prompts)
    from gpt2_jax.training import fit, start_data, start_model, start_plan, start_tokenizer

    _model.keep_compiled()
    folder = expanded(args.run or Path("runs") / (args.config.stem if args.config else "finetune"))
    recipe = args.recipe
    tokenizer = start_tokenizer(recipe, folder)
    if recipe.objective == "language_modeling":
        start_plan(recipe, tokenizer, folder)  # refuses a model that does not fit into memory before text is read
    data = start_data(recipe, tokenizer, folder / "data")
    plan, params, tokenizer = start_model(recipe, folder, data)
    if data.manifest is not None:
        _tell_about(data.manifest, recipe, began=params is not None)
    n_val = data.val.n_tokens if data.val else 0
    print(
        f"{plan.config.n_params:,} parameters; {data.train.n_tokens:,} training tokens, {n_val:,} validation tokens",
        file=sys.stderr,
    )
    fitted = fit(plan, params, data, folder, tokenizer, donate=True)
    print(f"to generate text: gpt2-generate --model {shlex.quote(str(folder))}", file=sys.stderr)
    print(folder)
    if fitted.signal:
        return 128 + signal.Signals[fitted.signal].value
    return int(fitted.failed)
