"""The decoding loop on the host, which calls the compiled programs.

Shape letters: B batch, G rows of one prefill, P padded prompt, V vocab, D n_embd.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from gpt2_jax.changes import NO_CHANGES, Changes
from gpt2_jax.generation.buckets import bucket_length, bucket_rows, power_of_two
from gpt2_jax.generation.memory import RECENT, cache_slots
from gpt2_jax.generation.programs import (
    Picked,
    cache_formats,
    decode,
    empty,
    first,
    in_format,
    merge_recent,
    nothing_captured,
    place,
    prefill,
)
from gpt2_jax.generation.settings import Settings
from gpt2_jax.model import GPT2
from gpt2_jax.params import Params
from gpt2_jax.sharding import platform

# Devices on which `decode` always takes RECENT steps. There XLA waits for the host at each turn of any other loop.
FIXED_STEPS = {"gpu"}
STOP_IDS = 16  # least number of stop ids that a program has room for
NO_ID = -2  # fills the rest if there are fewer stop ids
# Tokens of one prefill call. Larger calls do not fit a CPU's caches: 8 prompts of 512 tokens take a quarter longer
# together than one by one. On other devices large calls keep the device busy; the scores of this many tokens still fit.
PREFILL_TOKENS = {"cpu": 512}
PREFILL_TOKENS_ELSEWHERE = 2**14


def window(n_ctx: int, n_tokens: int) -> int:
    """Return how many of a row's last tokens the model reads when it chooses the next one.

    It reads all tokens up to n_ctx. When they no longer fit, it reads the last n_ctx // 2, and then up to n_ctx again.
    This depends only on the number of tokens. So a text continues the same way however it was produced.
    """
    kept = max(1, n_ctx // 2)
    return n_tokens if n_tokens <= n_ctx else kept + (n_tokens - n_ctx - 1) % (n_ctx - kept + 1)


def decode_rows(
    model: GPT2,
    params: Params,
    prompts: Sequence[np.ndarray],
    settings: Settings,
    finished_B: np.ndarray,
    first_row: int | np.ndarray = 0,
    steps_a_call: int = RECENT,
    look_ahead: bool = False,
    changes: Changes = NO_CHANGES,
    capture: tuple[str, ...] = (),
) -> Iterator[Picked]:
    """Yield what the rows pick, a few steps at a time, as NumPy arrays [B, n, ...]: `max_new_tokens` steps in total.

    Args:
      model: a GPT2, or another hashable object with `config` and `apply`.
      params: the model's parameters.
      prompts: the rows' ids. With the new ids they may exceed n_ctx only if `settings.overflow` is "slide".
      settings: checked settings, with at least one new token.
      finished_B: bool; the caller sets it to True for rows that have ended. Decoding ends when all have.
      first_row: row b draws like row `first_row + b`, or like row `first_row[b]` of an array [B].
      steps_a_call: maximum number of steps between two yields, at most RECENT. On a GPU it is always RECENT.
      look_ahead: start a call before the tokens of the last one are yielded, so that the device does not wait for the
        host. For callers that set `finished_B` only by `settings.stop_ids`, which the device checks too.
      changes: checked edits and taps of these rows, for every forward pass. Other values do not recompile.
      capture: names of activations to return with the picks. They have no axis S.
    """
    batch = _Batch(model, params, prompts, settings, changes, capture)
    waiting = collections.deque([(batch.first(first_row), 1)])
    n_new = 1

    def hand_out(n_left: int) -> Iterator[Picked]:
        while len(waiting) > n_left and not finished_B.all():
            picked = batch.fetch(*waiting.popleft())
            batch.note(np.asarray(picked.id_BR))
            yield picked

    yield from hand_out(int(look_ahead))
    while n_new < settings.max_new_tokens and not finished_B.all():
        n_free = batch.n_free(finished_B)
        if n_free == 0:
            if batch.full_rows(finished_B):  # their last tokens must be known
                yield from hand_out(0)
            batch.make_room(finished_B)
            continue
        n_steps = min(RECENT if batch.fixed else steps_a_call, n_free, settings.max_new_tokens - n_new)
        waiting.append((batch.decode(n_steps, finished_B), n_steps))
        n_new += n_steps
        yield from hand_out(int(look_ahead))
    yield from hand_out(0)


class _Batch:
    """The rows of one call, padded to a bucket: their cache and state on the device, their tokens on the host."""

    def __init__(
        self,
        model: GPT2,
        params: Params,
        prompts: Sequence[np.ndarray],
        settings: Settings,
        changes: Changes,
        capture: tuple[str, ...] = (),
    ):
        self.model, self.params, self.settings, self.capture = model, params, settings, capture
        self.config = model.config
        self.sampling = settings.sampling(self.config)
        self.fixed = platform(params) in FIXED_STEPS
        self.rows = [prompt.tolist() for prompt in prompts]
        self.n_prompt_B = [len(row) for row in self.rows]
        n_missing = bucket_rows(max(len(settings.stop_ids), STOP_IDS)) - len(settings.stop_ids)
        self.stop_ids = np.array([*settings.stop_ids, *[NO_ID] * n_missing], np.int32)

        self.n_rows = bucket_rows(len(prompts))
        longest = max(map(len, self.rows)) + settings.max_new_tokens
        self.formats = cache_formats(model, params, self.n_rows)
        self.past, self.h_BD = in_format(empty, self.formats)(model, self.n_rows, cache_slots(self.config, longest))
        self.n_cached_B = np.zeros(len(prompts), int)  # tokens in both parts of the cache
        self.n_recent = 0
        self.changes, self.of_rows = changes, changes.of_rows(range(len(prompts)), self.n_rows)
        self.end_B = np.zeros(self.n_rows, np.int32) if changes else None  # where prompts end in their windows
        self.captured = nothing_captured(self.config, (len(prompts), 1), capture)  # of each prompt's last token
        self._prefill({b: row[-window(self.config.n_ctx, len(row)) :] for b, row in enumerate(self.rows)})

    def first(self, first_row: int | np.ndarray) -> Picked:
        """Pick the first new tokens."""
        seen_BV = np.zeros((self.n_rows, self.config.n_vocab), bool)
        for b, row in enumerate(self.rows):
            seen_BV[b, row] = True
        row_B = np.zeros(self.n_rows, np.uint32)
        row_B[: len(self.rows)] = first_row if np.ndim(first_row) else first_row + np.arange(len(self.rows))
        knobs = (np.uint32(self.settings.seed), self.sampling, self.stop_ids, self.settings.logprobs)
        no_row_B = np.arange(self.n_rows) >= len(self.rows)
        self.state, picked = first(self.model, self.params, self.h_BD, seen_BV, no_row_B, row_B, *knobs)
        return dataclasses.replace(picked, captured=self.captured)

    def decode(self, n_steps: int, finished_B: np.ndarray) -> Picked:
        """Start a call of `n_steps` steps."""
        done_B = np.ones(self.n_rows, bool)
        done_B[: len(self.rows)] = finished_B
        knobs = (self.sampling, self.stop_ids, np.int32(n_steps), self.settings.logprobs, self.fixed)
        args = (self.model, self.params, self.of_rows, self.past, self.state, done_B, *knobs)
        self.state, picked = decode(*args, self.end_B, self.capture)
        self.n_recent += n_steps
        self.n_cached_B += n_steps
        return picked

    def fetch(self, picked: Picked, n_steps: int) -> Picked:
        """Wait for a call of `n_steps` steps, and return what it picked for real rows."""
        # Copied: a view would keep the device's array alive.
        return jax.tree.map(lambda array: np.array(np.asarray(array)[: len(self.rows), :n_steps]), picked)

    def note(self, id_BR: np.ndarray) -> None:
        """Append the new ids to the rows. Those of a finished row have no meaning and are not used."""
        for row, ids in zip(self.rows, id_BR.tolist(), strict=True):
            row += ids

    def n_free(self, finished_B: np.ndarray) -> int:
        """Return how many steps the cache has room for."""
        if self.fixed and self.n_recent:  # `decode` needs an empty recent part
            return 0
        return min(RECENT - self.n_recent, self.config.n_ctx - self.n_cached_B[~finished_B].max())

    def full_rows(self, finished_B: np.ndarray) -> list[int]:
        """Return the unfinished rows whose window is full."""
        return np.flatnonzero(~finished_B & (self.n_cached_B == self.config.n_ctx)).tolist()

    def make_room(self, finished_B: np.ndarray) -> None:
        """Move the recent part into the long one, and cut the windows of full rows."""
        self.past, recent = in_format(merge_recent, self.formats)(self.past, self.state.recent)
        self.state = dataclasses.replace(self.state, recent=recent)
        self.n_recent = 0
        if full := self.full_rows(finished_B):
            # Without the last token, which the next step reads.
            self._prefill({b: self.rows[b][-window(self.config.n_ctx, self.config.n_ctx + 1) : -1] for b in full})

    def _prefill(self, window_of: dict[int, list[int]]) -> None:
        """Replace what the cache holds for these rows by these tokens."""
        members = collections.defaultdict(list)
        for b, tokens in window_of.items():
            if self.end_B is not None:
                n_before = len(self.rows[b]) - window(self.config.n_ctx, len(self.rows[b]))
                self.end_B[b] = self.n_prompt_B[b] - n_before
            members[min(bucket_length(len(tokens)), self.config.n_ctx)].append(b)
            self.n_cached_B[b] = len(tokens)
        for n_slots, rows in members.items():
            n_together = max(1, PREFILL_TOKENS.get(platform(self.params), PREFILL_TOKENS_ELSEWHERE) // n_slots)
            while rows:
                n_rows = power_of_two(min(n_together, len(rows)))  # 7 rows as 4, 2 and 1: none is padded
                group, rows = rows[:n_rows], rows[n_rows:]
                tokens_GP = np.zeros((len(group), n_slots), np.int32)
                for g, b in enumerate(group):
                    tokens_GP[g, : len(window_of[b])] = window_of[b]
                length_G, row_G = np.array([len(window_of[b]) for b in group], np.int32), np.array(group, np.int32)
                end_G = None if self.end_B is None else self.end_B[row_G]
                args = (self.model, self.params, self.changes.of_rows(group), tokens_GP, length_G, end_G, self.capture)
                cache, h_GD, captured = prefill(*args)
                for name, array_G in captured.items():
                    self.captured[name][row_G, 0] = array_G
                put = in_format(place, self.formats)
                self.past, self.h_BD = put(self.past, self.h_BD, cache, h_GD, row_G)
