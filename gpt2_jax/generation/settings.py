"""The settings of `generate`, `stream` and `complete`: their names, defaults, meanings and checks.

Importing this module imports neither JAX nor NumPy, so a command can show its options quickly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from gpt2_jax.checks import choice, real_number, whole_number

if TYPE_CHECKING:
    from gpt2_jax.config import GPT2Config
    from gpt2_jax.sampling import Sampling
    from gpt2_jax.tokenizer import Tokenizer

TopPRule = Literal["original", "common"]
Overflow = Literal["error", "slide"]

SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # the range of normal float32 numbers above 0


@dataclasses.dataclass(frozen=True)
class Settings:
    """How tokens are chosen and where a row ends. The order is penalty, temperature, top_k, top_p, min_p."""

    max_new_tokens: int = 32
    """Maximum number of new tokens per row, 0 or more; a stop may end a row earlier. Prompt and new tokens must fit in
    n_ctx, unless overflow is "slide"."""
    temperature: float = 1.0
    """Divides the logits, 0 or more. Below 1: safer text; above 1: more varied; 0: the most likely token (greedy)."""
    top_k: int = 0
    """Draw only from the k most likely tokens, and all ties with the k-th; 0 means all."""
    top_p: float = 1.0
    """Of those, draw only from the most likely ones, up to a total probability of p, above 0 to 1; 1 means all."""
    seed: int = 0
    """Seed of the draws, 0 to 4294967295. The same seed, settings and prompts give the same tokens."""
    min_p: float = 0.0
    """Of those, draw only from tokens at least min_p times as likely as the most likely one, 0 to 1; 0 means all."""
    repetition_penalty: float = 1.0
    """Makes tokens that the row already contains less likely: it divides their positive logits and multiplies the
    negative ones (Keskar et al. 2019, as in Hugging Face). Above 0, for example 1.2; 1 means no penalty."""
    top_p_rule: TopPRule = "original"
    """original keeps the longest prefix of total probability at most p, at least one token, and all ties with its last
    token, like OpenAI's code; common also keeps the token that crosses p, like most libraries."""
    stop_ids: Sequence[int] = ()
    """A row ends when it picks one of these ids. The result does not include that id."""
    stop_strings: Sequence[str] = ()
    """A row ends when its new text contains one of these, which may span tokens. The result has only the ids entirely
    before it. Needs a tokenizer."""
    overflow: Overflow = "error"
    """If a text becomes longer than n_ctx: error rejects it; slide lets the model read only the last tokens. At first
    these are all that fit. Each time n_ctx is full, they are the last n_ctx // 2, read again at positions from 0."""
    logprobs: int | None = None
    """Also return the log-probability (base e) of each chosen token and of this many most likely ones, 0 or more."""
    n_ids: int | None = None
    """Choose only among the first n_ids ids; the rows of wte after them are padding. Log-probabilities count all rows.
    None means the ids of the tokenizer, if one is given and has fewer than the model's n_vocab; otherwise n_vocab."""

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> Settings:
        """Return the settings among `arguments`, by name. A function that takes settings passes its `locals()`."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: arguments[name] for name in names if name in arguments})

    def check(self, config: GPT2Config, tokenizer: Tokenizer | None = None) -> Settings:
        """Check the settings, and return them as plain Python numbers and tuples.

        Raises:
          ValueError: a setting is invalid; the message has its name, its value and what is allowed.
        """
        from gpt2_jax.config import GPT2Config

        if not isinstance(config, GPT2Config):
            raise ValueError(f"config must be a GPT2Config, not a {type(config).__name__}")
        stop_strings = _stop_strings(self.stop_strings, tokenizer)
        n_ids = config.n_vocab if tokenizer is None else min(tokenizer.n_vocab, config.n_vocab)
        if self.n_ids is not None:
            n_ids = whole_number("n_ids", self.n_ids, 1, config.n_vocab)
            if tokenizer is not None and n_ids > tokenizer.n_vocab:
                raise ValueError(
                    f"n_ids must be at most {tokenizer.n_vocab}, the number of the tokenizer's ids, not {n_ids}: it "
                    "cannot decode ids above these"
                )
        return dataclasses.replace(
            self,
            max_new_tokens=whole_number("max_new_tokens", self.max_new_tokens),
            temperature=_float32("temperature", self.temperature),
            top_k=whole_number("top_k", self.top_k),
            top_p=real_number("top_p", self.top_p, 0, 1, open_low=True),
            seed=whole_number("seed", self.seed, 0, 2**32 - 1),
            min_p=real_number("min_p", self.min_p, 0, 1),
            repetition_penalty=_float32("repetition_penalty", self.repetition_penalty, open_low=True),
            top_p_rule=choice("top_p_rule", self.top_p_rule, get_args(TopPRule)),
            stop_ids=_stop_ids(config, self.stop_ids),
            stop_strings=stop_strings,
            overflow=choice("overflow", self.overflow, get_args(Overflow)),
            logprobs=None if self.logprobs is None else whole_number("logprobs", self.logprobs, 0, n_ids),
            n_ids=n_ids,
        )

    def sampling(self, config: GPT2Config) -> Sampling:
        """Return the sampling settings for the device, of the narrowest kind."""
        import numpy as np

        from gpt2_jax.sampling import Sampling, narrowest_kind

        sampling = Sampling(
            temperature=np.float32(self.temperature),
            top_k=np.int32(min(self.top_k, config.n_vocab)),
            top_p=np.float32(self.top_p),
            min_p=np.float32(self.min_p),
            repetition_penalty=np.float32(self.repetition_penalty),
            keep_crossing=np.bool_(self.top_p_rule == "common"),
            n_ids=np.int32(config.n_vocab if self.n_ids is None else self.n_ids),
        )
        return dataclasses.replace(sampling, kind=narrowest_kind(sampling, config.n_vocab))


def _float32(name: str, value: Any, *, open_low: bool = False) -> float:
    number = real_number(name, value, 0, open_low=open_low)
    if number > LARGEST or (open_low and number < SMALLEST):
        raise ValueError(f"{name} must be a number that float32 can hold, not {value!r}")
    return number


def _stop_ids(config: GPT2Config, stop_ids: Sequence[int]) -> tuple[int, ...]:
    if isinstance(stop_ids, str | bytes) or not hasattr(stop_ids, "__iter__"):
        raise ValueError(f"stop_ids must be a list of token ids, not {stop_ids!r}")
    ids = [whole_number(f"stop_ids[{i}]", value, 0, config.n_vocab - 1) for i, value in enumerate(stop_ids)]
    return tuple(dict.fromkeys(ids))


def _stop_strings(stop_strings: Sequence[str], tokenizer: Tokenizer | None) -> tuple[str, ...]:
    from gpt2_jax.generation.text import check_stop_strings
    from gpt2_jax.tokenizer import Tokenizer

    check_stop_strings(stop_strings)
    if not isinstance(tokenizer, Tokenizer) and (stop_strings or tokenizer is not None):
        needs = "stop_strings needs tokenizer=," if stop_strings else "tokenizer must be"
        raise ValueError(f"{needs} a Tokenizer, from load_tokenizer, not {tokenizer!r}")
    return tuple(stop_strings)
