"""The learning rate range test (Smith 2017, arXiv:1506.01186): the loss at each of many learning rates."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from gpt2_jax import figures, processes, progress
from gpt2_jax.checks import real_number, whole_number
from gpt2_jax.data.examples import PreparedExamples
from gpt2_jax.data.token_files import Prepared
from gpt2_jax.jax_defaults import under_jax_defaults
from gpt2_jax.params import Params
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.training.epochs import n_per_epoch
from gpt2_jax.training.loop import placed_batches
from gpt2_jax.training.plan import Plan
from gpt2_jax.training.start import check_data
from gpt2_jax.training.start_text import whole_pairs
from gpt2_jax.training.step import init_state, make_train_step

MEMORY = 0.8  # decay of the running mean of the losses
DIVERGED = 4  # the test ends when the running mean is so many times its least value


@dataclasses.dataclass(frozen=True)
class RateTest:
    """The result of a learning rate range test.

    Attributes:
      rates: float64 [n], the learning rates, rising.
      losses: float64 [n], the loss before the step with each rate; the last may not be finite.
      means: float64 [n], the running mean of the losses, without its bias to the start.
      suggested: the rate at which the running mean falls most steeply, per factor of the rate.
    """

    rates: np.ndarray
    losses: np.ndarray
    means: np.ndarray
    suggested: float


@under_jax_defaults
def find_learning_rate(
    plan: Plan,
    params: Params,
    data: Prepared | PreparedExamples,
    lowest: float = 1e-7,
    highest: float = 1.0,
    n_steps: int = 100,
    donate: bool = False,
    tokenizer: Tokenizer | None = None,
) -> RateTest:
    """Train for some steps with a learning rate that rises by the same factor at each step, and return the losses.

    The test ends earlier if the loss diverges. Nothing is saved, and nothing is validated. The schedule and the
    learning rate of the recipe are not used; all its other settings of training are.

    Args:
      plan: from `start_model` or `make_plan`.
      params: the initial params.
      data: what to train on.
      lowest: the first learning rate, above 0.
      highest: the last learning rate.
      n_steps: steps of the test, at least 10.
      donate: as in `fit`.
      tokenizer: as in `fit`: added tokens that do not occur in the data need no row in the model.

    Raises:
      ValueError: a number is out of range, the data does not fit the plan, or the loss is not finite from the start.
    """
    lowest = real_number("lowest", lowest, 0, open_low=True)
    highest = real_number("highest", highest, lowest, open_low=True)
    n_steps = whole_number("n_steps", n_steps, 10)
    unwatched = dataclasses.replace(plan.recipe, monitor=dataclasses.replace(plan.recipe.monitor, patience=0))
    data = check_data(dataclasses.replace(plan, recipe=unwatched), whole_pairs(data, None), tokenizer)
    n_per_epoch(plan, data)  # refuses examples that have no target in a row
    factor = (highest / lowest) ** (1 / (n_steps - 1))
    rising = dataclasses.replace(plan, schedule=lambda step: lowest * factor ** jnp.asarray(step, float))
    state, train_step = init_state(rising, params, donate), make_train_step(rising)
    rates, losses, means = [], [], np.zeros(0)
    stream = placed_batches(rising, data, 0)
    with contextlib.closing(stream), progress.bars("percent", "text") as bars:
        for step in range(n_steps):
            state, metrics = train_step(state, next(stream))
            rates.append(lowest * factor**step)
            losses.append(float(metrics["loss"]))
            bars.update("learning rates", step + 1, n_steps, f"rate {rates[-1]:.2g}, loss {losses[-1]:.3f}")
            means = running_mean(losses)
            if not math.isfinite(losses[-1]) or means[-1] > DIVERGED * means.min():
                break
    return RateTest(np.asarray(rates), np.asarray(losses), means, steepest(np.asarray(rates), means))


def running_mean(losses: Any) -> np.ndarray:
    """Return the exponential running mean of losses, float64 [n], without its bias to the start."""
    mean, means = 0.0, []
    for number, loss in enumerate(losses, start=1):
        mean = MEMORY * mean + (1 - MEMORY) * loss
        means.append(mean / (1 - MEMORY**number))
    return np.asarray(means)


def steepest(rates: np.ndarray, means: np.ndarray) -> float:
    """Return the rate before the least mean at which the means fall most steeply, per factor of the rate.

    The first tenth does not count: there, a mean is of few losses, and differs from the next one by chance.

    Raises:
      ValueError: there is no such rate, because the loss is not finite, or never falls.
    """
    finite = np.isfinite(means)
    rates, means = rates[finite], means[finite]
    first = len(means) // 10
    if not len(means) or means.argmin() <= first:
        what = "is not a finite number at the start" if not len(means) else "never fell"
        raise ValueError(f"the loss {what}: a learning rate cannot be suggested")
    least = int(means.argmin())
    slopes = np.gradient(means[: least + 1], np.log(rates[: least + 1]))
    return float(rates[first + slopes[first:].argmin()])


def plot_rates(test: RateTest, path: str | os.PathLike) -> None:
    """Draw the losses of a test over the learning rates, with the suggested one marked, into a picture."""
    figure = figures.Figure(figsize=(8, 4.8), layout="constrained")
    ax = figure.subplots()
    ax.plot(test.rates, test.losses, color="#9cc4e4", linewidth=0.8, label="each step")
    ax.plot(test.rates, test.means, color="#0072b2", linewidth=1.8, label="running mean")
    ax.axvline(test.suggested, color="#d55e00", linestyle="--", label=f"steepest descent: {test.suggested:.2g}")
    finite = test.means[np.isfinite(test.means)]
    low, high = finite.min(), max(finite[0], finite.min() + 0.1)
    ax.set(xscale="log", xlabel="learning rate", ylabel="loss (nats)", title="Learning rate range test")
    ax.set_ylim(low - 0.1 * (high - low), high + 0.4 * (high - low))
    ax.legend(frameon=False)
    ax.grid(alpha=0.25)
    processes.on_first(lambda: figures.save(figure, path))
