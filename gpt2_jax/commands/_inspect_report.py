"""Prints the tables of `gpt2-inspect`: a report on a model, or one tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from gpt2_jax.commands._tables import binary_size, plain_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

NARROW = 96  # columns; a narrower terminal gets no dtype column, because the title has the dtype


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print a result of `inspection.report`, section by section."""
    size = f", shape of {report['size']}" if report["size"] else ""
    console.print(f"{report['directory']}: {report['form']} format{size}", style="bold", soft_wrap=True)
    for section in (_files, _hyperparameters, _parameters, _memory, _tensors, _vocabulary):
        console.print()
        for part in section(report, console):
            console.print(part)


def print_tensor(found: dict[str, Any], console: Console) -> None:
    """Print a result of `inspection.examine_tensor`."""
    whole = {found["name"]: found} | {f"  {part}": third for part, third in (found["thirds"] or {}).items()}
    table = plain_table("name", ">shape", ">count", "dtype")
    for name, values in whole.items():
        table.add_row(name, _shape(values), f"{values['count']:,}", values["dtype"])
    console.print(_title("The tensor" + (" and its thirds" if found["thirds"] else "")), table, "", sep="\n")
    keys = ("mean", "std", "min", "max", "norm")
    table = plain_table("part", *(">L2 norm" if key == "norm" else f">{key}" for key in keys))
    for name, values in whole.items():
        table.add_row("whole tensor" if values is found else name, *(_number(values[key], 6) for key in keys))
    console.print(
        _title("Statistics"), table, f"not finite: {found['nan']:,} NaN, {found['infinite']:,} infinite", "", sep="\n"
    )
    table = plain_table(">share below", ">value")
    for q, value in found["quantiles"].items():
        table.add_row(f"{100 * float(q):g} %", _number(value, 6))
    console.print(_title("Quantiles"), table, "", sep="\n")
    table = plain_table("", "", ">", ">", ">")
    for which, row in found["rows"].items():
        for end, values in row.items():
            table.add_row(f"{which} row,", f"{end} values", *(_number(value, 8) for value in values))
    table.show_header = False
    console.print(_title("First and last values"), table, sep="\n")


def _files(report: dict[str, Any], console: Console) -> Iterable[Any]:
    table = plain_table("name", ">bytes", "purpose")
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
    table = plain_table("name", ">value", "in the books", "meaning")
    for name, value in hparams.items():
        table.add_row(name, f"{value:,}", book[name], MEANINGS[name].format(width=width))
    for name, value in report["variants"].items():
        table.add_row(name, str(value), "", "differs from OpenAI's GPT-2")
    if "labels" in report:
        table.add_row("labels", f"{len(report['labels']):,}", "", f"a classifier: {', '.join(report['labels'])}")
        table.add_row("pooling", report["pooling"], "", "which hidden state of a text the classifier reads")
    yield _title("Hyperparameters")
    yield table


def _parameters(report: dict[str, Any], console: Console) -> Iterable[Any]:
    counts = report["parameters"]
    table = plain_table("part", ">counted", ">share", ">closed form", "formula", "holds")
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
    labels = {"weights": "  weights", "cache": f"  KV cache, {context:,} tokens", "gradients": "  gradients"}
    labels |= {"moments": "  Adam's two moments", "total": "  total"}
    heads = {"inference": "inference, one text", "training": "training with Adam"}
    table = plain_table("", ">float32, bytes", "", ">bfloat16, bytes", "")
    for use, sizes in report["memory"].items():
        table.add_row(heads[use])
        for key in sizes["float32"]:
            cells = [(f"{of[key]:,}", binary_size(of[key])) for of in (sizes["float32"], sizes["bfloat16"])]
            table.add_row(labels[key], *(cell for pair in cells for cell in pair))
    yield _title("Memory")
    yield table
    yield (
        "The KV cache has a key and a value of n_embd numbers each, per token and layer. Training needs 16 bytes per "
        "parameter in float32, and 8 if weights, gradients and both moments are bfloat16. Float32 moments, or a "
        "float32 copy of the weights, need more. Activations need more memory, and are not counted here."
    )


def _tensors(report: dict[str, Any], console: Console) -> Iterable[Any]:
    tensors, wide = report["tensors"], console.width >= NARROW
    columns = ["name", ">shape", *(["dtype"] if wide else []), ">count", ">mean", ">std", ">min", ">max"]
    table = plain_table(*columns, gap=1 if wide else 0)
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
            yield f"NOT FINITE: {tensor['name']} holds {bad}; its statistics leave them out."


def _vocabulary(report: dict[str, Any], console: Console) -> Iterable[Any]:
    vocabulary = report["vocabulary"]
    if vocabulary["missing"]:
        yield f"No vocabulary: {vocabulary['missing']}"
        return
    yield _title(f"Vocabulary: {vocabulary['n_ids']:,} ids, <|endoftext|> is {vocabulary['end_of_text']:,}")
    table = plain_table(">id", "in the file", "text")
    for token in (*vocabulary["first_tokens"], None, *vocabulary["last_tokens"]):
        table.add_row(*((f"{token['id']:,}", token["token"], repr(token["text"])) if token else ("...",)))
    yield table
    yield ""
    n_merges = vocabulary["n_merges"]
    yield _title(f"Merges: {n_merges:,} (Ġ means a space)")
    table = plain_table(">number", "left", "right", "result")
    first, last = vocabulary["first_merges"], vocabulary["last_merges"]
    for number, pair in enumerate(first, start=1):
        table.add_row(f"{number:,}", *pair, "".join(pair))
    table.add_row("...")
    for number, pair in enumerate(last, start=n_merges - len(last) + 1):
        table.add_row(f"{number:,}", *pair, "".join(pair))
    yield table


def _title(text: str) -> Text:
    from rich.text import Text

    return Text(text, style="bold")


def _shape(tensor: dict[str, Any]) -> str:
    return f"({', '.join(str(n) for n in tensor['shape'])})"


def _number(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:.{digits}g}"
