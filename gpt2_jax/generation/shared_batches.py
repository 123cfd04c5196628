"""Batches that several processes divide, and whose results all of them get."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from gpt2_jax.processes import Share

B = TypeVar("B")
BATCHES_PER_EXCHANGE = 8  # of each process. An exchange takes milliseconds.


def results_of(
    batches: Sequence[tuple[int, B]],
    compute: Callable[[int, B], Sequence[np.ndarray]],
    dtypes: Sequence[Any],
    track: Callable[[list], Iterable],
    share: Share,
) -> Iterator[tuple[B, Sequence[np.ndarray]]]:
    """Yield all batches in order with their results, of all processes.

    Args:
      batches: (length, batch) pairs, the same in all processes.
      compute: takes such a pair, and returns the batch's results: arrays [n].
      dtypes: the dtype of each array.
      track: takes the list of this process's batches and yields them one by one.
      share: this process's share.
    """
    if share.count == 1:
        for length, batch in track(list(batches)):
            yield batch, compute(length, batch)
        return
    own = iter(track(list(share.of(batches))))
    n_together = BATCHES_PER_EXCHANGE * share.count
    for start in range(0, len(batches), n_together):
        some = batches[start : start + n_together]
        mine = itertools.islice(own, len(share.of(some)))
        found = share.gather(lambda mine=mine: [[_as_text(array) for array in compute(*one)] for one in mine])
        for i, (_, batch) in enumerate(some):
            texts = found[i % share.count][i // share.count]
            yield batch, [_from_text(text, dtype) for text, dtype in zip(texts, dtypes, strict=True)]
    for _ in own:  # lets `track` end
        pass


def _as_text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _from_text(text: str, dtype: Any) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)
