"""`generate` and `stream`: prompts in, tokens or text out."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gpt2_jax.activations import Tap, axes, select
from gpt2_jax.changes import Changes, Edits, check_changes
from gpt2_jax.checks import whole_number
from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.devices import on_devices
from gpt2_jax.generation.engine import decode_rows
from gpt2_jax.generation.memory import is_out_of_memory, out_of_memory, row_bytes, rows_together
from gpt2_jax.generation.non_finite import NoLogits, cause
from gpt2_jax.generation.prompts import check_fits, check_prompt, check_prompts
from gpt2_jax.generation.rows import Logprobs, Row
from gpt2_jax.generation.settings import Overflow, Settings, TopPRule
from gpt2_jax.jax_defaults import with_own_arrays
from gpt2_jax.model import GPT2, check_params
from gpt2_jax.params import Params
from gpt2_jax.tokenizer import Tokenizer

STEPS_A_PIECE = 4  # decode steps per piece of `stream`, except on a GPU: text comes often, even if a step takes 100 ms


@dataclasses.dataclass(frozen=True)
class Completion:
    """One row's new text.

    Attributes:
      text: the text, up to a stop.
      ids: the new tokens. If the row ended at a stop string, only those entirely before it.
      stopped: True if the row ended at a stop, False if it ended after max_new_tokens.
      logprobs: the log-probabilities of `ids`; None if they were not requested.
      stop: the id or the string that ended the row; None if it ended after max_new_tokens.
    """

    text: str
    ids: list[int]
    stopped: bool
    logprobs: Logprobs | None
    stop: int | str | None = None


@with_own_arrays
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
    n_ids: int | None = Settings.n_ids,
    first_row: int = 0,
    edits: Edits = (),
    taps: Mapping[str, Tap] | None = None,
    capture: str | Sequence[str] = (),
) -> Any:
    """Continue each prompt by `max_new_tokens` tokens, or up to a stop.

    As in the original, `<|endoftext|>` is a stop only if it is in `stop_ids`.
    The ids of row i depend only on the seed, on i and on its prompt. They do not depend on the other rows, their
    number, padding or earlier calls. (Products of another batch size may round differently. In float32 this is never
    seen in practice. In bfloat16, or in TF32 on a GPU, it can change a close choice, and the row then differs.)
    A list that needs more memory than there is for KV caches (4 GiB on a CPU, elsewhere half of what the params leave)
    is divided, and its parts are decoded one after another.
    Row counts, prompt lengths and total lengths are rounded up to a few sizes (generation/buckets.py). Each size
    compiles once for each config, `logprobs`, and names and kinds of edits, when it is first used. So does each kind of
    sampling: greedy (temperature 0), draws, and draws with top_k or top_p. All other arguments are traced.

    Args:
      config: the model's hyperparameters.
      params: the model's parameters, from `load`.
      prompts: a list of token-id sequences of any lengths, each with at least one id.
      max_new_tokens, temperature, top_k, top_p, seed: fields of `gpt2_jax.generation.Settings`, which documents them.
      min_p, repetition_penalty, top_p_rule, stop_ids, stop_strings, overflow, logprobs, n_ids: more fields of it.
      tokenizer: the model's tokenizer, needed for stop_strings. If it has fewer ids than the model has rows of wte, the
        other rows are padding, and their ids are never chosen.
      first_row: row i draws as row first_row + i, below 2**32. Use it to pass a long list of prompts in several calls.
      edits: activation edits from `gpt2_jax.research`, for every forward pass. A value is the same for all tokens, or,
        with `each_row`, for all tokens of a row. Negative positions count from each prompt's end: -1 is its last token,
        and slice(-1, None) is that and all new tokens.
      taps: functions of activations for every forward pass, as `research.forward` takes them.
      capture: regular expressions of activations to return, as in `research.forward`, but not those with an axis S.

    Returns:
      The new ids, one list per prompt. With `logprobs` or `capture`, a tuple: these, with `logprobs` a list of
      Logprobs, and with `capture` a list of dicts, one for each prompt: {name: NumPy array [n, ...]}. Index i has the
      activation, after edits and taps, of the token that new token i was predicted from: the prompt's last token, then
      the new tokens except the last. It equals index `len(prompt) - 1 + i` of `research.forward` on the whole row.

    Raises:
      ValueError: an argument is invalid (raised before tracing), or the logits become NaN or infinite (raised later).
      MemoryError: the device has too little memory.
    """
    settings = Settings.among(locals()).check(config, tokenizer)
    names = _captured_names(config, capture)
    rows = _run(config, params, prompts, settings, tokenizer, first_row, edits, taps, capture=names)
    found = [[row.ids for row in rows]]
    found += [] if logprobs is None else [[row.logprobs() for row in rows]]
    found += [[row.activations(config) for row in rows]] if names else []
    return found[0] if len(found) == 1 else tuple(found)


@with_own_arrays
def complete(
    config: GPT2Config,
    params: Params,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    settings: Settings,
    first_row: int | Sequence[int] = 0,
    edits: Edits = (),
    taps: Mapping[str, Tap] | None = None,
) -> list[Completion]:
    """Continue each prompt like `generate`, and return text that ends exactly before a stop string.

    `first_row` is as in `generate`, or a list: row i then draws as row first_row[i].

    Raises:
      ValueError: as `generate`.
    """
    settings = settings.check(config, tokenizer)
    rows = _run(config, params, prompts, settings, tokenizer, first_row, edits, taps, wants_text=True)
    wants_logprobs = settings.logprobs is not None
    return [
        Completion(row.new_text(last=True), row.ids, row.stopped, row.logprobs() if wants_logprobs else None, row.stop)
        for row in rows
    ]


@with_own_arrays
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
    n_ids: int | None = Settings.n_ids,
    edits: Edits = (),
    taps: Mapping[str, Tap] | None = None,
) -> Generator[str, None, None]:
    """Yield the continuation of a prompt, piece by piece, as text.

    The pieces have whole characters and are not empty. Joined, they are the text of what `generate` returns for this
    prompt, cut exactly before a stop string. A piece comes every few tokens, unless it may be the beginning of a stop
    string. To end the decoding, close or drop the iterator.

    Args:
      config: the model's hyperparameters.
      params: the model's parameters, from `load`.
      prompt: the text to continue, or its token ids.
      tokenizer: the model's tokenizer, from `load_tokenizer`.
      max_new_tokens, temperature, top_k, top_p, seed: fields of `gpt2_jax.generation.Settings`, which documents them.
      min_p, repetition_penalty, top_p_rule, stop_ids, stop_strings, overflow, n_ids: more fields of it.
      edits, taps: as in `generate`.

    Raises:
      ValueError: as in `generate`. An invalid argument raises in the call itself, before the first piece.
    """
    settings = Settings.among(locals())
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"tokenizer must be a Tokenizer, from load_tokenizer, not {tokenizer!r}")
    settings = settings.check(config, tokenizer)
    if isinstance(prompt, str):
        prompt = [*tokenizer.prefix, *tokenizer.encode(prompt, template=False)]
    ids = check_prompt(config, "prompt", prompt)
    check_fits(config, "prompt", ids, settings)
    check_params(config, params, dtypes=False)
    changes = _changes(config, edits, taps, [ids], settings)
    row = Row("prompt", ids, settings, tokenizer, wants_text=True)

    def pieces() -> Generator[str, None, None]:
        model, on_them = on_devices(config, params, bool(changes))
        for _ in _decode(model, on_them, [row], settings, changes, steps_a_call=STEPS_A_PIECE):
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
    first_row: int | Sequence[int],
    edits: Edits,
    taps: Mapping[str, Tap] | None,
    wants_text: bool = False,
    capture: tuple[str, ...] = (),
) -> list[Row]:
    """Decode all rows to their ends."""
    ids = check_prompts(config, prompts, settings)
    check_params(config, params, dtypes=False)
    row_B = _row_numbers(first_row, len(ids))
    changes = _changes(config, edits, taps, ids, settings)
    model, params = on_devices(config, params, bool(changes or capture))
    rows = [Row(f"prompts[{b}]", prompt, settings, tokenizer, wants_text, capture) for b, prompt in enumerate(ids)]
    n_together = rows_together(config, params, len(rows), _longest(rows, settings))
    for start in range(0, len(rows), n_together):
        some = slice(start, start + n_together)
        how = {"first_row": row_B[some], "look_ahead": not settings.stop_strings, "capture": capture}
        of_rows = changes.of_rows(range(len(rows))[some])
        for _ in _decode(model, params, rows[some], settings, of_rows, **how):
            pass
    return rows


def _changes(
    config: GPT2Config,
    edits: Edits,
    taps: Mapping[str, Tap] | None,
    prompts: Sequence[np.ndarray],
    settings: Settings,
) -> Changes:
    ends_B = np.array([len(prompt) for prompt in prompts])
    longest_B = np.minimum(ends_B + settings.max_new_tokens, config.n_ctx)
    return check_changes(config, edits, taps, False, len(prompts), longest_B, ends_B)


def _captured_names(config: GPT2Config, capture: str | Sequence[str]) -> tuple[str, ...]:
    names = tuple(select(config, capture)) if capture else ()
    for name in names:
        if "S" in axes(name):
            raise ValueError(
                f"{name} has another width for each new token: run research.forward on the whole text to capture it"
            )
    return names


def _row_numbers(first_row: int | Sequence[int], n_rows: int) -> np.ndarray:
    """Return the numbers with which the rows draw, uint32."""
    if not isinstance(first_row, Sequence) or isinstance(first_row, str):
        return whole_number("first_row", first_row, 0, 2**32 - n_rows) + np.arange(n_rows).astype(np.uint32)
    if len(first_row) != n_rows:
        raise ValueError(f"first_row has {len(first_row)} numbers for {n_rows} prompts")
    pairs = enumerate(first_row)
    return np.array([whole_number(f"first_row[{i}]", row, 0, 2**32 - 1) for i, row in pairs], np.uint32)


def _longest(rows: list[Row], settings: Settings) -> int:
    return max(len(row.prompt) for row in rows) + settings.max_new_tokens


@with_own_arrays
def _decode(
    model: GPT2, params: Params, rows: list[Row], settings: Settings, changes: Changes, **how: Any
) -> Iterator[None]:
    """Decode, and add the new tokens to the rows. Yields after each addition."""
    config = model.config
    if settings.max_new_tokens == 0:
        return
    finished_B = np.zeros(len(rows), bool)
    prompts = [row.prompt for row in rows]
    try:
        for picked in decode_rows(model, params, prompts, settings, finished_B, changes=changes, **how):
            for b in np.flatnonzero(~finished_B):
                finished_B[b] = rows[b].take(jax.tree.map(lambda array_BR, b=b: array_BR[b], picked))
            yield
    except NoLogits as error:
        raise ValueError(f"{error}: {cause(config, params, changes.edits, changes.tap_names)}") from None
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        longest = _longest(rows, settings)
        what = f"decode {len(rows)} rows of up to {longest} tokens together"
        raise out_of_memory(config, what, len(rows) * row_bytes(config, longest)) from error
