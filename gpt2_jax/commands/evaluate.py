"""`gpt2-evaluate`: measure how good a model is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import gpt2_jax
from gpt2_jax import progress
from gpt2_jax.commands import _command, _interrupts, _model, _processes, _responses, _tables
from gpt2_jax.files import expanded

if TYPE_CHECKING:
    from gpt2_jax import GPT2Config, Tokenizer
    from gpt2_jax.params import Params
    from gpt2_jax.processes import Share

PERPLEXITY_ALONE = ("stride", "per", "bos")
RESPONSES_ALONE = ("template", "output", "judge_url", "judge_model")
OPTIONS = ("task", *PERPLEXITY_ALONE, "detokenizer", "dtype", "limit")


@dataclasses.dataclass
class Args:
    """Measure how good a model is. Prints a table of numbers, each with its convention."""

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
    """A UTF-8 file. perplexity: a text, or .jsonl with one document per line, {"text": "..."}.
    lambada: .jsonl with one passage per line, {"text": "..."}, the last word included.
    cloze: .jsonl with one question per line, or the layout of the Children's Book Test. A line is an object with
    "context", "question" (XXXXX marks the blank), "candidates" (a list) and "answer".
    responses: .json or .jsonl with {"instruction", "input", "output"} or {"messages"}, as for training; also
    RUN/data/test.records.jsonl of a training run."""
    task: Annotated[Literal["perplexity", "lambada", "cloze", "responses"], tyro.conf.arg(aliases=["-t"])]
    """perplexity: perplexity of text.
    lambada: accuracy on the last word of passages, with and without a stop-word filter, and its perplexity.
    cloze: accuracy in filling a blank with one of several candidates.
    responses: exact match and ROUGE-L of the responses to instructions."""
    model: _model.ModelOption = None
    stride: Annotated[
        int | None, tyro.conf.arg(metavar="TOKENS", help_behavior_hint="(default: half of the model's n_ctx)")
    ] = None
    """perplexity: tokens between the starts of two windows of a long text, 1 to n_ctx.
    After the first window, a token has at least n_ctx - stride tokens of context. The time grows as n_ctx / stride."""
    detokenizer: Literal["none", "wikitext", "ptb"] = "none"
    """perplexity, cloze: undo the word splitting of a benchmark's text, as GPT-2's paper does.
    wikitext is for WikiText, ptb for the Penn Treebank and the Children's Book Test."""
    per: Literal["token", "word", "byte"] = "token"
    """perplexity: measure it per token, per word or per byte.
    Words (separated by white space) and bytes are those of the file, before any detokenizer."""
    bos: bool = False
    """perplexity: put <|endoftext|> before each document, so that its first token is scored too.
    The documentation of Hugging Face does not do this."""
    dtype: _model.DtypeOption = None
    """Dtype of weights and matrix products. bfloat16 needs half the memory, but more time on a CPU."""
    limit: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Use only the first N documents, passages, questions or instructions, 1 or more."""
    template: Annotated[
        str | None, tyro.conf.arg(metavar="{alpaca,phi3,plain}", help_behavior_hint="(default: that of the run)")
    ] = None
    """responses: the template that makes a prompt of an instruction."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """responses: write the responses to this file, a JSON list; an earlier file is replaced."""
    judge_url: Annotated[str, tyro.conf.arg(metavar="URL", help_behavior_hint="(default: no judge)")] = ""
    """responses: let a language model score each response from 0 to 100. URL is any OpenAI-compatible address up to its
    version, such as http://localhost:11434/v1 (Ollama). It gets the instructions and the responses. A key is read from
    the environment variable OPENAI_API_KEY."""
    judge_model: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="(needed with --judge-url)")] = ""
    """responses: the name of the judge at its address."""
    mesh: _model.Mesh = dataclasses.field(default_factory=_model.Mesh)
    processes: _processes.Processes = dataclasses.field(default_factory=_processes.Processes)
    json: bool = False
    """Write one JSON object instead of the table. gpt2_jax.evaluate documents its keys."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    _command.call("gpt2-evaluate", Args, run, argv, text=True)


def run(args: Args) -> None:
    """Read the file, load the model, measure, print."""
    _check(args)
    from gpt2_jax import processes

    share = processes.share()
    with share.telling():
        if args.task == "responses":
            _evaluate_responses(args, share)
        else:
            _evaluate(args, share)


def _evaluate_responses(args: Args, share: Share) -> None:
    if share.count > 1:
        raise ValueError("--task responses runs in one process")
    config, found = _responses.evaluate(args)
    result = dataclasses.asdict(found)
    del result["records"]
    _print(args, config, result)


def _evaluate(args: Args, share: Share) -> None:
    from gpt2_jax.evaluate import files

    readers = {"perplexity": files.read_documents, "lambada": files.read_passages, "cloze": files.read_questions}
    items = readers[args.task](expanded(args.file))  # before weights are loaded: that can take long
    if args.limit is not None and args.task == "perplexity" and args.file.suffix != ".jsonl":
        raise ValueError(f"--limit counts documents, and {args.file} is only one: shorten it, or give a .jsonl file")
    items = items[: args.limit]
    _model.keep_compiled()
    tokenizer = gpt2_jax.load_tokenizer(_model.source(args.model))
    config, params = _model.load(args.model, args.dtype, args.mesh)
    print(f"model: {_model.title(args.model)}, {config.n_params:,} parameters, {config.compute_dtype}", file=sys.stderr)
    if share.count > 1:
        _check_same(args, config, params, items, share)
    _print(args, config, dataclasses.asdict(_measure(args, config, params, tokenizer, items, share)))


def _print(args: Args, config: GPT2Config, result: dict[str, Any]) -> None:
    """Print a result as a table or as JSON."""
    if args.json:
        name = "embedded" if args.model is None else args.model
        about = {"task": args.task, "file": str(args.file), "model": name, "dtype": str(config.compute_dtype)}
        print(json.dumps(about | {key: _finite(value) for key, value in result.items()}, indent=2, allow_nan=False))
    else:
        _print_table(result)


def _check(args: Args) -> None:
    """Reject options that do not work together."""
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be 1 or more, not {args.limit}")
    for name in RESPONSES_ALONE:
        if args.task != "responses" and getattr(args, name) != getattr(Args, name):
            raise ValueError(f"--{name.replace('_', '-')} is for --task responses, not {args.task}")
    if bool(args.judge_url) != bool(args.judge_model):
        raise ValueError("--judge-url and --judge-model need each other: an address, and the name of a model there")
    if args.task == "responses" and args.detokenizer != "none":
        raise ValueError("--detokenizer is for --task perplexity or cloze")
    for name in PERPLEXITY_ALONE:
        if args.task != "perplexity" and getattr(args, name) != getattr(Args, name):
            raise ValueError(f"--{name} is for --task perplexity, not {args.task}")
    if args.task == "lambada" and args.detokenizer != "none":
        raise ValueError("--detokenizer is for --task perplexity or cloze: lambada does not change its passages")


def _check_same(args: Args, config: GPT2Config, params: Params, items: list, share: Share) -> None:
    """Check that all processes measure the same. Each has read its own files, which may be on different disks.

    Raises:
      ValueError: the file, the model or an option is not the same in all processes.
    """
    from gpt2_jax.checkpoints.fingerprints import fingerprint

    own = {f"--{name}": repr(getattr(args, name)) for name in OPTIONS}
    own |= {"FILE": hashlib.sha256(repr(items).encode(errors="replace")).hexdigest()}
    own |= {"--model": fingerprint(config, params)}
    every = share.gather(lambda: own)
    for name in own:
        if any(one[name] != own[name] for one in every):
            raise ValueError(f"{name} is not the same in all processes")


def _measure(args: Args, config: GPT2Config, params: Params, tokenizer: Tokenizer, items: list, share: Share) -> Any:
    """Return the task's result, in all processes."""
    from gpt2_jax import evaluate

    def track(batches: Sequence[Any]) -> Iterator[Any]:
        for batch in progress.tracked(args.task)(batches):
            _interrupts.check()
            yield batch

    more: dict[str, Any] = {"track": track, "share": share}
    if args.task != "lambada":
        more |= {"detokenizer": args.detokenizer}
    if args.task == "perplexity":
        more |= {"stride": args.stride, "per": args.per, "bos": args.bos}
    task = {"perplexity": evaluate.perplexity, "lambada": evaluate.lambada, "cloze": evaluate.cloze}[args.task]
    return task(config, params, tokenizer, items, **more)


def _print_table(result: dict[str, Any]) -> None:
    """Print each measure and each count with its convention."""
    table = _tables.plain_table("measure", ">value", "how")
    table.columns[0].no_wrap = True
    for key, how in result["conventions"].items():
        if result[key] is None:  # a judge that gave no score
            continue
        table.add_row(key.replace("_", " "), _text(key, result[key]), how)
    _tables.console().print(table)


def _text(key: str, value: float) -> str:
    """Return a count as 1,234, a share as 12.34 %, and any other number with six digits."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{100 * value:.2f} %" if key.startswith(("accuracy", "exact")) else f"{value:.6g}"


def _finite(value: Any) -> Any:
    """Return None for a number that is not finite, because JSON cannot hold it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
