"""`generate` and `stream`: prompts in, tokens or text out."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gpt2_jax.checks import whole_number
from gpt2_jax.config import GPT2Config
from gpt2_jax.edits import Edit, check_edits
from gpt2_jax.generation.engine import Picked, decode_rows
from gpt2_jax.generation.prompts import check_fits, check_prompt, check_prompts
from gpt2_jax.generation.settings import Overflow, Settings, TopPRule
from gpt2_jax.generation.text import RowText
from gpt2_jax.model import GPT2, check_params
from gpt2_jax.params import Params
from gpt2_jax.sampling import NO_LOGITS
from gpt2_jax.sharding import placed
from gpt2_jax.tokenizer import Tokenizer

STEPS_A_PIECE = 4  # of `stream`: often enough that it looks alive where a step takes 100 ms


@dataclasses.dataclass(frozen=True)
class Logprobs:
    """Log-probabilities (base e) of one row's n new tokens under the model itself: temperature 1, nothing filtered.

    Attributes:
      chosen: float32 [n], of the token that was picked.
      top_ids: int32 [n, k], the k most likely tokens, most likely first.
      top: float32 [n, k], theirs.
    """

    chosen: np.ndarray
    top_ids: np.ndarray
    top: np.ndarray


@dataclasses.dataclass(frozen=True)
class Completion:
    """One row's new text.

    Attributes:
      text: the text, up to a stop.
      ids: the new tokens, those wholly before a stop string if it ended at one.
      stopped: it ended at a stop, not for want of more tokens.
      logprobs: of `ids`, where they were asked for.
    """

    text: str
    ids: list[int]
    stopped: bool
    logprobs: Logprobs | None


def generate(
    config: GPT2Config,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = Settings.max_new_tokens,
    temperature: float = Settings.temperature,
    top_k: int = Settings.top_k,
    top_p: float = Settings.top_p,
    seed: int = Settings.seed,
    *,
    min_p: float = Settings.min_p,
    repetition_penalty: float = Settings.repetition_penalty,
    top_p_rule: TopPRule = Settings.top_p_rule,
    stop_ids: Sequence[int] = Settings.stop_ids,
    stop_strings: Sequence[str] = Settings.stop_strings,
    tokenizer: Tokenizer | None = None,
    overflow: Overflow = Settings.overflow,
    logprobs: int | None = Settings.logprobs,
    first_row: int = 0,
    edits: Edit | Sequence[Edit] = (),
) -> list[list[int]] | tuple[list[list[int]], list[Logprobs]]:
    """Continue each prompt by `max_new_tokens` tokens; as in the original, not even `<|endoftext|>` stops earlier.

    Row i's ids depend on the seed, on i and on its prompt alone: not on the other rows, their number, padding or
    earlier calls. (Products of another batch size may round differently. In float32 that is never seen in practice; in
    bfloat16, or TF32 on a GPU, it now and then tips a close choice, and the row goes another way from there.)
    Rows, prompt lengths and whole lengths are rounded up to a few sizes (generation/buckets.py), for each of which
    programs are compiled when it first comes up, and so for each config and `logprobs`; all else is traced.

    Args:
      config: the model's hyperparameters.
      params: its parameters, as `load` gives them.
      prompts: a list of token-id sequences, each of at least one id, of any lengths.
      max_new_tokens, temperature, top_k, top_p, seed, min_p, repetition_penalty, top_p_rule, stop_ids, stop_strings,
        overflow, logprobs: the fields of `gpt2_jax.generation.Settings`, which says what each means.
      tokenizer: the model's, for stop_strings.
      first_row: row i draws as row first_row + i, below 2**32, so that a long list may be taken in parts.
      edits: of activations, as `gpt2_jax.research` makes them, in every forward pass; each value is one for all tokens.

    Returns:
      The new ids, one list for each prompt; with `logprobs`, these and a list of Logprobs.

    Raises:
      ValueError: a bad argument, before anything is traced; or, after, logits that are NaN: the params hold one.
    """
    settings = Settings.among(locals()).check(config, tokenizer)
    rows = _run(config, params, prompts, settings, tokenizer, first_row, edits)
    ids = [row.ids for row in rows]
    return ids if logprobs is None else (ids, [row.logprobs() for row in rows])


def complete(
    config: GPT2Config,
    params: Params,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    settings: Settings,
    first_row: int = 0,
    edits: Edit | Sequence[Edit] = (),
) -> list[Completion]:
    """Continue each prompt as `generate` does, and give text, cut exactly before a stop string.

    Raises:
      ValueError: as `generate`.
    """
    settings = settings.check(config, tokenizer)
    rows = _run(config, params, prompts, settings, tokenizer, first_row, edits, wants_text=True)
    wants_logprobs = settings.logprobs is not None
    return [
        Completion(row.new_text(last=True), row.ids, row.stopped, row.logprobs() if wants_logprobs else None)
        for row in rows
    ]


def stream(
    config: GPT2Config,
    params: Params,
    prompt: str | Sequence[int],
    tokenizer: Tokenizer,
    max_new_tokens: int = Settings.max_new_tokens,
    temperature: float = Settings.temperature,
    top_k: int = Settings.top_k,
    top_p: float = Settings.top_p,
    seed: int = Settings.seed,
    *,
    min_p: float = Settings.min_p,
    repetition_penalty: float = Settings.repetition_penalty,
    top_p_rule: TopPRule = Settings.top_p_rule,
    stop_ids: Sequence[int] = Settings.stop_ids,
    stop_strings: Sequence[str] = Settings.stop_strings,
    overflow: Overflow = Settings.overflow,
    edits: Edit | Sequence[Edit] = (),
) -> Generator[str, None, None]:
    """Yield the continuation of a prompt as it comes: text, or token ids, in; pieces of text out.

    The pieces are of whole characters and not empty, and joined they are the text of what `generate` gives for this
    prompt, cut exactly before a stop string. A piece comes every few tokens, unless it may be the beginning of a stop
    string. Closing the iterator, or dropping it, ends the decoding.

    Args:
      config: the model's hyperparameters.
      params: its parameters, as `load` gives them.
      prompt: the text to continue, or its token ids.
      tokenizer: the model's, as `load_tokenizer` gives it.
      max_new_tokens, temperature, top_k, top_p, seed, min_p, repetition_penalty, top_p_rule, stop_ids, stop_strings,
        overflow: the fields of `gpt2_jax.generation.Settings`, which says what each means.
      edits: as `generate`'s.

    Raises:
      ValueError: as `generate`, for a bad argument at once.
    """
    settings = Settings.among(locals())
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"tokenizer must be a Tokenizer, as load_tokenizer gives it, not {tokenizer!r}")
    settings = settings.check(config, tokenizer)
    ids = check_prompt(config, "prompt", tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
    check_fits(config, "prompt", ids, settings)
    check_params(config, params, dtypes=False)
    edits = check_edits(config, edits, whole_rows=False)
    row = _Row("prompt", ids, settings, tokenizer, wants_text=True)

    def pieces() -> Generator[str, None, None]:
        for _ in _decode(config, params, [row], settings, edits, steps_a_call=STEPS_A_PIECE):
            if piece := row.new_text():
                yield piece
        if piece := row.new_text(last=True):
            yield piece

    return pieces()


def _run(
    config: GPT2Config,
    params: Params,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    tokenizer: Tokenizer | None,
    first_row: int,
    edits: Edit | Sequence[Edit],
    wants_text: bool = False,
) -> list[_Row]:
    """Decode all rows to their ends."""
    ids = check_prompts(config, prompts, settings)
    check_params(config, params, dtypes=False)
    first_row = whole_number("first_row", first_row, 0, 2**32 - len(ids))
    edits = check_edits(config, edits, whole_rows=False)
    rows = [_Row(f"prompts[{b}]", prompt, settings, tokenizer, wants_text) for b, prompt in enumerate(ids)]
    how = {"first_row": first_row, "look_ahead": not settings.stop_strings}
    for _ in _decode(config, params, rows, settings, edits, **how):
        pass
    return rows


def _decode(
    config: GPT2Config, params: Params, rows: list[_Row], settings: Settings, edits: tuple[Edit, ...], **how: Any
) -> Iterator[None]:
    """Decode into the rows; yields each time they have been given more."""
    if settings.max_new_tokens == 0:
        return
    finished_B = np.zeros(len(rows), bool)
    prompts = [row.prompt for row in rows]
    for picked in decode_rows(GPT2(config), placed(params), prompts, settings, finished_B, edits=edits, **how):
        for b in np.flatnonzero(~finished_B):
            finished_B[b] = rows[b].take(jax.tree.map(lambda array_BR, b=b: array_BR[b], picked))
        yield


class _Row:
    """What one row has picked so far, cut at its stop."""

    def __init__(
        self, name: str, prompt: np.ndarray, settings: Settings, tokenizer: Tokenizer | None, wants_text: bool = False
    ):
        self.name, self.prompt, self.stop_ids = name, prompt, set(settings.stop_ids)
        needs_text = wants_text or bool(settings.stop_strings)
        self.text = RowText(tokenizer, settings.stop_strings) if tokenizer is not None and needs_text else None
        self.all_ids: list[int] = []
        self.picked: list[Picked] = []  # the same with their log-probabilities, where those are asked for
        self.pieces: list[str] = []  # of text, not handed out yet
        self.stopped = False
        self.n_top = settings.logprobs

    @property
    def ids(self) -> list[int]:
        """The new ids that count."""
        return self.all_ids if self.text is None else self.text.ids

    def take(self, picked: Picked) -> bool:
        """Take what the next steps picked; return whether the row is at its end."""
        ids = picked.id_BR.tolist()
        n = next((i for i, token in enumerate(ids) if token in self.stop_ids or token == NO_LOGITS), len(ids))
        if n < len(ids) and ids[n] == NO_LOGITS:
            step = len(self.all_ids) + n
            raise ValueError(f"{self.name} got NaN for logits at its new token {step}: look for NaN in the params")
        if self.n_top is not None:
            self.picked.append(jax.tree.map(lambda array_R: array_R[:n], picked))
        self.all_ids += ids[:n]
        if self.text is not None:
            self.pieces.append(self.text.add(ids[:n]))
        self.stopped = n < len(ids) or (self.text is not None and self.text.stopped)
        return self.stopped

    def new_text(self, last: bool = False) -> str:
        """Return the text since the last call; the `last` one gives what was held back too."""
        pieces, self.pieces = self.pieces, []
        return "".join(pieces) + (self.text.end() if last and self.text is not None else "")

    def logprobs(self) -> Logprobs:
        """Return the log-probabilities of the ids that count."""
        n = len(self.ids)
        if not self.picked:  # none were asked for
            none = np.zeros((0, self.n_top or 0), np.float32)
            return Logprobs(none.sum(-1), none.astype(np.int32), none)
        picked = jax.tree.map(lambda *parts: np.concatenate(parts)[:n], *self.picked)
        return Logprobs(picked.chosen_BR, picked.top_id_BRK, picked.top_BRK)
