"""What a call of `generate` or `stream` may be told, and the checks of it: nothing here touches a device."""

from __future__ import annotations

import dataclasses
import math
import operator
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.text import check_stop_strings
from gpt2_jax.sampling import Sampling
from gpt2_jax.tokenizer import Tokenizer

OVERFLOWS = ("error", "slide")
TOP_P_RULES = ("original", "common")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that steers the choice of tokens and the end of a row; `generate` says what each means."""

    max_new_tokens: int = 32
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    top_p_rule: str = "original"
    stop_ids: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    overflow: str = "error"
    logprobs: int | None = None

    def check(self, config: GPT2Config, tokenizer: Tokenizer | None = None) -> Settings:
        """Return the settings as plain Python numbers and tuples.

        Raises:
          ValueError: the setting that is wrong, its value, and what would be right.

        """
        if not isinstance(config, GPT2Config):
            raise ValueError(f"config must be a GPT2Config, not a {type(config).__name__}")
        smallest, largest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
        if not 0 <= _real(self.temperature) <= largest:
            raise ValueError(
                f"temperature must be a finite float32 number, 0 (greedy) or more, not {self.temperature!r}"
            )
        if not 0 < _real(self.top_p) <= 1:
            raise ValueError(f"top_p must be a number above 0 and at most 1 (all), not {self.top_p!r}")
        if not 0 <= _real(self.min_p) <= 1:
            raise ValueError(f"min_p must be a number from 0 (all) to 1, not {self.min_p!r}")
        if not smallest <= _real(self.repetition_penalty) <= largest:
            raise ValueError(
                f"repetition_penalty must be a finite float32 number above 0 (1: none), not {self.repetition_penalty!r}"
            )
        for name, words in (("top_p_rule", TOP_P_RULES), ("overflow", OVERFLOWS)):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in words:
                raise ValueError(f"{name} must be {' or '.join(map(repr, words))}, not {getattr(self, name)!r}")
        logprobs = None if self.logprobs is None else _whole_number("logprobs", self.logprobs, 0, config.n_vocab)
        return dataclasses.replace(
            self,
            temperature=float(self.temperature),
            top_p=float(self.top_p),
            min_p=float(self.min_p),
            repetition_penalty=float(self.repetition_penalty),
            logprobs=logprobs,
            max_new_tokens=_whole_number("max_new_tokens", self.max_new_tokens, 0, math.inf),
            seed=_whole_number("seed", self.seed, 0, 2**32 - 1),
            top_k=_whole_number("top_k", self.top_k, 0, math.inf),
            stop_ids=_check_stop_ids(config, self.stop_ids),
            stop_strings=_check_stop_strings(config, self.stop_strings, tokenizer),
        )

    def sampling(self, config: GPT2Config) -> Sampling:
        """Return the knobs that go to the device."""
        return Sampling(
            temperature=np.float32(self.temperature),
            top_k=np.int32(min(self.top_k, config.n_vocab)),
            top_p=np.float32(self.top_p),
            min_p=np.float32(self.min_p),
            repetition_penalty=np.float32(self.repetition_penalty),
            keep_crossing=np.bool_(self.top_p_rule == "common"),
        )


def check_prompts(config: GPT2Config, prompts: Sequence[Sequence[int]], settings: Settings) -> list[np.ndarray]:
    """Return the prompts as arrays of ids.

    Raises:
      ValueError: not a list of lists of ids of the vocabulary, or one that is too long where overflow is "error".

    """
    if isinstance(prompts, str) or not hasattr(prompts, "__len__") or getattr(prompts, "ndim", 1) == 0:
        raise ValueError(f"prompts must be a list of token-id lists, not {reprlib.repr(prompts)}")
    if len(prompts) == 0:
        raise ValueError("prompts is empty: give at least one list of token ids")
    rows = [check_prompt(config, f"prompts[{b}]", prompt) for b, prompt in enumerate(prompts)]
    for b, row in enumerate(rows):
        check_fits(config, f"prompts[{b}]", row, settings)
    return rows


def check_fits(config: GPT2Config, name: str, row: np.ndarray, settings: Settings) -> None:
    """Check that a prompt and the new tokens fit in n_ctx together, unless they may slide.

    Raises:
      ValueError: they do not; the message calls the prompt `name`.

    """
    n_tokens = len(row) + settings.max_new_tokens
    if settings.overflow == "error" and n_tokens > config.n_ctx:
        raise ValueError(
            f"{name} has {len(row)} tokens, and max_new_tokens={settings.max_new_tokens} more make {n_tokens}: the "
            f"model's n_ctx is {config.n_ctx}; shorten one of them, or set overflow to slide, and the model will see "
            "the last tokens alone"
        )


def check_prompt(config: GPT2Config, name: str, prompt: Sequence[int]) -> np.ndarray:
    """Return one prompt as an array of ids.

    Raises:
      ValueError: it is not a list of ids of the vocabulary, or empty; the message calls it `name`.

    """
    try:
        row = np.asarray(prompt)
    except ValueError:  # a list of lists of several lengths
        row = np.asarray(None)
    if row.ndim == 1 and row.size == 0:
        raise ValueError(f"{name} is empty: a prompt needs at least one token id")
    if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
        raise ValueError(f"{name} must be a list of token ids, not {reprlib.repr(prompt)}")
    wrong = row[(row < 0) | (row >= config.n_vocab)]
    if wrong.size:
        raise ValueError(f"{name} holds the id {wrong[0]}, outside the vocabulary of {config.n_vocab} ids")
    return row


def check_first_row(first_row: int, n_rows: int) -> None:
    """Check that rows from `first_row` on have a number to draw by.

    Raises:
      ValueError: it is not a whole number, or too large.

    """
    _whole_number("first_row", first_row, 0, 2**32 - n_rows)


def _check_stop_ids(config: GPT2Config, stop_ids: Sequence[int]) -> tuple[int, ...]:
    if isinstance(stop_ids, str | bytes) or not hasattr(stop_ids, "__iter__"):
        raise ValueError(f"stop_ids must be a list of token ids, not {stop_ids!r}")
    ids = tuple(_whole_number(f"stop_ids[{i}]", value, 0, config.n_vocab - 1) for i, value in enumerate(stop_ids))
    return tuple(dict.fromkeys(ids))


def _check_stop_strings(
    config: GPT2Config, stop_strings: Sequence[str], tokenizer: Tokenizer | None
) -> tuple[str, ...]:
    check_stop_strings(stop_strings)
    if not isinstance(tokenizer, Tokenizer) and (stop_strings or tokenizer is not None):
        needs = "stop_strings needs tokenizer=," if stop_strings else "tokenizer must be"
        raise ValueError(f"{needs} a Tokenizer as load_tokenizer gives it, not {tokenizer!r}")
    if tokenizer is not None and tokenizer.n_vocab < config.n_vocab:
        raise ValueError(
            f"the tokenizer has {tokenizer.n_vocab} ids and the model {config.n_vocab}: it may pick one without a text"
        )
    return tuple(stop_strings)


def _whole_number(name: str, value: Any, low: int, high: float) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        limits = f"{low} or more" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name} must be a whole number, {limits}, not {value!r}")
    return number


def _real(value: Any) -> float:
    """Return a number as a Python float, and NaN, which is in no range, for anything else."""
    try:
        return math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
