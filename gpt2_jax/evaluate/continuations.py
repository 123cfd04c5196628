"""The probability of a continuation, given its context. The LAMBADA and cloze measures are built on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from gpt2_jax.activations import Tap
from gpt2_jax.changes import Edits
from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.scoring import Score, score
from gpt2_jax.params import Params
from gpt2_jax.processes import Share


def score_continuations(
    config: GPT2Config,
    params: Params,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    aside: Sequence[int] = (),
    edits: Edits = (),
    taps: Mapping[str, Tap] | None = None,
    track: Callable[[list], Iterable] = iter,
    share: Share | None = None,
) -> tuple[list[Score], int]:
    """Score the continuation of each pair, given its context.

    The model reads at most n_ctx tokens. It need not read the last token of the continuation. If the context is too
    long, only its last tokens are read, as many as fit.

    Args:
      config: the model's hyperparameters.
      params: the model's parameters, from `load`.
      pairs: (context, continuation) pairs of token ids. A context has 1 or more ids, a continuation from 1 to n_ctx.
      aside: ids that `Score.greedy_aside` ignores.
      edits, taps: edits and taps of activations, as in `score`.
      track: takes the list of batches and yields them one by one, such as rich.progress.track.
      share: this process's share, if several connected processes call this; as in `score`.

    Returns:
      A Score for each continuation, token by token, and the number of contexts that were cut.

    Raises:
      ValueError: a context or continuation is empty, or a continuation has more than n_ctx tokens.
    """
    rows, first = [], []
    for i, (context, continuation) in enumerate(pairs):
        if not len(context) or not 1 <= len(continuation) <= config.n_ctx:
            raise ValueError(
                f"pairs[{i}] has {len(context)} context tokens and {len(continuation)} continuation tokens: a context "
                f"needs 1 or more, and a continuation needs from 1 to n_ctx, {config.n_ctx}"
            )
        rows.append([*context, *continuation][-config.n_ctx - 1 :])
        first.append(len(rows[-1]) - len(continuation))
    n_cut = sum(len(row) < len(context) + len(rest) for row, (context, rest) in zip(rows, pairs, strict=True))
    scores = score(
        config, params, rows, config.n_ctx, first=first, aside=aside, edits=edits, taps=taps, track=track, share=share
    )
    return scores, n_cut
