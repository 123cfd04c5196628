"""Measure how good a model is. `python scripts/evaluate.py --help` shows the options."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from gpt2_jax import GPT2Config, Tokenizer
    from gpt2_jax.params import Params

# gpt2_jax, and jax with it, is imported once the arguments are known to be good: `--help` and a typo answer at once.

UNBOUNDED = 10_000  # the width where no terminal sets one: nothing is cut, nothing wrapped
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
    model: Annotated[str | None, tyro.conf.arg(metavar="MODEL", help_behavior_hint="(default: embedded)")] = None
    """A size, 124M, 355M, 774M or 1558M (fetched if it is not there yet); an id of the Hugging Face hub ("owner/name");
    or a directory with OpenAI's TensorFlow checkpoint, with Hugging Face's files, or saved by gpt2_jax."""
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
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        tyro.conf.arg(metavar="{float32,bfloat16}", help_behavior_hint="(default: the checkpoint's)"),
    ] = None
    """Dtype of weights and matrix products; bfloat16 takes half the memory, and on a CPU more time."""
    limit: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Take the first N documents, passages or questions alone, 1 or more."""
    json: bool = False
    """Write one JSON object instead of the table; gpt2_jax.evaluate documents its keys."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; bad input is one line on standard error and exit status 2."""
    args = tyro.cli(Args, prog="gpt2-evaluate", description=Args.__doc__, args=argv)
    try:
        run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; nothing more can be written, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        print(f"gpt2-evaluate: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run(args: Args) -> None:
    """Read the file, load the model, measure, print.

    Raises:
      ValueError, OSError: bad input; nothing has been written to standard output.

    """
    _check(args)
    from gpt2_jax.evaluate import files
    from gpt2_jax.files import expanded

    readers = {"perplexity": files.read_documents, "lambada": files.read_passages, "cloze": files.read_questions}
    items = readers[args.task](expanded(args.file))  # before the weights: those can take long
    if args.limit is not None and args.task == "perplexity" and args.file.suffix != ".jsonl":
        raise ValueError(f"--limit counts documents, and {args.file} is one: cut it, or give a .jsonl")
    items = items[: args.limit]
    import gpt2_jax
    from gpt2_jax.compilation import keep_compiled

    keep_compiled()
    directory = gpt2_jax.embedded_model() if args.model is None else args.model
    tokenizer = gpt2_jax.load_tokenizer(directory)
    config, params = gpt2_jax.load(directory, **({} if args.dtype is None else {"dtype": args.dtype}))
    config = config if args.dtype is None else config.replace(compute_dtype=args.dtype)
    name = "embedded" if args.model is None else args.model
    title = "the embedded Shakespeare model" if args.model is None else args.model
    print(f"model: {title}, {config.n_params:,} parameters, {config.compute_dtype}", file=sys.stderr)
    result = dataclasses.asdict(_measure(args, config, params, tokenizer, items))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?" instead of failing
    if args.json:
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

    more = {"track": _track(args.task)}
    if args.task != "lambada":
        more |= {"detokenizer": args.detokenizer}
    if args.task == "perplexity":
        more |= {"stride": args.stride, "per": args.per, "bos": args.bos}
    task = {"perplexity": evaluate.perplexity, "lambada": evaluate.lambada, "cloze": evaluate.cloze}[args.task]
    return task(config, params, tokenizer, items, **more)


def _track(description: str) -> Callable[[list], Iterable]:
    """Return what shows the progress through a list: a bar on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        return iter
    from rich.console import Console
    from rich.progress import track

    return functools.partial(track, description=description, console=Console(stderr=True), transient=True)


def _print_table(result: dict[str, Any]) -> None:
    """Print what is measured and counted, each with its convention."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), show_edge=False, pad_edge=False)
    table.add_column("measure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("how", overflow="fold")
    for key, how in result["conventions"].items():
        table.add_row(key.replace("_", " "), _text(key, result[key]), how)
    terminal = sys.stdout.isatty()
    width = None if terminal else UNBOUNDED
    Console(force_terminal=terminal, width=width, markup=False, highlight=False, emoji=False).print(table)


def _text(key: str, value: float) -> str:
    """Return a count as 1,234, a share as 12.34 %, anything else with six digits."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{100 * value:.2f} %" if key.startswith("accuracy") else f"{value:.6g}"


def _finite(value: Any) -> Any:
    """Return null, which JSON has, for what it has not: the infinite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
