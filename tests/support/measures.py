"""Measures for several tests: the number of compilations, and how well draws fit a distribution."""

import jax
import numpy as np
from scipy import stats

COMPILATIONS = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: COMPILATIONS.append(event) if event.endswith("backend_compile_duration") else None
)


def chi_square_p(counts, expected) -> float:
    """The p-value of the counts, or 0 if a forbidden cell was drawn. Cells with fewer than five expected are merged."""
    if counts[expected == 0].any():
        return 0.0
    small = expected < 5
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    return stats.chi2.sf(np.sum((counts - expected) ** 2 / expected), max(len(counts) - 1, 1))
