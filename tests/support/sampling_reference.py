"""Sampling knobs and keys for tests, and simple float64 implementations of the filters."""

import jax
import numpy as np

from gpt2_jax.sampling import Sampling


def knobs(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, rule="original"):
    return Sampling(
        np.float32(temperature),
        np.int32(top_k),
        np.float32(top_p),
        np.float32(min_p),
        np.float32(repetition_penalty),
        np.bool_(rule == "common"),
    )


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def reference_filter(logits_V, top_k=0, top_p=1.0, min_p=0.0, rule="original"):
    """The tokens of one row that are kept, from sorted logits and their cumulative sums in float64."""
    logits_V = np.asarray(logits_V, np.float64)
    if top_k:
        logits_V = np.where(logits_V < np.sort(logits_V)[-min(top_k, len(logits_V))], -np.inf, logits_V)
    ordered = np.sort(logits_V)[::-1]
    p = np.exp(ordered - ordered[0])
    cumulative = np.cumsum(p / p.sum())
    if top_p < 1:
        n_kept = (cumulative <= top_p).sum() if rule == "original" else 1 + (cumulative < top_p).sum()
        logits_V = np.where(logits_V < ordered[np.clip(n_kept, 1, len(p)) - 1], -np.inf, logits_V)
    return (logits_V > -np.inf) & (np.exp(logits_V - logits_V.max()) >= min_p)
