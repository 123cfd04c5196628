"""`gpt2-classify`: the labels that a classifier gives to texts."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

import gpt2_jax
from gpt2_jax.commands import _command, _interrupts, _model, _prompts
from gpt2_jax.files import expanded

if TYPE_CHECKING:
    import numpy as np

    from gpt2_jax import GPT2Config, Tokenizer

AT_ONCE = 10_000  # texts whose labels are printed together


@dataclasses.dataclass
class Args:
    """Print the label of each text and its probability, separated by a tab. The model is a classifier of gpt2-train."""

    texts: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")] = ()
    """Texts to classify."""
    model: Annotated[
        str | None, tyro.conf.arg(metavar="MODEL", help_behavior_hint="(required)", help=_model.SOURCES)
    ] = None
    input: Annotated[Path | None, tyro.conf.arg(metavar="FILE", aliases=["-i"], help_behavior_hint="")] = None
    """A file of texts: a .csv, .tsv, .jsonl, .json or .parquet file with --field, or a text file with one text per
    line. - reads lines of standard input."""
    field: str = "text"
    """The field or column of --input that contains the text."""
    label_field: Annotated[str | None, tyro.conf.arg(metavar="FIELD", help_behavior_hint="")] = None
    """The field or column of --input with the true label. Accuracy and F1 then go to standard error."""
    n_tokens: Annotated[
        int | None, tyro.conf.arg(metavar="TOKENS", help_behavior_hint="(default: the model's n_ctx)")
    ] = None
    """Longer texts lose their end, 1 or more tokens. A message says how many."""
    dtype: _model.DtypeOption = None
    """Dtype of weights and matrix products. bfloat16 needs half the memory, but more time on a CPU."""
    mesh: _model.Mesh = dataclasses.field(default_factory=_model.Mesh)
    json: bool = False
    """Write a JSON object per text: {"label": ..., "probabilities": {label: probability}}."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    _command.call("gpt2-classify", Args, run, argv, text=True)


def run(args: Args) -> None:
    """Read the texts, load the model, print the labels."""
    _check(args)
    texts = list(_texts(args))  # before weights are loaded: that can take long
    _model.keep_compiled()
    labels = gpt2_jax.load_config(_model.source(args.model)).labels
    if not labels:
        raise ValueError(
            f"{args.model} is no classifier: it has no labels (train one with gpt2-train --objective classification)"
        )
    if unknown := sorted({label for _, label in texts if label is not None} - set(labels)):
        raise ValueError(f"the model has no label {unknown[0]!r}: its labels are {', '.join(labels)}")
    tokenizer = gpt2_jax.load_tokenizer(_model.source(args.model))
    config, params = _model.load(args.model, args.dtype, args.mesh)
    rows = _rows(args, config, tokenizer, [text for text, _ in texts])
    true, got = [label for _, label in texts], []
    for start in range(0, len(rows), AT_ONCE):
        probabilities = gpt2_jax.classify(config, params, rows[start : start + AT_ONCE], track=_checked)
        got += probabilities.argmax(-1).tolist()
        _print(config, probabilities, args.json)
    if args.label_field is not None:
        _compare(config, true, got)


def _check(args: Args) -> None:
    """Reject missing options, and options that do not work together."""
    if args.model is None:
        raise ValueError("--model is missing: name the run of a classifier, for example runs/classify_spam")
    if bool(args.texts) == (args.input is not None):
        raise ValueError("give texts, or --input FILE" + (", but not both" if args.texts else ""))
    if args.input is None and (args.label_field is not None or args.field != Args.field):
        raise ValueError("--field and --label-field are for --input")
    if args.n_tokens is not None and args.n_tokens < 1:
        raise ValueError(f"--n-tokens must be 1 or more, not {args.n_tokens}")


def _texts(args: Args) -> Iterator[tuple[str, str | None]]:
    """Yield the texts, each with its true label, if the file has labels."""
    if args.input is None:
        yield from ((text, None) for text in _command.check_text("TEXT", args.texts))
        return
    if _prompts.descriptor_of(args.input) == 0 or args.input.suffix.lower() in ("", ".txt"):
        if args.label_field is not None or args.field != Args.field:
            raise ValueError(
                f"--field and --label-field are for .csv, .tsv, .jsonl, .json and .parquet, not {args.input}"
            )
        (whole,) = _prompts.read_prompts((), [args.input])
        yield from ((line.removesuffix("\n"), None) for line in io.StringIO(whole, newline=None))
        return
    from gpt2_jax.data.fields import check_has
    from gpt2_jax.data.labelled import label_name
    from gpt2_jax.data.tables import records

    if not expanded(args.input).is_file():
        raise FileNotFoundError(f"no such file: {args.input}")
    for record, place in records(args.input):
        for name in filter(None, (args.field, args.label_field)):
            check_has(record, name, place)
        label = None if args.label_field is None else label_name(record[args.label_field], place)
        yield record[args.field], label


def _rows(args: Args, config: GPT2Config, tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text. Long texts are cut, with one message."""
    most = min(args.n_tokens or config.n_ctx, config.n_ctx)
    rows = []
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str) or not text:
            raise ValueError(f"text {number} is empty" if not text else f"text {number} is not a text: {text!r:.60}")
        rows.append(tokenizer.encode(text))
    if n_cut := sum(len(row) > most for row in rows):
        print(f"{n_cut:,} of {len(rows):,} texts have more than {most:,} tokens, and lose their end", file=sys.stderr)
    return [row[:most] for row in rows]


def _checked(batches: list) -> Iterator:
    for batch in batches:
        _interrupts.check()
        yield batch


def _print(config: GPT2Config, probabilities: np.ndarray, as_json: bool) -> None:
    for row in probabilities.tolist():
        best = max(range(len(row)), key=row.__getitem__)
        if as_json:
            found = {"label": config.labels[best], "probabilities": dict(zip(config.labels, row, strict=True))}
            print(json.dumps(found, ensure_ascii=False))
        else:
            print(f"{config.labels[best]}\t{row[best]:.4f}")


def _compare(config: GPT2Config, true: Sequence[str | None], got: Sequence[int]) -> None:
    """Write how many labels are right to standard error."""
    from gpt2_jax.evaluate.label_metrics import confusion, label_metrics, summary

    numbers = {label: i for i, label in enumerate(config.labels)}
    metrics = label_metrics(confusion([numbers[str(label)] for label in true], got, len(numbers)), config.labels)
    print(f"{summary(metrics)} ({metrics['examples']:,} texts)", file=sys.stderr)
    for label, found in metrics["by_label"].items():
        parts = ", ".join(f"{name} {found[name]:.3f}" for name in ("precision", "recall", "f1"))
        print(f"{label}: {parts} ({found['examples']:,} texts)", file=sys.stderr)
