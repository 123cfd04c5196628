"""`gpt2-evaluate`: how good a model is."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import gpt2_jax
from gpt2_jax import progress
from gpt2_jax.commands import _command, _model, _tables
from gpt2_jax.files import expanded

if TYPE_CHECKING:
    from gpt2_jax import GPT2Config, Tokenizer
    from gpt2_jax.params import Params

PERPLEXITY_ALONE = ("stride", "per", "bos")


@dataclasses.dataclass
class Args:
    """Measure how good a model is: a table of numbers, each with its convention, goes to standard output."""

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
    """UTF-8. perplexity: a text, or .jsonl with a document a line, {"text": "..."}. lambada: .jsonl with a passage a
    line, {"text": "..."}, its last word included. cloze: .jsonl with a question a line, an object of "context",
    "question" (XXXXX is its blank), "candidates" (a list) and "answer", or the Children's Book Test's own layout."""
    task: Annotated[Literal["perplexity", "lambada", "cloze"], tyro.conf.arg(aliases=["-t"])]
    """perplexity of text; lambada: accuracy of passages' last words, with and without a filter of stop words, and their
    perplexity; cloze: accuracy of filling a blank with one of several candidates."""
    model: _model.ModelOption = None
    stride: Annotated[
        int | None, tyro.conf.arg(metavar="TOKENS", help_behavior_hint="(default: half of the model's n_ctx)")
    ] = None
    """perplexity: tokens from one window of a long text to the next, 1 to n_ctx; a token follows n_ctx - stride tokens
    or more, and the time grows as n_ctx / stride."""
    detokenizer: Literal["none", "wikitext", "ptb"] = "none"
    """perplexity, cloze: undo what a benchmark did to its text, as GPT-2's paper does: WikiText's or the Penn
    Treebank's spaces between words and punctuation. The Children's Book Test is cut as ptb is."""
    per: Literal["token", "word", "byte"] = "token"
    """perplexity: what its exponent is divided by; words, which white space separates, and bytes are those of the file,
    before any detokenizer."""
    bos: bool = False
    """perplexity: put <|endoftext|> before each document, so that its first token is scored too. Hugging Face's
    documentation does not."""
    dtype: _model.DtypeOption = None
    """Dtype of weights and matrix products; bfloat16 takes half the memory, and on a CPU more time."""
    limit: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Take the first N documents, passages or questions alone, 1 or more."""
    json: bool = False
    """Write one JSON object instead of the table; gpt2_jax.evaluate documents its keys."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    _command.call("gpt2-evaluate", Args, run, argv, text=True)


def run(args: Args) -> None:
    """Read the file, load the model, measure, print."""
    _check(args)
    from gpt2_jax.evaluate import files

    readers = {"perplexity": files.read_documents, "lambada": files.read_passages, "cloze": files.read_questions}
    items = readers[args.task](expanded(args.file))  # before the weights: those can take long
    if args.limit is not None and args.task == "perplexity" and args.file.suffix != ".jsonl":
        raise ValueError(f"--limit counts documents, and {args.file} is one: cut it, or give a .jsonl")
    items = items[: args.limit]
    _model.keep_compiled()
    tokenizer = gpt2_jax.load_tokenizer(_model.source(args.model))
    config, params = _model.load(args.model, args.dtype)
    print(f"model: {_model.title(args.model)}, {config.n_params:,} parameters, {config.compute_dtype}", file=sys.stderr)
    result = dataclasses.asdict(_measure(args, config, params, tokenizer, items))
    if args.json:
        name = "embedded" if args.model is None else args.model
        about = {"task": args.task, "file": str(args.file), "model": name, "dtype": str(config.compute_dtype)}
        print(json.dumps(about | {key: _finite(value) for key, value in result.items()}, indent=2, allow_nan=False))
    else:
        _print_table(result)


def _check(args: Args) -> None:
    """Refuse options that do not go together."""
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be 1 or more, not {args.limit}")
    for name in PERPLEXITY_ALONE:
        if args.task != "perplexity" and getattr(args, name) != getattr(Args, name):
            raise ValueError(f"--{name} is for --task perplexity, not {args.task}")
    if args.task == "lambada" and args.detokenizer != "none":
        raise ValueError("--detokenizer is for --task perplexity or cloze: lambada takes its passages as they are")


def _measure(args: Args, config: GPT2Config, params: Params, tokenizer: Tokenizer, items: list) -> Any:
    """Return the task's result."""
    from gpt2_jax import evaluate

    more = {"track": progress.tracked(args.task)}
    if args.task != "lambada":
        more |= {"detokenizer": args.detokenizer}
    if args.task == "perplexity":
        more |= {"stride": args.stride, "per": args.per, "bos": args.bos}
    task = {"perplexity": evaluate.perplexity, "lambada": evaluate.lambada, "cloze": evaluate.cloze}[args.task]
    return task(config, params, tokenizer, items, **more)


def _print_table(result: dict[str, Any]) -> None:
    """Print what is measured and counted, each with its convention."""
    table = _tables.plain_table("measure", ">value", "how")
    table.columns[0].no_wrap = True
    for key, how in result["conventions"].items():
        table.add_row(key.replace("_", " "), _text(key, result[key]), how)
    _tables.console().print(table)


def _text(key: str, value: float) -> str:
    """Return a count as 1,234, a share as 12.34 %, anything else with six digits."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{100 * value:.2f} %" if key.startswith("accuracy") else f"{value:.6g}"


def _finite(value: Any) -> Any:
    """Return null, which JSON has, for what it has not: the infinite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
