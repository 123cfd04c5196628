"""Answers to instructions, through the template that the model was trained with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.data.conversations import Conversation
from gpt2_jax.data.templates import Template
from gpt2_jax.generation.decoding import Completion, complete
from gpt2_jax.generation.settings import Settings
from gpt2_jax.params import Params
from gpt2_jax.tokenizer import Tokenizer, end_of_text

GREEDY = Settings(max_new_tokens=256, temperature=0.0, overflow="slide")


def answer(
    config: GPT2Config,
    params: Params,
    tokenizer: Tokenizer,
    template: Template,
    asked: Sequence[str | Conversation],
    settings: Settings = GREEDY,
    batch_size: int = 16,
    track: Callable[[list], Iterable] = iter,
) -> list[Completion]:
    """Answer each instruction. An answer ends where the model writes `<|endoftext|>`.

    Args:
      config: the model's hyperparameters.
      params: the model's parameters, from `load`.
      tokenizer: the model's tokenizer.
      template: the template, from `load_template(run)` or `TEMPLATES`.
      asked: instructions, or conversations whose last turn has no answer.
      settings: how tokens are chosen. By default greedily, up to 256 tokens; of texts longer than n_ctx the model reads
        only the last tokens.
      batch_size: answers that are computed at the same time. It does not change them.
      track: takes the list of batches and yields them one by one, such as rich.progress.track.

    Raises:
      ValueError: as `complete`, or the vocabulary has no end-of-text token.
    """
    stops = {*settings.stop_ids, end_of_text(tokenizer, "an answer")}
    settings = dataclasses.replace(settings, stop_ids=tuple(stops))
    prompts = [template.prompt_ids(tokenizer, one) for one in asked]
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")  # prompts of similar length run together
    found: dict[int, Completion] = {}
    for batch in track([order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]):
        rows = complete(config, params, [prompts[i] for i in batch], tokenizer, settings, batch)
        found |= zip(batch, rows, strict=True)
    return [found[i] for i in range(len(prompts))]
