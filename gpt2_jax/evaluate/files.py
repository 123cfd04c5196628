"""Reads files to evaluate on: text, JSON lines, and the layout of the Children's Book Test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2_jax.evaluate._cloze import Question, check_question

CLOZE_FIELDS = '{"context": "...", "question": "... XXXXX ...", "candidates": ["...", "..."], "answer": "..."}'


def read_documents(path: Path) -> list[str]:
    """Return the texts of a file. A .jsonl file has one per line; any other file is one text.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file is not UTF-8, or is empty, or a line is not {"text": "..."}.
    """
    return read_passages(path) if path.suffix == ".jsonl" else [_read(path)]


def read_passages(path: Path) -> list[str]:
    """Return the texts of a JSON lines file, each line {"text": "..."}. Blank lines are skipped.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file is not UTF-8, or is empty, or a line is not {"text": "..."}.
    """

    def text_of(name: str, record: dict[str, Any]) -> str:
        if not isinstance(record.get("text"), str):
            raise ValueError(f'{name} must be an object with a string "text": {{"text": "..."}}')
        return record["text"]

    return _read_jsonl(path, text_of)


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a JSON lines file with the fields of Question, or of the Children's Book Test.

    In the layout of the Children's Book Test, each question is a block, with blank lines between blocks. The sentences
    of a block are numbered from 1. The last sentence has the blank. Then come a tab, the answer, tabs, and the
    candidates with `|` between them. A file has this layout if its first line begins with "1 ".

    Raises:
      OSError: the file cannot be read.
      ValueError: the file is not UTF-8, or is empty, or a question is not valid.
    """

    def question_of(name: str, record: dict[str, Any]) -> Question:
        texts: list[Any] = [record.get(field) for field in ("context", "question", "answer")]
        candidates = record.get("candidates")
        if not isinstance(candidates, list) or not all(isinstance(text, str) for text in (*texts, *candidates)):
            raise ValueError(f"{name} must be {CLOZE_FIELDS}")
        question = Question(texts[0], texts[1], tuple(candidates), texts[2])
        check_question(name, question)
        return question

    text = _read(path)
    return _read_cbt(text, path) if text.lstrip().startswith("1 ") else _read_jsonl(path, question_of)


def _read_cbt(text: str, path: Path) -> list[Question]:
    questions, sentences = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        name = f"{path}, line {number}"
        index, _, rest = line.strip().partition(" ")
        if index != str(len(sentences) + 1):
            raise ValueError(f"{name} must begin with {len(sentences) + 1}, its sentence number: {line[:60]!r}")
        if "\t" not in rest:
            sentences.append(rest)
            continue
        sentence, *fields = (field for field in rest.split("\t") if field)
        if len(fields) != 2:
            raise ValueError(f"{name} must have the answer and the candidates (cat|dog|...) after tabs: {line[:60]!r}")
        questions.append(Question(" ".join(sentences), sentence, tuple(fields[1].split("|")), fields[0]))
        check_question(name, questions[-1])
        sentences = []
    if sentences:
        raise ValueError(f"{path} ends with sentences that have no question after them")
    return questions


def _read_jsonl(path: Path, read: Callable[[str, dict[str, Any]], Any]) -> list[Any]:
    """Return `read(name, object)` for each line; messages call the line `name`."""
    records = []
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        name = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is not JSON: {error}") from error
        records.append(read(name, record if isinstance(record, dict) else {}))
    return records


def _read(path: Path) -> str:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} is empty: there is nothing to evaluate")
    return text
