"""Cloze questions with given choices, as in the Children's Book Test: which choice fits the blank?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from gpt2_jax.activations import Tap
from gpt2_jax.changes import Edits
from gpt2_jax.checks import choice
from gpt2_jax.config import GPT2Config
from gpt2_jax.evaluate.continuations import score_continuations
from gpt2_jax.evaluate.detokenizers import DETOKENIZERS
from gpt2_jax.params import Params
from gpt2_jax.processes import Share
from gpt2_jax.tokenizer import Tokenizer

BLANK = "XXXXX"


@dataclasses.dataclass(frozen=True)
class Question:
    """A sentence with a blank, the text before it, and the candidates for the blank.

    Attributes:
      context: the sentences before the question; may be empty.
      question: the sentence, with "XXXXX" exactly once, where the word is missing.
      candidates: two or more choices.
      answer: the correct candidate.
    """

    context: str
    question: str
    candidates: Sequence[str]
    answer: str


@dataclasses.dataclass(frozen=True)
class Cloze:
    """How well a model fills blanks.

    Attributes:
      accuracy: share of questions for which the model finds the answer most likely, 0 to 1.
      accuracy_by_chance: the expected accuracy of guessing, 0 to 1.
      questions: number of questions.
      cut: number of questions that were too long for the model, so that it did not read the start of the context.
      detokenizer: "none", "wikitext" or "ptb".
      conventions: {name: how it is measured or counted} for the attributes above, except `detokenizer`.
    """

    accuracy: float
    accuracy_by_chance: float
    questions: int
    cut: int
    detokenizer: str
    conventions: dict[str, str]


def cloze(
    config: GPT2Config,
    params: Params,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    detokenizer: str = "none",
    edits: Edits = (),
    taps: Mapping[str, Tap] | None = None,
    track: Callable[[list], Iterable] = iter,
    share: Share | None = None,
) -> Cloze:
    """Choose among the candidates of each question (GPT-2's paper, section 3.2).

    The model chooses the candidate for which the candidate and the rest of the sentence have the largest sum of
    log-probabilities, given the context and the start of the sentence. Each candidate needs its own pass over the
    context.

    Args:
      config: the model's hyperparameters.
      params: the model's parameters, from `load`.
      tokenizer: the model's tokenizer.
      questions: the questions.
      detokenizer: undoes the word splitting of a benchmark first: "wikitext", "ptb" (also for the Children's Book
        Test), or "none".
      edits, taps: edits and taps of activations, as in `score`.
      track: takes the list of batches and yields them one by one, such as rich.progress.track.
      share: this process's share, if several connected processes call this; as in `score`.

    Raises:
      ValueError: there are no questions; or a question does not have exactly one blank, or has no text before it,
        fewer than two candidates, an empty candidate, or an answer that is not a candidate.
    """
    choice("detokenizer", detokenizer, DETOKENIZERS)
    if not len(questions):
        raise ValueError("questions is empty: give at least one")
    pairs, n_cut = [], 0
    for i, question in enumerate(questions):
        check_question(f"questions[{i}] (from 0)", question)
        of_this = _pairs(tokenizer, question, DETOKENIZERS[detokenizer])
        n_cut += any(len(context) + len(rest) > config.n_ctx + 1 for context, rest in of_this)
        pairs += of_this
    scores, _ = score_continuations(config, params, pairs, edits=edits, taps=taps, track=track, share=share)
    sums = iter([one.sum for one in scores])
    right = 0
    for question in questions:
        best = int(np.argmax([next(sums) for _ in question.candidates]))
        right += question.candidates[best] == question.answer
    return Cloze(
        accuracy=right / len(questions),
        accuracy_by_chance=float(np.mean([1 / len(question.candidates) for question in questions])),
        questions=len(questions),
        cut=n_cut,
        detokenizer=detokenizer,
        conventions=_conventions(config, detokenizer),
    )


def check_question(name: str, question: Question) -> None:
    """Check a question.

    Raises:
      ValueError: the question is not valid; the message calls it `name`.
    """
    if question.question.count(BLANK) != 1:
        raise ValueError(f"{name} must have {BLANK} once, where the word is missing, not {question.question[:80]!r}")
    if not f"{question.context}{question.question.partition(BLANK)[0]}".strip():
        raise ValueError(f"{name} has nothing before its blank: it needs a context")
    if len(question.candidates) < 2 or not all(question.candidates):
        raise ValueError(f"{name} must have two candidates or more, none of them empty")
    if question.answer not in question.candidates:
        raise ValueError(f"{name} has the answer {question.answer!r}, which is not one of its candidates")


def _pairs(
    tokenizer: Tokenizer, question: Question, detokenize: Callable[[str], str]
) -> list[tuple[list[int], list[int]]]:
    """Return for each candidate the tokens before the blank, and those of the candidate, its space and the rest."""
    text = detokenize(f"{question.context.rstrip()} {question.question.lstrip()}".strip())
    before, _, after = text.rpartition(BLANK)  # the last blank: the context may contain XXXXX too
    space = " " if before.endswith(" ") else ""
    context = tokenizer.encode(before.removesuffix(" "))
    return [(context, tokenizer.encode(f"{space}{candidate}{after}")) for candidate in question.candidates]


def _conventions(config: GPT2Config, detokenizer: str) -> dict[str, str]:
    text = "text unchanged" if detokenizer == "none" else f"text after the {detokenizer} detokenizer"
    return {
        "accuracy": (
            f"share of questions where the answer and the rest of the sentence have the largest sum of ln p; {text}"
        ),
        "accuracy_by_chance": "mean of 1 / number of candidates",
        "questions": "each scored on its own, nothing added before it",
        "cut": f"questions longer than the model's {config.n_ctx} tokens: it read only the last ones",
    }
