"""`gpt2-inspect`: inspect a model before you use it."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from gpt2_jax import progress
from gpt2_jax.commands import _command, _inspect_report, _model, _tables

LARGE = 300_000_000  # parameters: from here on, the tensors take long enough for a progress bar


@dataclasses.dataclass
class Args:
    """Inspect a model before you use it: files, hyperparameters, parameters, memory, tensors and vocabulary."""

    source: Annotated[
        str | None,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="SOURCE", help_behavior_hint="(default: embedded)", help=_model.SOURCES),
    ] = None
    tensor: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """Show only one tensor, in detail. For example: h0/attn/c_attn/w."""
    json: bool = False
    """Write one JSON object instead of tables. gpt2_jax.inspection documents its keys."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Also draw the weights of the whole model to this file: .png, .svg or .pdf."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    _command.call("gpt2-inspect", Args, run, argv, text=True)


def run(args: Args) -> None:
    """Load the model, inspect it, print."""
    from gpt2_jax import checkpoints, figures, inspection
    from gpt2_jax.inspection import plot

    if args.plot is not None:
        figures.check_path(args.plot)
    source = _model.source(args.source)
    directory = checkpoints.locate(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about non-finite values: the report says where they are
        config, params = checkpoints.load(source)
    if args.tensor is None:
        track = progress.tracked("tensors", shown=None if config.n_params >= LARGE else False)
        found = inspection.report(directory, config, params, track)
    else:
        found = inspection.examine_tensor(params, args.tensor)
    if args.plot is not None:
        plot.plot(config, params, args.plot)
        print(f"wrote {args.plot}", file=sys.stderr)
    if args.json:
        print(json.dumps(found, indent=2, allow_nan=False))
    elif args.tensor is None:
        _inspect_report.print_report(found, _tables.console())
    else:
        _inspect_report.print_tensor(found, _tables.console())
