"""What a sample of `gpt2-generate` looks like beside its text: as JSON, and its log-probabilities as a table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2_jax import Tokenizer
    from gpt2_jax.generation import Completion


def as_json(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a sample as a line of JSON has it."""
    record: dict[str, Any] = {"text": completion.text, "finish_reason": "stop" if completion.stopped else "length"}
    if completion.logprobs is not None:
        record["logprobs"] = [
            {"token": token, "logprob": logprob, "top": [{"token": name, "logprob": value} for name, value in top]}
            for token, logprob, top in _by_token(completion, tokenizer)
        ]
    return record


def _by_token(completion: Completion, tokenizer: Tokenizer) -> Iterator[tuple[str, float, list[tuple[str, float]]]]:
    """Yield each token, its log-probability, and the alternatives with theirs."""
    logprobs = completion.logprobs
    if logprobs is None:
        return
    for i, token in enumerate(completion.ids):
        top = zip(logprobs.top_ids[i].tolist(), logprobs.top[i].tolist(), strict=True)
        yield tokenizer.decode([token]), float(logprobs.chosen[i]), [(tokenizer.decode([j]), value) for j, value in top]


def logprob_table(completion: Completion, tokenizer: Tokenizer) -> str:
    """Return a line a token: log-probability, probability, token, alternatives."""
    lines = ["logprob       p  token             alternatives"]
    for token, logprob, top in _by_token(completion, tokenizer):
        alternatives = "  ".join(f"{name!r} {math.exp(value):.1%}" for name, value in top)
        lines.append(f"{logprob:7.3f} {math.exp(logprob):7.1%}  {token!r:16}  {alternatives}".rstrip())
    return "\n".join(lines)
