"""Cloze questions with given choices, as in the Children's Book Test: which one fits the blank?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gpt2_jax.checks import choice
from gpt2_jax.config import GPT2Config
from gpt2_jax.edits import Edit
from gpt2_jax.evaluate.continuations import score_continuations
from gpt2_jax.evaluate.detokenizers import DETOKENIZERS
from gpt2_jax.params import Params
from gpt2_jax.tokenizer import Tokenizer

BLANK = "XXXXX"


@dataclasses.dataclass(frozen=True)
class Question:
    """A sentence with a blank, what stands before it, and what may fill it.

    Attributes:
      context: the sentences before; may be empty.
      question: the sentence, with "XXXXX" once where the word is missing.
      candidates: two choices or more.
      answer: the right one of them.
    """

    context: str
    question: str
    candidates: Sequence[str]
    answer: str


@dataclasses.dataclass(frozen=True)
class Cloze:
    """How well a model fills blanks.

    Attributes:
      accuracy: share of questions whose answer the model finds most likely, 0 to 1.
      accuracy_by_chance: what guessing would give in the mean.
      questions: how many.
      cut: questions with a context of which the model could not read the beginning.
      detokenizer: "none", "wikitext" or "ptb".
      conventions: for each of these but the last, by name, how it is measured or counted.
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
    edits: Edit | Sequence[Edit] = (),
    track: Callable[[list], Iterable] = iter,
) -> Cloze:
    """Choose among the candidates of each question (GPT-2's paper, section 3.2).

    The choice is the candidate for which it and the rest of the sentence are most likely, given the context and the
    beginning of the sentence: the sum of their tokens' log-probabilities. Every candidate is a pass over the context.

    Args:
      config: the model's hyperparameters.
      params: its parameters, as `load` gives them.
      tokenizer: its vocabulary.
      questions: the questions.
      detokenizer: "none", or the cutting into words to undo first; the Children's Book Test is cut as "ptb" is.
      edits: of activations, as `score` takes them.
      track: takes the list of batches and gives them one by one, rich.progress.track say.

    Raises:
      ValueError: no questions, or one without a blank, without a word before it, or whose answer is no candidate.
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
    scores, _ = score_continuations(config, params, pairs, edits=edits, track=track)
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
    """Check that a question can be asked.

    Raises:
      ValueError: it cannot; the message calls it `name`.
    """
    if question.question.count(BLANK) != 1:
        raise ValueError(f"{name} must have {BLANK} once, where the word is missing, not {question.question[:80]!r}")
    if not f"{question.context}{question.question.partition(BLANK)[0]}".strip():
        raise ValueError(f"{name} has nothing before its blank: it needs a context")
    if len(question.candidates) < 2 or not all(question.candidates):
        raise ValueError(f"{name} must have two candidates or more, none of them empty")
    if question.answer not in question.candidates:
        raise ValueError(f"{name} has the answer {question.answer!r}, which is none of its candidates")


def _pairs(
    tokenizer: Tokenizer, question: Question, detokenize: Callable[[str], str]
) -> list[tuple[list[int], list[int]]]:
    """Return, for each candidate, the tokens before the blank and those from it on; the space before it is a part."""
    text = detokenize(f"{question.context.rstrip()} {question.question.lstrip()}".strip())
    before, _, after = text.rpartition(BLANK)  # the question's, whatever stands in the context
    space = " " if before.endswith(" ") else ""
    context = tokenizer.encode(before.removesuffix(" "))
    return [(context, tokenizer.encode(f"{space}{candidate}{after}")) for candidate in question.candidates]


def _conventions(config: GPT2Config, detokenizer: str) -> dict[str, str]:
    text = "the text as it is" if detokenizer == "none" else f"the {detokenizer} detokenizer's text"
    return {
        "accuracy": (
            f"share of questions whose answer has, with the rest of its sentence, the largest sum of ln p; {text}"
        ),
        "accuracy_by_chance": "mean of 1 / candidates",
        "questions": "each scored on its own, nothing put before it",
        "cut": f"questions beyond the model's {config.n_ctx} tokens, of which it read the last",
    }
