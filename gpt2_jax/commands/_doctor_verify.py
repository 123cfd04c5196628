"""`gpt2-doctor --verify`: checks and measures a model, and prints the results."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpt2_jax
from gpt2_jax import progress
from gpt2_jax.commands import _doctor_cache, _tables
from gpt2_jax.files import expanded

if TYPE_CHECKING:
    from rich.console import Console

    from gpt2_jax import GPT2Config, Tokenizer
    from gpt2_jax.evaluate.paper import Row
    from gpt2_jax.inspection.known_values import KnownValues
    from gpt2_jax.inspection.verification import Check
    from gpt2_jax.params import Params

MARKS = {"pass": "pass", "fail": "FAIL", "not applicable": "not applicable"}
LONGEST = 40  # maximum characters of an expected or found value in the table, unless the check failed


def verify(model: str, lambada: Path | None, wikitext: Path | None, limit: int | None) -> dict[str, Any]:
    """Check a model against known values, and measure it on the given files.

    Returns:
      Plain data: model; directory; known: the name of the known values, or None; passed: True if no check failed;
      checks: from `gpt2_jax.inspection.verification`; measures: from `gpt2_jax.evaluate.paper`; limit: as given.

    Raises:
      ValueError, OSError: there is no such model, a file cannot be read, or `limit` is invalid. Damaged files of the
        model do not raise: they are a failed check.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be 1 or more, not {limit}")
    if limit is not None and lambada is None and wikitext is None:
        raise ValueError("--limit needs --lambada FILE or --wikitext FILE")
    texts = _texts(lambada, wikitext, limit)  # before the weights, which take longer
    size, directory = _locate(model)
    found: dict[str, Any] = {
        "model": model,
        "directory": str(directory),
        "known": None,
        "passed": False,
        "limit": limit,
    }
    checks = [] if size is None else [_check_files(size, directory)]
    loaded = _load(directory)
    if isinstance(loaded, str):
        return found | {"checks": [*checks, _failed("the files are readable", loaded)], "measures": []}
    config, params, tokenizer, trouble = loaded
    print(f"model: {model}, {config.n_params:,} parameters, {config.param_dtype}", file=sys.stderr)
    checks += [_failed("the vocabulary is readable", trouble)] if trouble else []
    known = _known(size, config)
    from gpt2_jax.inspection import verification

    checks += verification.verify(config, params, tokenizer, known)
    if texts and tokenizer is None:
        raise ValueError(f"{directory} has no vocabulary: --lambada and --wikitext need one")
    measures = _measure(config, params, tokenizer, texts, known) if tokenizer else []
    found |= {"known": known and known.name, "passed": all(check["result"] != "fail" for check in checks)}
    return found | {"checks": checks, "measures": measures}


def _texts(lambada: Path | None, wikitext: Path | None, limit: int | None) -> dict[str, list[str]]:
    """Read the files to measure on."""
    from gpt2_jax.evaluate import files

    texts = {}
    if lambada is not None:
        texts["lambada"] = files.read_passages(expanded(lambada))[:limit]
    if wikitext is not None:
        documents = files.read_documents(expanded(wikitext))
        if len(documents) > 1 or wikitext.suffix == ".jsonl":
            raise ValueError(f"{wikitext} must be the plain test text of WikiText-2, not .jsonl")
        texts["wikitext"] = ["".join(documents[0].splitlines(keepends=True)[:limit])]
    return texts


def _locate(model: str) -> tuple[str | None, Path]:
    """Return the released size that `model` names, or None, and the model's directory. A size is not downloaded."""
    from gpt2_jax import checkpoints
    from gpt2_jax.checkpoints.sources import size_meant
    from gpt2_jax.release import download

    size = size_meant(model)
    if size is None:
        directory = checkpoints.locate(model)
        checkpoints.form_of(directory)  # raises where there is no model
        return None, directory
    directory = download.directory_of(size)
    wrong = _doctor_cache.wrong_files(size, directory)
    if absent := [name for name in wrong if not (directory / name).is_file()]:
        raise FileNotFoundError(
            f"{directory} lacks {', '.join(absent)}: download {size} first with gpt2-download {size}"
        )
    return size, directory


def _check_files(size: str, directory: Path) -> Check:
    """Check the files of a released size: their bytes, and the content of the small ones."""
    wrong = [f"{name}: {what}" for name, what in _doctor_cache.wrong_files(size, directory).items()]
    right = "as released"
    if wrong:
        return _failed("files", "; ".join(wrong)) | {"expected": right}
    return {"check": "files", "expected": right, "found": right, "result": "pass", "note": ""}


def _failed(about: str, found: str) -> Check:
    return {"check": about, "expected": "yes", "found": found, "result": "fail", "note": ""}


def _load(directory: Path) -> tuple[GPT2Config, Params, Tokenizer | None, str] | str:
    """Load a model from its files, not from a kept copy.

    Returns:
      config, params, tokenizer (None if no vocabulary can be read), and what is wrong with the vocabulary ("" if
      nothing is). If the weights cannot be loaded, only a str that says what is wrong with them.
    """
    from gpt2_jax import checkpoints

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about non-finite values: a check reports them
            config, params = gpt2_jax.load(directory, keep_copy=False)
    except ValueError as error:
        return str(error)
    if not checkpoints.has_vocabulary(directory):
        return config, params, None, ""
    try:
        return config, params, gpt2_jax.load_tokenizer(directory), ""
    except (ValueError, OSError) as error:
        return config, params, None, str(error)


def _known(size: str | None, config: GPT2Config) -> KnownValues | None:
    from gpt2_jax.inspection import known_values

    return known_values.known_for(config) if size is None else known_values.KNOWN[size]


def _measure(
    config: GPT2Config, params: Params, tokenizer: Tokenizer, texts: dict[str, list[str]], known: KnownValues | None
) -> list[Row]:
    """Measure the model on the given texts."""
    from gpt2_jax import evaluate
    from gpt2_jax.evaluate import paper

    size = known and known.name
    rows = []
    if "lambada" in texts:
        track = progress.tracked("LAMBADA")
        result = evaluate.lambada(config, params, tokenizer, texts["lambada"], track=track)
        rows += paper.compare_lambada(result, size)
    if "wikitext" in texts:
        track = progress.tracked("WikiText-2")
        how: dict[str, Any] = {"detokenizer": "wikitext", "per": "word", "track": track}
        rows += paper.compare_wikitext2(evaluate.perplexity(config, params, tokenizer, texts["wikitext"], **how), size)
    return rows


def print_checks(found: dict[str, Any], console: Console) -> None:
    """Print the result of `verify`."""
    table = _tables.plain_table("check", "expected", "found", "result")
    for check in found["checks"]:
        note = f": {check['note']}" if check["note"] else ""
        table.add_row(check["check"], *_both(check), f"{MARKS[check['result']]}{note}")
    console.print(table)
    if found["measures"]:
        table = _tables.plain_table("measure", ">found", ">paper", "how it is measured here", "the paper's figure")
        for row in found["measures"]:
            values = (_measured(row["measure"], row[key]) for key in ("found", "paper"))
            table.add_row(row["measure"], *values, row["ours"], row["papers"])
        console.print("", table)
        if found["limit"] is not None:
            n = found["limit"]
            note = f"Only the first {n:,} passages or lines were measured. The paper's figures are for all of them."
            console.print("", note, sep="\n", soft_wrap=True)
    console.print("", _summary(found), sep="\n", soft_wrap=True)


def _summary(found: dict[str, Any]) -> str:
    results = [check["result"] for check in found["checks"]]
    counts = ", ".join(f"{results.count(result)} {result}" for result in MARKS if result in results)
    if found["passed"]:
        return f"{found['directory']}: {counts}."
    if found["known"] is None:
        return f"{found['directory']}: {counts}. The files are damaged, or they are not a GPT-2 model."
    return (
        f"{found['directory']}: {counts}. These are not the published weights of {found['known']}: they are damaged, "
        "fine-tuned, or another model's."
    )


def _both(check: Check) -> tuple[str, str]:
    """Return the expected and the found value as text. Long texts are cut, unless the check failed."""
    texts = _value(check["expected"]), _value(check["found"])
    if check["result"] == "fail":
        return texts
    expected, found = (text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..." for text in texts)
    return expected, found


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:,}" for name, number in value.items())
    if isinstance(value, str):
        return value.replace("\n", "\\n")
    return f"{value:,}" if isinstance(value, int) else f"{value:.7g}" if isinstance(value, float) else str(value)


def _measured(measure: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2f} %" if "accuracy" in measure else f"{value:.2f}"
