"""Metrics: functions of a run's logits that return a number, and the logits at the positions that they read.

Shape letters: B batch, T query, D n_embd, V vocab.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from gpt2_jax.activations import Tap
from gpt2_jax.changes import Changes
from gpt2_jax.edits import Where
from gpt2_jax.jax_defaults import under_jax_defaults
from gpt2_jax.model import GPT2
from gpt2_jax.params import Params
from gpt2_jax.research._forward import places, slots

Metric = Callable[[jax.Array], Any]
"""A function of logits that returns a number, an array, or a tuple, list or dict of these.

The logits are [B, V], at one position of each row, or all [B, T, V].
"""


NUMBERS = (jax.Array, np.ndarray, np.number, np.bool_, int, float)


@under_jax_defaults
def logit_difference(answer: Any, wrong: Any) -> Metric:
    """Return a metric: the logit of `answer` minus the logit of `wrong` at one position, averaged over rows.

    It is `jax.tree_util.Partial(function, answer, wrong)` with a function of (answer, wrong, logits_BV). So other ids
    compile nothing. If a metric of your own holds numbers, make it in the same way.

    Args:
      answer, wrong: token ids, one for all rows or one for each row, [B]. An id outside the vocabulary gives NaN.
    """
    return Partial(_logit_difference, _ids("answer", answer), _ids("wrong", wrong))


@under_jax_defaults
def answer_probability(answer: Any) -> Metric:
    """Return a metric: the probability of `answer` as the next token at one position, averaged over rows.

    It is made as `logit_difference` is, so other ids compile nothing.

    Args:
      answer: token ids, one for all rows or one for each row, [B]. An id outside the vocabulary gives NaN.
    """
    return Partial(_answer_probability, _ids("answer", answer))


@under_jax_defaults
def _logit_difference(answer: jax.Array, wrong: jax.Array, logits_BV: jax.Array) -> jax.Array:
    return (_of("logit_difference", logits_BV, answer) - _of("logit_difference", logits_BV, wrong)).mean()


@under_jax_defaults
def _answer_probability(answer: jax.Array, logits_BV: jax.Array) -> jax.Array:
    return _of("answer_probability", jax.nn.softmax(logits_BV), answer).mean()


def _ids(name: str, ids: Any) -> jax.Array:
    dtype = ids.dtype if isinstance(ids, jax.Array) else np.asarray(ids).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{name} must be a token id, or one for each row, not {ids!r}")
    return jnp.asarray(ids, jnp.int32)


def _of(metric: str, values_BV: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the value of each row's id; NaN if it is outside the vocabulary."""
    if values_BV.ndim != 2:
        raise ValueError(f"{metric} takes logits [B, V], at one position, not {values_BV.shape}: set `at`")
    rows = jnp.arange(len(values_BV))
    return values_BV.at[rows, ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def traceable(metric: Metric | Mapping[str, Metric]) -> Metric:
    """Return a metric, or a dict of metrics, as one metric that is a pytree.

    The functions are static; numbers that a Partial holds are traced.

    Raises:
      ValueError: a metric is not a function.
    """
    if isinstance(metric, Mapping) and metric:
        return Partial(_each_of, {name: traceable(one) for name, one in metric.items()})
    if not callable(metric):
        raise ValueError(f"metric must be a function of the logits, or a dict of such functions, not {metric!r}")
    return metric if isinstance(metric, Partial) else Partial(metric)


def _each_of(metrics: Mapping[str, Metric], logits: jax.Array) -> dict[str, Any]:
    return {name: metric(logits) for name, metric in metrics.items()}


def in_order_of(metric: Any, values: Any) -> Any:
    """Return the values of a dict of metrics in the dict's order: jit sorts a dict by its keys."""
    if isinstance(metric, Mapping):
        return {name: in_order_of(one, values[name]) for name, one in metric.items()}
    return values


def judge(metric: Metric, logits: jax.Array) -> Any:
    """Return what a metric makes of logits: a number, an array, or a tree of these, as arrays.

    Raises:
      ValueError: it returned something else, or nothing.
    """
    values = metric(logits)
    leaves = jax.tree.leaves(values, is_leaf=lambda leaf: leaf is None)
    if not leaves or not all(isinstance(leaf, NUMBERS) for leaf in leaves):
        raise ValueError(
            "the metric must return a number, an array, or a tuple, list or dict of these, not "
            f"{next((leaf for leaf in leaves if not isinstance(leaf, NUMBERS)), values)!r}"
        )
    return jax.tree.map(jnp.asarray, values)


@functools.partial(jax.jit, static_argnames="model")
def metric_of_run(
    model: GPT2,
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None,
    at_B: jax.Array | None,
    metric: Metric,
    changes: Changes,
) -> Any:
    """Return the metric of one run with these edits and taps."""
    return judge(metric, logits_at(model, params, tokens_BT, mask_BT, at_B, changes.by_name(model.config)))


def as_place(at: Where, shape: tuple[int, ...]) -> jax.Array | None:
    """Return the position in each row, [B], for tokens [B, T]. -1 is the last. None stays None and means all.

    Raises:
      ValueError: `at` is not a whole number or one for each row, or is out of range.
    """
    if at is None:
        return None
    n_rows, n_tokens = shape
    try:
        place = np.asarray(at)
    except ValueError:  # lists of different lengths
        place = np.asarray(None)
    fits = place.shape in ((), (n_rows,)) and np.issubdtype(place.dtype, np.integer)
    if not fits or not ((place >= -n_tokens) & (place < n_tokens)).all():
        raise ValueError(
            f"at must be a position in rows of {n_tokens} tokens, or one for each of {n_rows} rows, not {at!r}"
        )
    return jnp.broadcast_to(jnp.asarray(place, jnp.int32), (n_rows,))


def logits_at(
    model: GPT2,
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None,
    at_B: jax.Array | None,
    taps: Mapping[str, Tap],
) -> jax.Array:
    """Compute only the logits [B, V] at one position of each row, or all, [B, T, V], if `at_B` is None.

    Positions count real tokens. Negative positions count from the end. A row without this position gets NaN.
    """
    h_BTD, _ = model.apply({"params": params}, tokens_BT, mask_BT, taps=taps, method="hidden")
    if at_B is not None:
        place_BT = places(mask_BT, tokens_BT.shape)
        at_B = jnp.where(at_B < 0, at_B + place_BT.max(-1) + 1, at_B)
        slot_B = slots(place_BT, at_B[:, None])[:, 0]
        h_BTD = h_BTD.at[jnp.arange(len(h_BTD)), slot_B].get(mode="fill", fill_value=jnp.nan)
    return model.apply({"params": params}, h_BTD, method="unembed")
