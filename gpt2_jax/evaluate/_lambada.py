"""LAMBADA: does the model predict the last word of a passage?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from gpt2_jax.activations import Tap
from gpt2_jax.changes import Edits
from gpt2_jax.config import GPT2Config
from gpt2_jax.evaluate.continuations import score_continuations
from gpt2_jax.generation.scoring import Score
from gpt2_jax.params import Params
from gpt2_jax.processes import Share
from gpt2_jax.tokenizer import Tokenizer

# Words that can continue a passage but rarely end one. The paper does not publish its list. The last line is for
# contractions, which the tokenizer splits: "didn't" is " didn" and "'t".
_STOP_WORDS = """
a an the this that these those each every either neither some any no all both few many more most much other another
such own same several
i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
herself it its itself they them their theirs themselves who whom whose which what
am is are was were be been being have has had having do does did doing will would shall should can could may might
must ought cannot
of at by for with about against between into through during before after above below to from up down in out on off
over under among upon within without toward towards across along behind beyond around
and but or nor if because as until while although though unless since than whether so yet
not only very too just then there here when where why how again further once now also even
ain aren couldn didn doesn hadn hasn isn mightn mustn needn shouldn wasn weren wouldn
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


@dataclasses.dataclass(frozen=True)
class Lambada:
    """How well a model predicts the last words of passages.

    Attributes:
      accuracy: share of passages for which greedy decoding gives the last word, 0 to 1.
      accuracy_with_stop_word_filter: the same, if the first decoding step cannot choose stop words.
      perplexity_per_word: exp(nats / passages).
      perplexity_per_token: exp(nats / tokens).
      nats: sum of -ln p of the last words.
      passages: number of passages.
      tokens: number of tokens of all last words.
      stop_words: number of passages whose last word is a stop word.
      cut: number of passages that were too long for the model, so that it did not read their start.
      conventions: {name: how it is measured or counted} for the attributes above.
    """

    accuracy: float
    accuracy_with_stop_word_filter: float
    perplexity_per_word: float
    perplexity_per_token: float
    nats: float
    passages: int
    tokens: int
    stop_words: int
    cut: int
    conventions: dict[str, str]


def lambada(
    config: GPT2Config,
    params: Params,
    tokenizer: Tokenizer,
    passages: Sequence[str],
    *,
    stop_words: Iterable[str] = STOP_WORDS,
    edits: Edits = (),
    taps: Mapping[str, Tap] | None = None,
    track: Callable[[list], Iterable] = iter,
    share: Share | None = None,
) -> Lambada:
    """Predict the last word of each passage from the text before it (GPT-2's paper, section 3.3).

    The last word is the text after the last space. Its tokens are those of " word", the same as in the tokens of the
    whole passage. A passage is correct if each of these tokens is the most likely one, given the tokens before it. That
    is the result of greedy decoding: while decoding agrees with the word, both read the same tokens, and the first
    difference makes the passage wrong. So one forward pass over the passage is enough.

    The paper adds a stop-word filter, because many predictions continue the sentence and do not end it. The paper's
    code is not public. Here, the filter changes the first step of greedy decoding: it cannot choose a token that is a
    whole stop word (" the", " The"). So a passage that ends in a stop word is wrong. One exception: if a longer last
    word begins with such a token (" over" in "overalls"), the first step can choose it.

    Args:
      config: the model's hyperparameters.
      params: the model's parameters, from `load`.
      tokenizer: the model's tokenizer.
      passages: texts, each with its last word. White space at the end is dropped.
      stop_words: the stop words, in lower case.
      edits, taps: edits and taps of activations, as in `score`.
      track: takes the list of batches and yields them one by one, such as rich.progress.track.
      share: this process's share, if several connected processes call this; as in `score`.

    Raises:
      ValueError: there are no passages, or a passage has no space before its last word.
    """
    stop_words = frozenset(stop_words)
    parts = [_split(i, passage) for i, passage in enumerate(passages)]
    if not parts:
        raise ValueError("passages is empty: give at least one text")
    pairs = [(tokenizer.encode(context), tokenizer.encode(f" {word}")) for context, word in parts]
    aside = _stop_ids(tokenizer, stop_words)
    scores, n_cut = score_continuations(
        config, params, pairs, aside=aside, edits=edits, taps=taps, track=track, share=share
    )
    is_stop_word = [word.lower() in stop_words for _, word in parts]
    nats = -math.fsum(one.sum for one in scores)
    n_tokens = sum(len(one.logprobs) for one in scores)
    right = sum(bool(one.greedy.all()) for one in scores)
    right_with_filter = sum(_right_with_filter(one) for one, stop in zip(scores, is_stop_word, strict=True) if not stop)
    with np.errstate(over="ignore"):  # inf if it is too large for float64
        per_word, per_token = (float(np.exp(nats / n)) for n in (len(parts), n_tokens))
    return Lambada(
        accuracy=right / len(parts),
        accuracy_with_stop_word_filter=right_with_filter / len(parts),
        perplexity_per_word=per_word,
        perplexity_per_token=per_token,
        nats=nats,
        passages=len(parts),
        tokens=n_tokens,
        stop_words=sum(is_stop_word),
        cut=n_cut,
        conventions=_conventions(config, len(stop_words)),
    )


def _split(i: int, passage: str) -> tuple[str, str]:
    """Return a passage without its last word, and the last word."""
    if not isinstance(passage, str):
        raise ValueError(f"passages[{i}] must be a str, not {type(passage).__name__}")
    context, _, word = passage.rstrip().rpartition(" ")
    if not context:
        raise ValueError(f"passages[{i}] (from 0) has no space before its last word, {word[:40]!r}: it needs a context")
    return context, word


def _stop_ids(tokenizer: Tokenizer, stop_words: Iterable[str]) -> list[int]:
    """Return the tokens that are a space and a stop word. The word may be capitalized."""
    forms = sorted({form for word in stop_words for form in (word, word.capitalize())})
    encoded = [tokenizer.encode(f" {form}") for form in forms]
    return [ids[0] for ids in encoded if len(ids) == 1]


def _right_with_filter(one: Score) -> bool:
    first = one.greedy if one.greedy_aside is None else one.greedy_aside  # None: no stop word is a token
    return bool(first[0] and one.greedy[1:].all())


def _conventions(config: GPT2Config, n_stop_words: int) -> dict[str, str]:
    return {
        "accuracy": "share of passages where greedy decoding gives the last word (all after the last space)",
        "accuracy_with_stop_word_filter": f"the same, but its first step cannot choose {n_stop_words} stop words",
        "perplexity_per_word": "exp(nats / passages): all tokens of a last word together",
        "perplexity_per_token": "exp(nats / tokens)",
        "nats": "sum of -ln p of the last words' tokens, each given the passage before it",
        "passages": "each scored on its own, nothing added before it",
        "tokens": "of the last words, including the space before them",
        "stop_words": "passages that end in a stop word; the filter makes them wrong",
        "cut": f"passages longer than the model's {config.n_ctx} tokens: it read only the last ones",
    }
