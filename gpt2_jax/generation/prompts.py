"""Prompts as `generate` and `score` take them: lists of token ids, checked before anything touches a device."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence, Sized

import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.settings import Settings


def check_prompts(config: GPT2Config, prompts: Sequence[Sequence[int]], settings: Settings) -> list[np.ndarray]:
    """Return the prompts as arrays of ids.

    Raises:
      ValueError: not a list of lists of ids in the vocabulary, or a prompt is too long and overflow is "error".
    """
    if isinstance(prompts, str) or not hasattr(prompts, "__len__") or getattr(prompts, "ndim", 1) == 0:
        raise ValueError(f"prompts must be a list of token-id lists, not {reprlib.repr(prompts)}")
    if len(prompts) == 0:
        raise ValueError("prompts is empty: give at least one list of token ids")
    rows = [check_prompt(config, f"prompts[{b}]", prompt) for b, prompt in enumerate(prompts)]
    for b, row in enumerate(rows):
        check_fits(config, f"prompts[{b}]", row, settings)
    return rows


def check_fits(config: GPT2Config, name: str, row: Sized, settings: Settings) -> None:
    """Check that a prompt and its new tokens fit in n_ctx together, unless overflow is "slide".

    Raises:
      ValueError: they do not fit; the message names the prompt `name`.
    """
    n_tokens = len(row) + settings.max_new_tokens
    if settings.overflow == "error" and n_tokens > config.n_ctx:
        raise ValueError(
            f"{name} has {len(row)} tokens, and with max_new_tokens={settings.max_new_tokens} it has {n_tokens}: the "
            f"model's n_ctx is {config.n_ctx}; shorten one of them, or set overflow to slide: then the model reads "
            "only the last tokens"
        )


def check_prompt(config: GPT2Config, name: str, prompt: Sequence[int]) -> np.ndarray:
    """Return one prompt as an array of ids.

    Raises:
      ValueError: it is not a list of ids in the vocabulary, or is empty; the message names it `name`.
    """
    try:
        row = np.asarray(prompt)
    except ValueError:  # a list of lists of different lengths
        row = np.asarray(None)
    if row.ndim == 1 and row.size == 0:
        raise ValueError(f"{name} is empty: a prompt needs at least one token id")
    if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
        raise ValueError(f"{name} must be a list of token ids, not {reprlib.repr(prompt)}")
    wrong = row[(row < 0) | (row >= config.n_vocab)]
    if wrong.size:
        raise ValueError(f"{name} holds the id {wrong[0]}, outside the vocabulary of {config.n_vocab} ids")
    return row
