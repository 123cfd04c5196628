"""Compares measured values with the figures of GPT-2's paper. Each value states its convention.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", Table 3 and sections 3.1 and 3.3.
The conventions differ. So a measured value near the paper's figure is a good sign, and a difference is not an error.
"""

from __future__ import annotations

import math
from typing import Any

from gpt2_jax.evaluate._lambada import Lambada
from gpt2_jax.evaluate._perplexity import Perplexity

TABLE_3 = {
    "124M": {"lambada_perplexity": 35.13, "lambada_accuracy": 0.4599, "wikitext2_perplexity": 29.41},
    "355M": {"lambada_perplexity": 15.60, "lambada_accuracy": 0.5548, "wikitext2_perplexity": 22.76},
    "774M": {"lambada_perplexity": 10.87, "lambada_accuracy": 0.6012, "wikitext2_perplexity": 19.93},
    "1558M": {"lambada_perplexity": 8.63, "lambada_accuracy": 0.6324, "wikitext2_perplexity": 18.34},
}
"""The paper calls these sizes 117M, 345M, 762M and 1542M."""

Row = dict[str, Any]
"""measure: its name; found: the measured value, None if it is infinite; paper: the value in Table 3, or None; ours,
papers: the conventions of `found` and of `paper`, in words. Accuracies are shares, 0 to 1."""

_UNIT = "Table 3; the paper does not say whether it counts words or tokens"
_FILTER = "Table 3, with a stop-word filter; the paper publishes neither its list nor its code"
_WORDS = "Table 3, per word of the original text, with detokenizers; windows and counting of line ends are not stated"


def compare_lambada(result: Lambada, size: str | None) -> list[Row]:
    """Return measured LAMBADA values, each with the paper's figure for a size. None means a model not in the paper."""
    perplexity = _figure(size, "lambada_perplexity")
    how = result.conventions
    return [
        _row(
            "LAMBADA accuracy with stop-word filter",
            result.accuracy_with_stop_word_filter,
            _figure(size, "lambada_accuracy"),
            "greedy decoding gives the last word; its first step cannot choose our own stop words",
            _FILTER,
        ),
        _row(
            "LAMBADA accuracy",
            result.accuracy,
            None,
            "greedy decoding gives the last word; no filter",
            "not in Table 3",
        ),
        _row("LAMBADA perplexity per word", result.perplexity_per_word, perplexity, how["perplexity_per_word"], _UNIT),
        _row("LAMBADA perplexity per token", result.perplexity_per_token, perplexity, "exp(nats / tokens)", _UNIT),
    ]


def compare_wikitext2(result: Perplexity, size: str | None) -> list[Row]:
    """Return the perplexity of WikiText-2 in three units, each with the paper's figure for a size.

    Args:
      result: from `perplexity` with detokenizer="wikitext"; any `per`.
      size: a released size; None means a model that is not in the paper.
    """
    figure = _figure(size, "wikitext2_perplexity")
    text = f"{result.detokenizer} detokenizer, stride {result.stride}"
    words = f"exp(nats / words of the file); {text}"
    lines = f"exp(nats / (words + line ends of the file)); {text}"
    tokens = f"exp(nats / tokens); {text}"
    name = "WikiText-2 perplexity"
    return [
        _row(f"{name} per word", _exp(result.nats / result.words), figure, words, _WORDS),
        _row(f"{name} per word or line end", _exp(result.nats / (result.words + result.lines)), figure, lines, _WORDS),
        _row(f"{name} per token", _exp(result.nats / result.tokens), None, tokens, "not in Table 3"),
    ]


def _figure(size: str | None, name: str) -> float | None:
    return TABLE_3[size][name] if size in TABLE_3 else None


def _row(measure: str, found: float, paper: float | None, ours: str, papers: str) -> Row:
    value = found if math.isfinite(found) else None
    return {"measure": measure, "found": value, "paper": paper, "ours": ours, "papers": papers}


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
