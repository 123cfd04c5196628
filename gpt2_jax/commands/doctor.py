"""`gpt2-doctor`: report on the installation, or check whether a model's weights are the published ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from gpt2_jax.commands import _command, _model


@dataclasses.dataclass
class Args:
    """Report on the installation, the devices and the cache folder, or verify a model's weights against known values.

    The report changes nothing and downloads nothing. The exit status of --verify is 1 if a check fails.
    """

    verify: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="MODEL",
            help_behavior_hint="",
            help="Check a model instead. A fine-tuned model fails some checks, because its weights are not the "
            "published ones. The shape of the model decides which known values apply. MODEL is shakespeare, "
            f"the embedded model, or a size that is already downloaded: {_model.SIZES}. {_model.OTHER_SOURCES}",
        ),
    ] = None
    lambada: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """With --verify: also measure LAMBADA and show the paper's figures. They do not change the exit status.
    FILE is .jsonl with one passage per line, {"text": "..."}, as for gpt2-evaluate."""
    wikitext: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """With --verify: also measure the perplexity of WikiText-2 and show the paper's figure. FILE is the test text.
    The measured value does not change the exit status."""
    limit: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Measure only the first N passages of --lambada and the first N lines of --wikitext, 1 or more."""
    json: bool = False
    """Write one JSON object instead of tables."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    _command.call("gpt2-doctor", Args, run, argv, text=True)


def run(args: Args) -> int:
    """Report or verify, and print. The exit status is 1 if a check failed."""
    from gpt2_jax.commands import _doctor_report, _doctor_verify, _tables

    if args.verify is None:
        for name in ("lambada", "wikitext", "limit"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} needs --verify MODEL")
        found, show = examine(), _doctor_report.print_report
    else:
        found = _doctor_verify.verify(args.verify, args.lambada, args.wikitext, args.limit)
        show = _doctor_verify.print_checks
    if args.json:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        show(found, _tables.console())
    return 0 if found.get("passed", True) else 1


def examine() -> dict[str, Any]:
    """Examine the installation, the machine and the cache folder.

    Returns:
      Plain data: packages, machine, jax, cache, releases, embedded_model, optional, and problems: all problems of these
      parts, each with what to do.
    """
    from gpt2_jax.commands import _doctor_cache, _doctor_machine, _doctor_packages

    cache = _doctor_cache.cache()
    found = {
        "packages": _items(_doctor_packages.installed),
        "machine": _doctor_machine.system(),
        "jax": _doctor_machine.devices(),
        "cache": cache,
        "releases": [] if cache["path"] is None else _items(_doctor_cache.releases),
        "embedded_model": _items(_doctor_cache.embedded_model),
        "optional": _items(_doctor_packages.optional),
    }
    lists = ("packages", "releases", "embedded_model", "optional")
    parts = [*found["jax"]["items"], cache, *(item for name in lists for item in found[name])]
    problems = [{"problem": item["problem"], "do": item["do"]} for item in parts if item["problem"]]
    return found | {"problems": problems}


def _items(examine_part: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the items of a part of the report. If a package that this part needs fails, return only that problem."""
    from gpt2_jax.commands._doctor_packages import pip_install

    try:
        return examine_part()
    except (ImportError, RuntimeError) as error:  # JAX raises RuntimeError if jaxlib does not fit
        name = (isinstance(error, ImportError) and error.name) or "jax"
        message = " ".join(str(error).split())
        do = pip_install("--upgrade", name.partition(".")[0])
        return [{"problem": f"a part of this report failed: {message}", "do": do}]
