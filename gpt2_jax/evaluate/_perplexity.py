"""Perplexity of a text. The caller chooses the unit and the convention, and the result states them in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from gpt2_jax.activations import Tap
from gpt2_jax.changes import Edits
from gpt2_jax.checks import choice
from gpt2_jax.config import GPT2Config
from gpt2_jax.evaluate.detokenizers import DETOKENIZERS
from gpt2_jax.generation.scoring import as_stride, score
from gpt2_jax.params import Params
from gpt2_jax.processes import Share
from gpt2_jax.tokenizer import Tokenizer, end_of_text

UNITS = ("token", "word", "byte")


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
      perplexity: exp(nats / units); `per` is the unit.
      bits_per_byte: nats / ln 2 / bytes.
      nats: sum of -ln p over all scored tokens.
      documents: number of texts; each is scored on its own.
      tokens: number of scored tokens.
      words: number of words of the original text, before any detokenizer; white space separates words.
      lines: number of newlines of the original text.
      bytes: size of the original text in UTF-8.
      per: "token", "word" or "byte".
      stride: tokens from the start of one window to the start of the next.
      bos: whether `<|endoftext|>` was put before each document.
      detokenizer: "none", "wikitext" or "ptb".
      conventions: {name: how it is measured or counted} for the attributes from perplexity to bytes, and stride.
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
    edits: Edits = (),
    taps: Mapping[str, Tap] | None = None,
    track: Callable[[list], Iterable] = iter,
    share: Share | None = None,
) -> Perplexity:
    """Measure the perplexity of a text, or of several independent texts.

    Texts longer than n_ctx are read in overlapping windows; `score` describes them. The default is the convention of
    Hugging Face's documentation: the perplexity is per token, and nothing is added before the text. So its first token
    has no probability and is left out. GPT-2's paper (section 3.1) divides by the words of the original text for
    word-level benchmarks, and undoes the benchmark's word splitting. That is per="word" with a detokenizer.

    Args:
      config: the model's hyperparameters.
      params: the model's parameters, from `load`.
      tokenizer: the model's tokenizer.
      documents: a text, or a list of texts.
      stride: from 1 to n_ctx; None means n_ctx // 2. A smaller stride gives more context and takes longer.
      detokenizer: undoes the word splitting of a benchmark before tokenization: "wikitext", "ptb" or "none".
      per: the unit: "token", "word" or "byte". Words and bytes are those of the text before the detokenizer.
      bos: put `<|endoftext|>` before each document, so that its first token is scored too.
      edits, taps: edits and taps of activations, as in `score`.
      track: takes the list of batches and yields them one by one, such as rich.progress.track.
      share: this process's share, if several connected processes call this; as in `score`.

    Raises:
      ValueError: an argument is invalid, or a document is too short to score.
    """
    documents = [documents] if isinstance(documents, str) else list(documents)
    choice("detokenizer", detokenizer, DETOKENIZERS)
    choice("per", per, UNITS)
    rows = _rows(tokenizer, documents, detokenizer, bos)
    stride = as_stride(config, stride)
    scores = score(config, params, rows, stride, edits=edits, taps=taps, track=track, share=share)
    nats = -math.fsum(one.sum for one in scores)
    counts = {
        "documents": len(documents),
        "tokens": sum(len(one.logprobs) for one in scores),
        "words": sum(len(text.split()) for text in documents),
        "lines": sum(text.count("\n") for text in documents),
        "bytes": sum(len(text.encode(errors="replace")) for text in documents),
    }
    if not counts[f"{per}s"]:
        raise ValueError(f"the text has no {per}s to divide by: it is only white space")
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
        before = [end_of_text(tokenizer, "bos")] if bos else []
        row = before + tokenizer.encode(DETOKENIZERS[detokenizer](text))
        if len(row) < 2:
            help = "give a longer one" if bos or not row else "give a longer one, or set bos to score the first token"
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
    text = "text unchanged" if detokenizer == "none" else f"text after the {detokenizer} detokenizer"
    original = "" if detokenizer == "none" else " before the detokenizer"
    # Words and bytes include the first token. Without bos, that token has no nats.
    unscored = "" if bos else " (the first token of each document has no nats)"
    with_lines = _exp(nats / (counts["words"] + counts["lines"]))
    counted = f"; perplexity if they count as words, as in word models: {with_lines:.6g}" if per == "word" else ""
    return {
        "perplexity": (
            f"per {per}: exp(nats / {per}s){'' if per == 'token' else unscored}; {text}; "
            f"{before} added before it; stride {stride} of {config.n_ctx}"
        ),
        "bits_per_byte": f"nats / ln 2 / bytes{unscored}",
        "nats": "sum of -ln p of the scored tokens",
        "stride": (
            f"tokens from one window of {config.n_ctx} to the next: after the first window, a token has at least "
            f"{max(1, config.n_ctx - stride)} tokens of context"
        ),
        "documents": "each scored on its own",
        "tokens": "scored tokens: all" if bos else "scored tokens: all except the first of each document",
        "words": f"of the text{original}, separated by white space",
        "lines": f"newlines of the text{original}{counted}",
        "bytes": f"of the text{original} in UTF-8",
    }


def _exp(nats: float) -> float:
    with np.errstate(over="ignore"):  # inf if it is too large for float64
        return float(np.exp(nats))
