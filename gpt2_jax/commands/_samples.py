"""Samples of `gpt2-generate` as JSON and as tables of log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2_jax import Tokenizer
    from gpt2_jax.generation import Completion

Token = tuple[int, float | None, list[tuple[int, float]]]
"""An id, its log-probability (None for the first token of a prompt), and the likeliest ids with theirs."""


def as_json(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a sample as a JSON object."""
    reason = "stop" if completion.stopped else "length"
    record: dict[str, Any] = {"text": completion.text, "finish_reason": reason, "stop": completion.stop}
    if completion.logprobs is not None:
        record["logprobs"] = tokens_as_json(tokens_of(completion), tokenizer)
    return record


def tokens_of(completion: Completion) -> Iterator[Token]:
    """Yield the tokens of a sample with their log-probabilities."""
    logprobs = completion.logprobs
    if logprobs is None:
        return
    for i, token in enumerate(completion.ids):
        top = zip(logprobs.top_ids[i].tolist(), logprobs.top[i].tolist(), strict=True)
        yield token, float(logprobs.chosen[i]), list(top)


def tokens_of_prompt(ids: Sequence[int], logprobs: Iterable[float]) -> list[Token]:
    """Return the tokens of a prompt with their log-probabilities. The first has none: nothing comes before it."""
    return [(token, value, []) for token, value in zip(ids, [None, *map(float, logprobs)], strict=True)]


def tokens_as_json(tokens: Iterable[Token], tokenizer: Tokenizer, top: bool = True) -> list[dict[str, Any]]:
    """Return each token as a JSON object: its text, id and bytes, its log-probability, and the alternatives.

    A token may hold a part of a character. Its text is then U+FFFD; its bytes are exact.
    """

    def named(token: int, logprob: float | None) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": tokenizer.decode([token]), "id": token, "bytes": list(data), "logprob": logprob}

    return [
        named(token, logprob) | ({"top": [named(*other) for other in others]} if top else {})
        for token, logprob, others in tokens
    ]


def logprob_table(tokens: Iterable[Token], tokenizer: Tokenizer) -> str:
    """Return a table with one line per token: log-probability, probability, token, alternatives."""
    lines = ["logprob       p  token             alternatives"]
    for token, logprob, top in tokens:
        alternatives = "  ".join(f"{tokenizer.decode([other])!r} {math.exp(value):.1%}" for other, value in top)
        value = f"{'':15}" if logprob is None else f"{logprob:7.3f} {math.exp(logprob):7.1%}"
        lines.append(f"{value}  {tokenizer.decode([token])!r:16}  {alternatives}".rstrip())
    return "\n".join(lines)
