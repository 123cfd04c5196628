"""The probability of what follows a context: what tests of last words and of choices are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from gpt2_jax.config import GPT2Config
from gpt2_jax.edits import Edit
from gpt2_jax.generation.scoring import Score, score
from gpt2_jax.params import Params


def score_continuations(
    config: GPT2Config,
    params: Params,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    aside: Sequence[int] = (),
    edits: Edit | Sequence[Edit] = (),
    track: Callable[[list], Iterable] = iter,
) -> tuple[list[Score], int]:
    """Score the continuation of each pair, given its context.

    The model reads n_ctx tokens at most. Of a longer context it reads the last, as many as leave room for the
    continuation but for its last token, which need not be read.

    Args:
      config: the model's hyperparameters.
      params: its parameters, as `load` gives them.
      pairs: the ids of a context, one or more, and of what follows it, from 1 to n_ctx.
      aside: ids for `Score.greedy_aside`.
      edits: of activations, as `score` takes them.
      track: takes the list of batches and gives them one by one.

    Returns:
      The Score of each continuation, token by token, and how many contexts were cut.

    Raises:
      ValueError: an empty context or continuation, or a continuation that does not fit.
    """
    rows, first = [], []
    for i, (context, continuation) in enumerate(pairs):
        if not len(context) or not 1 <= len(continuation) <= config.n_ctx:
            raise ValueError(
                f"pairs[{i}] has {len(context)} tokens and {len(continuation)} that follow: there must be one of each "
                f"or more, and no more that follow than the model's n_ctx, {config.n_ctx}"
            )
        rows.append([*context, *continuation][-config.n_ctx - 1 :])
        first.append(len(rows[-1]) - len(continuation))
    n_cut = sum(len(row) < len(context) + len(rest) for row, (context, rest) in zip(rows, pairs, strict=True))
    scores = score(config, params, rows, config.n_ctx, first=first, aside=aside, edits=edits, track=track)
    return scores, n_cut
