"""Measures for several tests: the number of compilations, the operations of a program, and the fit of draws."""

import jax
import numpy as np
from scipy import stats

COMPILATIONS = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: COMPILATIONS.append(event) if event.endswith("backend_compile_duration") else None
)


def equations(jaxpr):
    """Yield every operation of a traced program, with those of the programs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def chi_square_p(counts, expected) -> float:
    """The p-value of the counts, or 0 if a forbidden cell was drawn. Cells with fewer than five expected are merged."""
    if counts[expected == 0].any():
        return 0.0
    small = expected < 5
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    return stats.chi2.sf(np.sum((counts - expected) ** 2 / expected), max(len(counts) - 1, 1))
