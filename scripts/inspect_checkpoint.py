"""Look at a model's files before using them. `python scripts/inspect_checkpoint.py --help` shows the options."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

# gpt2_jax, and jax with it, is imported once the arguments are known to be good: `--help` and a typo answer at once.

NARROW = 96  # columns; with fewer there is none for the dtype, which the title says
UNBOUNDED = 10_000  # the width where no terminal sets one: nothing is cut, nothing wrapped
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
    """Run the command; bad input is one line on standard error and exit status 2."""
    args = tyro.cli(Args, prog="gpt2-inspect", description=Args.__doc__, args=argv)
    try:
        run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; nothing more can be written, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        print(f"gpt2-inspect: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run(args: Args) -> None:
    """Load the model, look, print.

    Raises:
      ValueError, OSError: bad input; nothing has been written to standard output.

    """
    from gpt2_jax import checkpoints, figures, inspection
    from gpt2_jax.inspection import plot

    if args.plot is not None:
        figures.check_path(args.plot)
    source = checkpoints.embedded_model() if args.source is None else args.source
    directory = checkpoints.locate(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of values that are not finite: the report says where they are
        config, params = checkpoints.load(source)
    if args.tensor is None:
        found = inspection.report(directory, config, params, _track(config.n_params))
    else:
        found = inspection.examine_tensor(params, args.tensor)
    if args.plot is not None:
        plot.plot(config, params, args.plot)
        print(f"wrote {args.plot}", file=sys.stderr)

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?" instead of failing
    if args.json:
        print(json.dumps(found, indent=2, allow_nan=False))
    elif args.tensor is None:
        print_report(found, _console())
    else:
        print_tensor(found, _console())


def _console() -> Console:
    """Return standard output as rich sees it: plain and unbounded where it is no terminal."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    width = None if terminal else UNBOUNDED
    return Console(force_terminal=terminal, width=width, markup=False, highlight=False, emoji=False)


def _track(n_params: int) -> Callable[[list], Iterable]:
    """Return what shows the progress through a list: a bar, for a large model in front of a terminal."""
    if n_params < LARGE or not sys.stderr.isatty():
        return iter
    from rich.console import Console
    from rich.progress import track

    return functools.partial(track, description="tensors", console=Console(stderr=True), transient=True)


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print what `inspection.report` gives, section by section."""
    size = f", the shape of {report['size']}" if report["size"] else ""
    console.print(f"{report['directory']}: {report['form']} form{size}", style="bold", soft_wrap=True)
    for section in (_files, _hyperparameters, _parameters, _memory, _tensors, _vocabulary):
        console.print()
        for part in section(report, console):
            console.print(part)


def print_tensor(found: dict[str, Any], console: Console) -> None:
    """Print what `inspection.examine_tensor` gives."""
    whole = {found["name"]: found} | {f"  {part}": third for part, third in (found["thirds"] or {}).items()}
    table = _table("name", ">shape", ">count", "dtype")
    for name, values in whole.items():
        table.add_row(name, _shape(values), f"{values['count']:,}", values["dtype"])
    console.print(_title("The tensor" + (" and its thirds" if found["thirds"] else "")), table, "", sep="\n")
    keys = ("mean", "std", "min", "max", "norm")
    table = _table("of", *(">L2 norm" if key == "norm" else f">{key}" for key in keys))
    for name, values in whole.items():
        table.add_row("the whole" if values is found else name, *(_number(values[key], 6) for key in keys))
    console.print(
        _title("Statistics"), table, f"not finite: {found['nan']:,} NaN, {found['infinite']:,} infinite", "", sep="\n"
    )
    table = _table(">share below", ">value")
    for q, value in found["quantiles"].items():
        table.add_row(f"{100 * float(q):g} %", _number(value, 6))
    console.print(_title("Quantiles"), table, "", sep="\n")
    table = _table("", "", ">", ">", ">")
    for which, row in found["rows"].items():
        for end, values in row.items():
            table.add_row(f"{which} row,", f"{end} values", *(_number(value, 8) for value in values))
    table.show_header = False
    console.print(_title("First and last values"), table, sep="\n")


def _files(report: dict[str, Any], console: Console) -> Iterable[Any]:
    table = _table("name", ">bytes", "what for")
    for file in report["files"]:
        unused = "not used" + (f": {file['purpose']}" if file["purpose"] else "")
        table.add_row(file["name"], f"{file['bytes']:,}", file["purpose"] if file["used"] else unused)
    yield _title("Files")
    yield table


def _hyperparameters(report: dict[str, Any], console: Console) -> Iterable[Any]:
    from gpt2_jax.config import BOOK_WORDS
    from gpt2_jax.inspection import MEANINGS

    hparams = report["hyperparameters"]
    width = hparams["n_embd"] // hparams["n_head"]
    book = {ours: word for word, ours in BOOK_WORDS.items()}
    table = _table("name", ">value", "in the books", "what it is")
    for name, value in hparams.items():
        table.add_row(name, f"{value:,}", book[name], MEANINGS[name].format(width=width))
    yield _title("Hyperparameters")
    yield table


def _parameters(report: dict[str, Any], console: Console) -> Iterable[Any]:
    counts = report["parameters"]
    table = _table("part", ">counted", ">share", ">closed form", "formula", "holds")
    for part in counts["parts"]:
        share = f"{part['counted'] / counts['counted']:.1%}"
        numbers = (f"{part['counted']:,}", share, f"{part['closed_form']:,}")
        table.add_row(part["part"], *numbers, part["formula"], part["holds"])
    table.add_row("all", f"{counts['counted']:,}", "", f"{counts['closed_form']:,}")
    yield _title("Parameters, counted in the tensors")
    yield table
    symbols = (f"{letter} = {of['name']} = {of['value']:,}" for letter, of in counts["symbols"].items())
    agree = "agrees with" if counts["agree"] else "DOES NOT AGREE WITH"
    yield f"The count {agree} the closed form, {counts['formula']}, where {', '.join(symbols)}."


def _memory(report: dict[str, Any], console: Console) -> Iterable[Any]:
    context = report["hyperparameters"]["n_ctx"]
    labels = {"weights": "  weights", "cache": f"  cache, {context:,} tokens", "gradients": "  gradients"}
    labels |= {"moments": "  Adam's two moments", "total": "  together"}
    heads = {"inference": "inference, one row", "training": "training with Adam"}
    table = _table("", ">float32, bytes", "", ">bfloat16, bytes", "")
    for use, sizes in report["memory"].items():
        table.add_row(heads[use])
        for key in sizes["float32"]:
            cells = [(f"{of[key]:,}", _binary(of[key])) for of in (sizes["float32"], sizes["bfloat16"])]
            table.add_row(labels[key], *(cell for pair in cells for cell in pair))
    yield _title("Memory")
    yield table
    yield (
        "The cache holds a key and a value of n_embd numbers for each token and layer. Training counts 16 bytes a "
        "parameter in float32, and 8 in bfloat16, where all four are bfloat16 (float32 moments, or a float32 copy of "
        "the weights, add to that). Activations come on top, in both."
    )


def _tensors(report: dict[str, Any], console: Console) -> Iterable[Any]:
    tensors, wide = report["tensors"], console.width >= NARROW
    columns = ["name", ">shape", *(["dtype"] if wide else []), ">count", ">mean", ">std", ">min", ">max"]
    table = _table(*columns, gap=1 if wide else 0)
    for tensor in tensors:
        statistics = (_number(tensor[key], 4 if wide else 3) for key in ("mean", "std", "min", "max"))
        dtype = [tensor["dtype"]] if wide else []
        table.add_row(tensor["name"], _shape(tensor), *dtype, f"{tensor['count']:,}", *statistics)
    yield _title(f"Tensors: {len(tensors):,}, {report['param_dtype']}")
    yield table
    if report["finite"]:
        yield "Every value is finite."
    for tensor in tensors:
        if tensor["nan"] or tensor["infinite"]:
            bad = f"{tensor['nan']:,} NaN and {tensor['infinite']:,} infinite values"
            yield f"NOT FINITE: {tensor['name']} holds {bad}; its statistics are those of the others."


def _vocabulary(report: dict[str, Any], console: Console) -> Iterable[Any]:
    vocabulary = report["vocabulary"]
    if vocabulary["missing"]:
        yield f"No vocabulary: {vocabulary['missing']}"
        return
    yield _title(f"Vocabulary: {vocabulary['n_ids']:,} ids, <|endoftext|> is {vocabulary['end_of_text']:,}")
    table = _table(">id", "in the file", "text")
    for token in (*vocabulary["first_tokens"], None, *vocabulary["last_tokens"]):
        table.add_row(*((f"{token['id']:,}", token["token"], repr(token["text"])) if token else ("...",)))
    yield table
    yield ""
    n_merges = vocabulary["n_merges"]
    yield _title(f"Merges: {n_merges:,} (Ġ stands for a space)")
    table = _table(">number", "left", "right", "become")
    first, last = vocabulary["first_merges"], vocabulary["last_merges"]
    for number, pair in enumerate(first, start=1):
        table.add_row(f"{number:,}", *pair, "".join(pair))
    table.add_row("...")
    for number, pair in enumerate(last, start=n_merges - len(last) + 1):
        table.add_row(f"{number:,}", *pair, "".join(pair))
    yield table


def _table(*columns: str, gap: int = 1) -> Table:
    """Return a plain table, 1 + gap spaces between columns; > before a name aligns to the right. No cell is cut."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, gap), show_edge=False, pad_edge=False)
    for name in columns:
        right = name.startswith(">")
        table.add_column(name.removeprefix(">"), justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table


def _title(text: str) -> Text:
    from rich.text import Text

    return Text(text, style="bold")


def _shape(tensor: dict[str, Any]) -> str:
    return f"({', '.join(str(n) for n in tensor['shape'])})"


def _number(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:.{digits}g}"


def _binary(n_bytes: int) -> str:
    """Return a size as 474.7 MiB or 1.85 GiB."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
