"""`gpt2-inspect`: a model's files looked at before they are used."""

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

LARGE = 300_000_000  # parameters from which going through the tensors takes long enough for a progress bar


@dataclasses.dataclass
class Args:
    """Look at a model's files before using them: what each is for, what they hold, whether the numbers are sane."""

    source: Annotated[
        str | None, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE", help_behavior_hint="(default: embedded)")
    ] = None
    """A directory that holds a model, a size ("124M", fetched if absent) or a hub id ("owner/name")."""
    tensor: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """Look at one tensor closely instead of the whole: h0/attn/c_attn/w, say."""
    json: bool = False
    """Write the same as one JSON object, for programs; gpt2_jax.inspection documents its keys."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Also draw the weights of the whole model into this file: .png, .svg or .pdf."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    _command.call("gpt2-inspect", Args, run, argv, text=True)


def run(args: Args) -> None:
    """Load the model, look, print."""
    from gpt2_jax import checkpoints, figures, inspection
    from gpt2_jax.inspection import plot

    if args.plot is not None:
        figures.check_path(args.plot)
    source = _model.source(args.source)
    directory = checkpoints.locate(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of values that are not finite: the report says where they are
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
