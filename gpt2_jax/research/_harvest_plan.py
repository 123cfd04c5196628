"""Which tokens of a dataset are read together, and where their activations go.

Shape letters: D documents, W windows, N tokens of all documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.buckets import bucket_length, power_of_two
from gpt2_jax.generation.prompts import check_prompt


class Plan(NamedTuple):
    """All windows, in the order of the documents.

    Attributes:
      id_N: the ids of all documents.
      offset_W: where a window begins in `id_N`.
      length_W: its tokens.
      document_W: its document.
      position_W: where it begins in its document.
      row_W: its first row in its shard.
      first_window: the first window of each shard, and the number of windows.
      counts: the rows of each shard.
      max_tokens: the most tokens of a window.
      skip_first: the tokens that are left out at the start of each.
      digest: identifies the documents.
      n_divided: the documents of more than `max_tokens` tokens.
    """

    id_N: np.ndarray
    offset_W: np.ndarray
    length_W: np.ndarray
    document_W: np.ndarray
    position_W: np.ndarray
    row_W: np.ndarray
    first_window: list[int]
    counts: list[int]
    max_tokens: int
    skip_first: int
    digest: str
    n_divided: int


def make_plan(
    config: GPT2Config,
    documents: Sequence[Any],
    max_tokens: int,
    skip_first: int,
    rows_per_shard: int,
) -> Plan:
    """Divide the documents into windows, and the windows into shards.

    Raises:
      ValueError: a document is not a list of ids in the vocabulary, or no token is left.
    """
    if isinstance(documents, str) or not hasattr(documents, "__len__") or not len(documents):
        raise ValueError("there are no documents: give a list of token-id lists")
    rows = [check_prompt(config, f"documents[{i}]", row) for i, row in enumerate(documents)]
    length_D = np.array([len(row) for row in rows])
    id_N = np.concatenate([row.astype(np.int32 if config.n_vocab > 0xFFFF else np.uint16) for row in rows])
    digest = hashlib.sha256(length_D.astype("<i8").tobytes())
    digest.update(id_N.astype("<i4").tobytes())

    n_windows_D = -(-length_D // max_tokens)
    document_W = np.repeat(np.arange(len(rows)), n_windows_D)
    nth_W = np.arange(len(document_W)) - np.repeat(np.cumsum(n_windows_D) - n_windows_D, n_windows_D)
    position_W = nth_W * max_tokens
    length_W = np.minimum(length_D[document_W] - position_W, max_tokens)
    offset_W = (np.cumsum(length_D) - length_D)[document_W] + position_W
    kept_W = length_W > skip_first
    if not kept_W.any():
        raise ValueError(f"no text has more than {skip_first} tokens, which are left out: there is nothing to store")
    document_W, position_W, length_W, offset_W = (
        values_W[kept_W] for values_W in (document_W, position_W, length_W, offset_W)
    )
    end_W = np.cumsum(length_W - skip_first)
    start_W = end_W - (length_W - skip_first)
    shard_W = start_W // rows_per_shard  # a window has at most rows_per_shard rows, so no number is left out
    first_window = np.searchsorted(shard_W, np.arange(shard_W[-1] + 2))
    first_row = np.append(start_W[first_window[:-1]], end_W[-1])
    row_W = start_W - first_row[shard_W]
    windows = (offset_W, length_W, document_W, position_W, row_W)
    counts = np.diff(first_row).tolist()
    how = (max_tokens, skip_first, digest.hexdigest(), int((length_D > max_tokens).sum()))
    return Plan(id_N, *windows, first_window.tolist(), counts, *how)


class Batch(NamedTuple):
    shard: int
    windows: np.ndarray
    n_tokens: int
    n_rows: int


def batches(plan: Plan, shards: Sequence[int], tokens_per_call: int, n_devices: int) -> Iterator[Batch]:
    """Yield the windows of each call: the longest of a shard first, so that only its last call has empty rows."""
    for shard in shards:
        window_W = np.arange(*plan.first_window[shard : shard + 2])
        window_W = window_W[np.argsort(-plan.length_W[window_W], kind="stable")]
        while len(window_W):
            n_tokens = min(bucket_length(int(plan.length_W[window_W[0]])), plan.max_tokens)
            n_rows = power_of_two(max(1, tokens_per_call // n_tokens)) * n_devices
            yield Batch(shard, window_W[:n_rows], n_tokens, n_rows)
            window_W = window_W[n_rows:]
