"""Perplexity of a text, in the unit and by the convention that are asked for, which the result states in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gpt2_jax.checks import choice
from gpt2_jax.config import GPT2Config
from gpt2_jax.edits import Edit
from gpt2_jax.evaluate.detokenizers import DETOKENIZERS
from gpt2_jax.generation.scoring import as_stride, score
from gpt2_jax.params import Params
from gpt2_jax.tokenizer import Tokenizer

UNITS = ("token", "word", "byte")


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
      perplexity: exp(nats / units), the units being tokens, words or bytes, as `per` says.
      bits_per_byte: nats / ln 2 / bytes.
      nats: the sum of -ln p over all tokens that are scored.
      documents: texts, each scored on its own.
      tokens: those that are scored.
      words: of the original text, before any detokenizer: what white space separates.
      lines: newlines of the original text.
      bytes: of the original text in UTF-8.
      per: "token", "word" or "byte".
      stride: tokens from the beginning of one window to that of the next.
      bos: whether <|endoftext|> stood before each document.
      detokenizer: "none", "wikitext" or "ptb".
      conventions: for the attributes that are measured or counted, by name, how that is done.
    """

    perplexity: float
    bits_per_byte: float
    nats: float
    documents: int
    tokens: int
    words: int
    lines: int
    bytes: int
    per: str
    stride: int
    bos: bool
    detokenizer: str
    conventions: dict[str, str]


def perplexity(
    config: GPT2Config,
    params: Params,
    tokenizer: Tokenizer,
    documents: str | Sequence[str],
    *,
    stride: int | None = None,
    detokenizer: str = "none",
    per: str = "token",
    bos: bool = False,
    edits: Edit | Sequence[Edit] = (),
    track: Callable[[list], Iterable] = iter,
) -> Perplexity:
    """Measure the perplexity of a text, or of several that have nothing to do with each other.

    Texts beyond n_ctx are read in overlapping windows, as `score` describes. By default it is what Hugging Face's
    documentation computes: per token, nothing put before the text, so that its first token has no probability and is
    left out. GPT-2's paper (section 3.1) divides by the words of the original text where a benchmark is one of words,
    and undoes the benchmark's cutting into words: per="word" with a detokenizer.

    Args:
      config: the model's hyperparameters.
      params: its parameters, as `load` gives them.
      tokenizer: its vocabulary.
      documents: a text, or a list of texts.
      stride: from 1 to n_ctx; None means n_ctx // 2. Smaller ones give more context, and take longer.
      detokenizer: "none", or the cutting into words to undo before tokens are made: "wikitext" or "ptb".
      per: the unit, "token", "word" or "byte"; words and bytes are those of the text before the detokenizer.
      bos: put <|endoftext|> before each document, so that its first token is scored too.
      edits: of activations, as `score` takes them.
      track: takes the list of batches and gives them one by one, rich.progress.track say.

    Raises:
      ValueError: a bad argument, or a document too short to score.
    """
    documents = [documents] if isinstance(documents, str) else list(documents)
    choice("detokenizer", detokenizer, DETOKENIZERS)
    choice("per", per, UNITS)
    rows = _rows(tokenizer, documents, detokenizer, bos)
    stride = as_stride(config, stride)
    scores = score(config, params, rows, stride, edits=edits, track=track)
    nats = -math.fsum(one.sum for one in scores)
    counts = {
        "documents": len(documents),
        "tokens": sum(len(one.logprobs) for one in scores),
        "words": sum(len(text.split()) for text in documents),
        "lines": sum(text.count("\n") for text in documents),
        "bytes": sum(len(text.encode(errors="replace")) for text in documents),
    }
    if not counts[f"{per}s"]:
        raise ValueError(f"the text has no {per}s to divide by: it is white space alone")
    return Perplexity(
        perplexity=_exp(nats / counts[f"{per}s"]),
        bits_per_byte=nats / math.log(2) / counts["bytes"],
        nats=nats,
        **counts,
        per=per,
        stride=stride,
        bos=bos,
        detokenizer=detokenizer,
        conventions=_conventions(config, per, stride, bos, detokenizer, nats, counts),
    )


def _rows(tokenizer: Tokenizer, documents: list[str], detokenizer: str, bos: bool) -> list[list[int]]:
    """Return each document's tokens."""
    if not documents:
        raise ValueError("documents is empty: give at least one text")
    rows = []
    for i, text in enumerate(documents):
        if not isinstance(text, str):
            raise ValueError(f"documents[{i}] must be a str, not {type(text).__name__}")
        row = [tokenizer.eot] * bos + tokenizer.encode(DETOKENIZERS[detokenizer](text))
        if len(row) < 2:
            help = "give a longer one" if bos or not row else "give a longer one, or bos, which scores the first too"
            n_tokens = len(row) - bos
            raise ValueError(
                f"documents[{i}] (from 0) is too short to score, with {n_tokens} token{'s' * (n_tokens != 1)}: {help}"
            )
        rows.append(row)
    return rows


def _conventions(
    config: GPT2Config, per: str, stride: int, bos: bool, detokenizer: str, nats: float, counts: dict[str, int]
) -> dict[str, str]:
    before = "<|endoftext|>" if bos else "nothing"
    text = "the text as it is" if detokenizer == "none" else f"the {detokenizer} detokenizer's text"
    original = "" if detokenizer == "none" else " before the detokenizer"
    # What is divided by counts the first token's word and bytes, which without bos have no nats.
    unscored = "" if bos else ", of which the first token of each document has no nats"
    with_lines = _exp(nats / (counts["words"] + counts["lines"]))
    counted = f"; counted as words too, as models of words do, {with_lines:.6g}" if per == "word" else ""
    return {
        "perplexity": (
            f"per {per}: exp(nats / {per}s){'' if per == 'token' else unscored}; {text}; "
            f"{before} put before it; stride {stride} of {config.n_ctx}"
        ),
        "bits_per_byte": f"nats / ln 2 / bytes{unscored}",
        "nats": "sum of -ln p of the tokens scored",
        "stride": (
            f"tokens from one window of {config.n_ctx} to the next: beyond the first, a token is given the "
            f"{max(1, config.n_ctx - stride)} before it or more"
        ),
        "documents": "each scored on its own",
        "tokens": "those scored, all" if bos else "those scored, all but the first of each document",
        "words": f"of the text{original}, separated by white space",
        "lines": f"newlines of the text{original}{counted}",
        "bytes": f"of the text{original} in UTF-8",
    }


def _exp(nats: float) -> float:
    with np.errstate(over="ignore"):  # beyond float64 it is inf
        return float(np.exp(nats))
