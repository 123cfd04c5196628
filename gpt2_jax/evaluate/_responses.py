"""A model's responses to the instructions of a test set, compared with the expected ones."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gpt2_jax.config import GPT2Config
from gpt2_jax.data.conversations import conversation_of
from gpt2_jax.data.templates import Template
from gpt2_jax.evaluate.judge import Judge
from gpt2_jax.generation.answers import GREEDY, answer
from gpt2_jax.generation.settings import Settings
from gpt2_jax.params import Params
from gpt2_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Responses:
    """How well a model follows instructions.

    Attributes:
      exact_match: share of responses that equal the expected one, without white space at both ends, 0 to 1.
      rouge_l: mean ROUGE-L, 0 to 1.
      responses: number of responses.
      cut: number of responses that reached the maximum number of tokens.
      judge: mean score of a judge, 0 to 100; None if there was none, or if it gave no score.
      unjudged: number of responses to which the judge gave no score.
      records: for each response the fields of its record, and "output" (the expected response), "response",
        "exact_match" (bool), "rouge_l", and "judge" if there was one (null: no score).
      conventions: {name: how it is measured or counted} for the numbers above.
    """

    exact_match: float
    rouge_l: float
    responses: int
    cut: int
    judge: float | None
    unjudged: int
    records: list[dict[str, Any]]
    conventions: dict[str, str]


def responses(
    config: GPT2Config,
    params: Params,
    tokenizer: Tokenizer,
    template: Template,
    records: Sequence[Mapping[str, Any]],
    *,
    settings: Settings = GREEDY,
    batch_size: int = 16,
    track: Callable[[list], Iterable] = iter,
) -> Responses:
    """Answer the instructions of records, and compare the responses with the expected ones.

    Args:
      config: the model's hyperparameters.
      params: the model's parameters, from `load`.
      tokenizer: the model's tokenizer.
      template: the template that the model was trained with, from `load_template(run)` or `TEMPLATES`.
      records: dicts with the fields that `conversation_of` reads. The expected response is the last answer.
      settings, batch_size, track: as in `gpt2_jax.generation.answer`.

    Raises:
      ValueError: there are no records, or one has another form. Or as `answer`.
    """
    if not len(records):
        raise ValueError("records is empty: give at least one")
    asked, found, n_cut = [], [], 0
    for i, record in enumerate(records):
        try:
            conversation = conversation_of(record)
        except ValueError as error:
            raise ValueError(f"records[{i}] (from 0){error}") from error
        last = conversation.turns[-1]
        asked.append(conversation._replace(turns=(*conversation.turns[:-1], last._replace(answer=None))))
        found.append({**record, "output": str(last.answer)})
    completions = answer(config, params, tokenizer, template, asked, settings, batch_size, track)
    for record, completion in zip(found, completions, strict=True):
        expected = record["output"]
        record["response"] = completion.text
        record["exact_match"] = completion.text.strip() == expected.strip()
        record["rouge_l"] = rouge_l(completion.text, expected)
        n_cut += not completion.stopped
    return Responses(
        exact_match=sum(record["exact_match"] for record in found) / len(found),
        rouge_l=sum(record["rouge_l"] for record in found) / len(found),
        responses=len(found),
        cut=n_cut,
        judge=None,
        unjudged=0,
        records=found,
        conventions=_conventions(template, settings),
    )


def judged(found: Responses, judge: Judge, track: Callable[[list], Iterable] = iter) -> Responses:
    """Return the responses with the scores of a judge.

    Raises:
      OSError: the judge does not answer, or refuses.
    """
    records = []
    for record in track(list(found.records)):
        turn = conversation_of(record).turns[-1]
        score = judge.score(turn.instruction, turn.input, record["output"], record["response"])
        records.append(record | {"judge": score})
    scores = [record["judge"] for record in records if record["judge"] is not None]
    how = {"judge": f"mean score of {judge.model}, 0 to 100", "unjudged": "responses without a score of the judge"}
    mean = sum(scores) / len(scores) if scores else None
    unjudged, conventions = len(records) - len(scores), found.conventions | how
    return dataclasses.replace(found, judge=mean, unjudged=unjudged, records=records, conventions=conventions)


def rouge_l(response: str, expected: str) -> float:
    """Return ROUGE-L of two texts, 0 to 1: F1 of the longest common subsequence of their words (Lin 2004).

    Words are runs of letters and digits, in lower case, as in Google's rouge_score without a stemmer; but letters of
    all alphabets count. Two texts without words are equal.
    """
    ours, theirs = (re.findall(r"[^\W_]+", text.lower()) for text in (response, expected))
    if not ours or not theirs:
        return float(ours == theirs)
    lengths = [0] * (len(theirs) + 1)  # of the longest common subsequence with each beginning of the expected text
    for word in ours:
        before = 0
        for i, other in enumerate(theirs, start=1):
            here = lengths[i]
            lengths[i] = before + 1 if word == other else max(here, lengths[i - 1])
            before = here
    return 2 * lengths[-1] / (len(ours) + len(theirs))


def _conventions(template: Template, settings: Settings) -> dict[str, str]:
    how = "greedy" if settings.temperature == 0 else f"temperature {settings.temperature:g}, seed {settings.seed}"
    return {
        "exact_match": "share of responses equal to the expected one, without white space at both ends",
        "rouge_l": "mean F1 of the longest common subsequence of lower-case words (Lin 2004)",
        "responses": f"{how}, with the template {template.name}",
        "cut": f"responses that reached {settings.max_new_tokens} tokens",
    }
