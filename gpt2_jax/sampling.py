"""From logits to token ids: greedy, or a random draw after penalty, temperature, top-k, top-p and min-p.

Nothing is sorted. Each filter keeps the logits at or above a threshold, which is found by bisection.

Shape letters: B batch, V vocab, K the most likely tokens.
Sources: openai/gpt-2, src/sample.py (temperature, top-k, top-p); Keskar et al. 2019, CTRL, section 4.1 (the penalty);
Nguyen et al. 2024, Turning Up the Heat (min-p).
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

FILTERED = -1e10  # the original sets dropped logits to this
NO_LOGITS = -1  # `pick` returns this instead of a token if the logits define no probabilities
ALL_IDS = np.int32(np.iinfo(np.int32).max)

Knob = Any
"""A scalar: a jax.Array inside a program, a NumPy scalar from a caller."""

Kind = Literal["greedy", "draw", "filtered"]


@struct.dataclass
class Sampling:
    """Sampling settings as traced scalars. Changing them does not recompile, except `kind`.

    A program of a narrower kind does less. What to skip is not decided at run time: on a GPU, XLA waits for the host at
    each conditional.

    Attributes:
      temperature: float32; divides the logits; 0 means greedy.
      top_k: int32; 0 means all.
      top_p: float32 in (0, 1]; 1 means all.
      min_p: float32 in [0, 1]; 0 means all.
      repetition_penalty: float32 above 0; 1 means none.
      keep_crossing: bool; True if top-p keeps the token that crosses p. Most libraries do; the original does not.
      n_ids: int32; ids from n_ids on are never chosen, whatever their logits. The default excludes none.
      kind: static. "filtered" is right for all values; "draw" needs top_k and top_p to be off, and "greedy" needs
        temperature 0. `narrowest_kind` finds the one that does least.
    """

    temperature: Knob
    top_k: Knob = np.int32(0)
    top_p: Knob = np.float32(1)
    min_p: Knob = np.float32(0)
    repetition_penalty: Knob = np.float32(1)
    keep_crossing: Knob = np.bool_(False)
    n_ids: Knob = ALL_IDS
    kind: Kind = struct.field(pytree_node=False, default="filtered")


def narrowest_kind(sampling: Sampling, n_vocab: int) -> Kind:
    """Return the kind that does least and is right for these values, which must be NumPy scalars."""
    if sampling.temperature == 0:
        return "greedy"
    return "filtered" if 0 < sampling.top_k < n_vocab or sampling.top_p < 1 else "draw"


def pick(logits_BV: jax.Array, key_B: jax.Array, sampling: Sampling, seen_BV: jax.Array | None = None) -> jax.Array:
    """Pick one token per row: the most likely at temperature 0, otherwise a random draw after the filters.

    The order is: repetition penalty (for the greedy choice too), temperature, top-k, top-p, min-p.

    Args:
      logits_BV: float32 or float64.
      key_B: one key per row. A row's draw depends only on its own logits and key.
      sampling: the sampling settings.
      seen_BV: bool, True for the tokens that the row already contains. The penalty makes them less likely: it divides a
        positive logit and multiplies a negative one. None means no penalty.

    Returns:
      token_B int32, below `n_ids`. In a tie, the greedy choice is the lowest id. It is NO_LOGITS where the logits
      define no probabilities: one of them is NaN or inf, or all logits of allowed ids are -inf.
    """
    logits_BV = _penalised_and_allowed(logits_BV, sampling, seen_BV)
    largest_B1 = logits_BV.max(axis=-1, keepdims=True)
    token_B = _first_largest(logits_BV if sampling.kind == "greedy" else _noisy(logits_BV, largest_B1, key_B, sampling))
    return jnp.where(jnp.isfinite(largest_B1[:, 0]), token_B, NO_LOGITS)


def _noisy(logits_BV: jax.Array, largest_B1: jax.Array, key_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Return values whose largest is a draw: filtered logits with noise. At temperature 0 they are the logits."""
    # A higher temperature makes no difference. XLA multiplies by the inverse: it would be 0, and -inf * 0 is NaN.
    temperature = jnp.minimum(sampling.temperature, 1e37).astype(logits_BV.dtype)
    # The largest logit becomes 0, so nothing overflows. It is set to 0 because 0 / 0 and inf - inf are NaN.
    scaled_BV = jnp.where(logits_BV == largest_B1, 0, (logits_BV - largest_B1) / temperature)
    noisy_BV = filter_logits(scaled_BV, sampling) + _gumbel(key_B, scaled_BV)
    return jnp.where(sampling.temperature == 0, logits_BV, noisy_BV)


def filter_logits(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Set to -1e10 the logits that top-k, then top-p, then min-p drop.

    - Top-k keeps the k largest logits and all ties with the k-th.
    - Top-p takes what top-k kept, most likely first, with probabilities scaled to sum to 1. The original rule keeps the
      longest prefix that sums to at most p, at least one token, and all ties with the last kept one. The common rule
      (`keep_crossing`) keeps every token whose more likely tokens sum to less than p: so it keeps the token that
      crosses p, and all ties with it.
    - Min-p keeps the tokens that are at least min_p times as likely as the most likely one.

    Sums are computed in the dtype of the logits: in float32, p is exact to about 1e-6.

    Args:
      logits_BV: float32 or float64, already divided by the temperature.
      sampling: the sampling settings; temperature and penalty are not used.
    """
    largest_B1 = logits_BV.max(axis=-1, keepdims=True)
    threshold_B1 = largest_B1 + jnp.log(sampling.min_p.astype(logits_BV.dtype))
    if sampling.kind != "draw":
        kth_B1 = _kth(logits_BV, largest_B1, sampling)
        nucleus_B1 = _nucleus(logits_BV, largest_B1, kth_B1, sampling)
        threshold_B1 = jnp.maximum(threshold_B1, jnp.where(sampling.top_p >= 1, kth_B1, nucleus_B1))
    return jnp.where(logits_BV < threshold_B1, FILTERED, logits_BV)


def token_logprobs(
    logits_BV: jax.Array, token_B: jax.Array, n_top: int, n_ids: Knob = ALL_IDS
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return log-probabilities (base e) under the unchanged logits: no penalty, temperature or filter.

    They are those of the model: ids from n_ids on keep their share of the probability.

    Args:
      logits_BV: float32 or float64.
      token_B: the chosen tokens.
      n_top: how many of the most likely tokens to return as well, at most n_ids; 0 means none.
      n_ids: int32; ids from n_ids on are not among the most likely tokens.

    Returns:
      chosen_B float32, top_id_BK int32 and top_BK float32, most likely first. In a tie the lower id is first; -0.0
      counts as less than 0.0.
    """
    logsumexp_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    chosen_B1 = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1) - logsumexp_B1
    top_BK, top_id_BK = lax.top_k(_allowed(logits_BV, n_ids), n_top)
    return chosen_B1[:, 0].astype(jnp.float32), top_id_BK, (top_BK - logsumexp_B1).astype(jnp.float32)


def _penalised_and_allowed(logits_BV: jax.Array, sampling: Sampling, seen_BV: jax.Array | None) -> jax.Array:
    """Return the logits after the repetition penalty, with -inf for the ids from n_ids on."""
    if seen_BV is not None:
        logits_BV = _penalise(logits_BV, seen_BV, sampling.repetition_penalty.astype(logits_BV.dtype))
    return _allowed(logits_BV, sampling.n_ids)


def _allowed(logits_BV: jax.Array, n_ids: Knob) -> jax.Array:
    """Return the logits with -inf for the ids from n_ids on. NaN and inf stay: `pick` finds them."""
    ids_BV = lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
    return jnp.where((ids_BV >= n_ids) & (logits_BV < jnp.inf), -jnp.inf, logits_BV)


def _penalise(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    limits = jnp.finfo(logits_BV.dtype)
    # One product and one quotient, of which one has no effect: XLA vectorizes this for a CPU, unlike a choice of them.
    factor_BV, divisor_BV = jnp.where(logits_BV > 0, 1, penalty), jnp.where(logits_BV > 0, penalty, 1)
    less_BV = jnp.clip(logits_BV * factor_BV / divisor_BV, limits.min, limits.max)
    # NaN and infinities stay: `pick` finds them.
    return jnp.where(seen_BV & jnp.isfinite(logits_BV), less_BV, logits_BV)


def _gumbel(key_B: jax.Array, like_BV: jax.Array) -> jax.Array:
    """Return Gumbel noise of the shape and dtype of `like_BV`. The argmax of logits + noise is a draw from the softmax.

    (One uniform number, compared with cumulative sums, would be cheaper. But the last bit of a logit depends on the
    batch size, and it changes every later sum. One of these thousands of sums may then cross the number, and the draw
    changes. With the argmax, only the two largest values matter.)
    A row is drawn in eight parts, which XLA spreads over the cores: one row of 50,257 tokens on two cores takes 0.3 ms
    instead of 1.4 ms.
    """
    n_vocab = like_BV.shape[-1]
    shape = (8, -(-n_vocab // 8))
    noise_B8X = jax.vmap(lambda key: jax.random.gumbel(key, shape, like_BV.dtype))(key_B)
    return noise_B8X.reshape(len(key_B), -1)[:, :n_vocab]


def _first_largest(x_BV: jax.Array) -> jax.Array:
    """Return argmax as int32, or NO_LOGITS for a row with NaN.

    It takes two passes, which XLA vectorizes on a CPU, unlike argmax. The second one looks for NaN, because the first
    may skip it: on a CPU, XLA's max and min over an axis ignore NaN, depending on the size (openxla/xla#21461).
    """
    ids_BV = lax.broadcasted_iota(jnp.int32, x_BV.shape, 1)
    is_largest_BV = x_BV == x_BV.max(axis=-1, keepdims=True)
    found_BV = jnp.where(is_largest_BV, ids_BV, x_BV.shape[-1])
    return jnp.where(jnp.isnan(x_BV), NO_LOGITS, found_BV).min(axis=-1)


# ---- thresholds


def _kth(logits_BV: jax.Array, largest_B1: jax.Array, sampling: Sampling) -> jax.Array:
    """Return the k-th largest logit, or -inf if top-k is off."""
    off = (sampling.top_k == 0) | (sampling.top_k >= logits_BV.shape[-1])
    one_BV = (logits_BV > -jnp.inf).astype(logits_BV.dtype)
    return jnp.where(off, -jnp.inf, _threshold(logits_BV, one_BV, sampling.top_k, largest_B1))


def _nucleus(logits_BV: jax.Array, largest_B1: jax.Array, kth_B1: jax.Array, sampling: Sampling) -> jax.Array:
    """Return the smallest logit that top-p keeps of those that are at least `kth_B1`."""
    p_BV = jnp.where(logits_BV >= kth_B1, jnp.exp(logits_BV - largest_B1), 0)  # not normalized
    limit_B1 = sampling.top_p.astype(logits_BV.dtype) * p_BV.sum(axis=-1, keepdims=True)
    crossing_B1 = _threshold(logits_BV, p_BV, limit_B1, largest_B1)
    # The original's last token is the one that crosses p if the sum with it is exactly p, else the one before.
    [above_B1] = _above(_parts(logits_BV), _parts(p_BV), crossing_B1)
    reached_B1 = above_B1 + jnp.exp(crossing_B1 - largest_B1)
    before_B1 = jnp.minimum(_next_above(logits_BV, crossing_B1), largest_B1)
    keep_B1 = sampling.keep_crossing | (reached_B1 <= limit_B1)
    return jnp.maximum(jnp.where(keep_B1, crossing_B1, before_B1), kth_B1)


def _threshold(x_BV: jax.Array, mass_BV: jax.Array, limit_B1: jax.Array, largest_B1: jax.Array) -> jax.Array:
    """Return the smallest element above which the mass is less than `limit_B1`, or the largest if there is none.

    `mass_BV` is the weight of each element. Only the smallest elements may have weight 0.

    The mass above t does not grow with t, even as a rounded sum: fewer terms, none negative, are added in the same
    order, and rounding is monotone. So bisection finds the threshold. It bisects the floats as whole numbers of the
    same order: as many times as they have bits, then nothing is in between. If the mass above some t equals the limit,
    which is common with counts, both bounds become t and stay there: the answer is the next element above t.
    """
    x_B8X, mass_B8X = _parts(x_BV), _parts(mass_BV)

    def bisect_twice(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        middle_B1 = _middle(*bounds)
        lower_B1, upper_B1 = _middle(bounds[0], middle_B1), _middle(middle_B1, bounds[1])
        all_t = [_as_float(i_B1, x_BV.dtype) for i_B1 in (lower_B1, middle_B1, upper_B1)]
        lower_mass_B1, mass_B1, upper_mass_B1 = _above(x_B8X, mass_B8X, *all_t)
        bounds = _narrower(bounds, middle_B1, mass_B1, limit_B1)
        middle_B1 = _middle(*bounds)  # one of the three
        mass_B1 = jnp.where(middle_B1 == lower_B1, lower_mass_B1, mass_B1)
        mass_B1 = jnp.where(middle_B1 == upper_B1, upper_mass_B1, mass_B1)
        return _narrower(bounds, middle_B1, mass_B1, limit_B1)

    low_B1 = jnp.full_like(largest_B1, -jnp.inf)
    bounds = (_as_int(low_B1), _as_int(largest_B1))
    n_passes = 4 * x_BV.dtype.itemsize  # fixed: on a GPU, XLA would wait for the host at each turn of another loop
    low_B1, _ = lax.fori_loop(0, n_passes, bisect_twice, bounds)
    return jnp.minimum(_next_above(x_BV, _as_float(low_B1, x_BV.dtype)), largest_B1)


def _narrower(
    bounds: tuple[jax.Array, jax.Array], t_B1: jax.Array, mass_B1: jax.Array, limit_B1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the bounds of a threshold after a look at the mass above t, which is between them."""
    low_B1, high_B1 = bounds
    return jnp.where(mass_B1 >= limit_B1, t_B1, low_B1), jnp.where(mass_B1 > limit_B1, high_B1, t_B1)


def _parts(x_BV: jax.Array) -> jax.Array:
    """Return x in eight parts [B, 8, X], with zeros at the end."""
    n_rows, n_vocab = x_BV.shape
    return jnp.pad(x_BV, ((0, 0), (0, -n_vocab % 8))).reshape(n_rows, 8, -1)


def _above(x_B8X: jax.Array, mass_B8X: jax.Array, *all_t: jax.Array) -> list[jax.Array]:
    """Return the mass above each t_B1, in one pass. On a CPU, XLA vectorizes it over the eight parts."""
    kept = [jnp.where(x_B8X > t_B1[..., None], mass_B8X, 0) for t_B1 in all_t]
    zero = np.zeros((), mass_B8X.dtype)
    sums = lax.reduce(
        kept, [zero] * len(kept), lambda some, more: [a + b for a, b in zip(some, more, strict=True)], [1]
    )
    return [sum_BX.sum(axis=-1, keepdims=True) for sum_BX in sums]


def _next_above(x_BV: jax.Array, t_B1: jax.Array) -> jax.Array:
    return jnp.where(x_BV > t_B1, x_BV, jnp.inf).min(axis=-1, keepdims=True)


def _as_int(x: jax.Array) -> jax.Array:
    """Return floats as whole numbers of the same width and order."""
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"int{x.dtype.itemsize * 8}"))
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


def _as_float(i: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return lax.bitcast_convert_type(jnp.where(i < 0, i ^ jnp.iinfo(i.dtype).max, i), dtype)


def _middle(low: jax.Array, high: jax.Array) -> jax.Array:
    """Return the mean, rounded down, without overflow. It is `low` if no number is in between."""
    return (low & high) + ((low ^ high) >> 1)
