"""Responses to the instructions of a test set: `gpt2-evaluate --task responses`, and the end of `gpt2-train`."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpt2_jax
from gpt2_jax import progress
from gpt2_jax.commands import _interrupts, _model
from gpt2_jax.files import expanded, replacing_file

if TYPE_CHECKING:
    from gpt2_jax import GPT2Config
    from gpt2_jax.commands.evaluate import Args
    from gpt2_jax.data.templates import Template
    from gpt2_jax.evaluate import Responses

OUTPUT = "responses.json"  # in the folder of a run


def template_for(name: str | None, model: str | None) -> Template:
    """Return the template that an option names, or that of the model's run.

    Raises:
      ValueError: there is no such template, or none at all.
    """
    from gpt2_jax.data.templates import TEMPLATES, load_template

    if name is not None and name not in TEMPLATES:
        raise ValueError(f"--template must be {', '.join(TEMPLATES)}, not {name!r}")
    template = TEMPLATES[name] if name else load_template(model)
    if template is None:
        raise ValueError(
            f"{_model.title(model)} is no run that was trained on instructions, so it has no template: name one with "
            f"--template ({', '.join(TEMPLATES)})"
        )
    return template


def evaluate(args: Args) -> tuple[GPT2Config, Responses]:
    """Return the model's config, and its responses to the records of a file. With --output, they are written there.

    Raises:
      ValueError: the file has no records, a record has another form, or the model has no template.
    """
    from gpt2_jax.data.conversations import conversation_of
    from gpt2_jax.data.tables import records
    from gpt2_jax.evaluate import Judge, judged, responses

    judge = Judge(args.judge_url, args.judge_model) if args.judge_url else None
    template, path = template_for(args.template, args.model), expanded(args.file)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    found = []
    for record, place in itertools.islice(records(path), args.limit):
        try:
            conversation_of(record)  # before weights are loaded: that can take long
        except ValueError as error:
            raise ValueError(f"{place}{error}") from error
        found.append(record)
    if not found:
        raise ValueError(f"{path} is empty: there is nothing to evaluate")
    _model.keep_compiled()
    tokenizer = gpt2_jax.load_tokenizer(_model.source(args.model))
    config, params = _model.load(args.model, args.dtype, args.mesh)
    print(f"model: {_model.title(args.model)}, {config.n_params:,} parameters, {config.compute_dtype}", file=sys.stderr)
    result = responses(config, params, tokenizer, template, found, track=_track("responses"))
    if args.output:
        write(result, expanded(args.output))
    if judge:
        result = judged(result, judge, _track("judge"))
        if args.output:
            write(result, expanded(args.output))
    return config, result


def after_training(folder: Path) -> None:
    """Answer the test split of a run with its best model. Write RUN/responses.json, and print a line."""
    from gpt2_jax.data.tables import records
    from gpt2_jax.data.templates import load_template
    from gpt2_jax.evaluate import responses

    path, template = folder / "data" / "test.records.jsonl", load_template(folder)
    if template is None or not path.is_file():
        return
    config, params = gpt2_jax.load(folder)
    tokenizer, found = gpt2_jax.load_tokenizer(folder), [record for record, _ in records(path)]
    result = responses(config, params, tokenizer, template, found, track=_track("test"))
    write(result, folder / OUTPUT)
    said = f"exact match {result.exact_match:.1%}, ROUGE-L {result.rouge_l:.3f}"
    print(f"test, {result.responses:,} instructions: {said}; {folder / OUTPUT} has the responses", file=sys.stderr)


def write(result: Responses, path: Path) -> None:
    """Write the responses as a JSON list."""
    with replacing_file(path) as temporary:
        text = json.dumps(result.records, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8", errors="surrogatepass")


def _track(title: str) -> Any:
    def track(parts: Sequence[Any]) -> Iterator[Any]:
        for part in progress.tracked(title)(parts):
            _interrupts.check()
            yield part

    return track
