"""What a run reports: a progress bar or lines on standard error, JSON lines files, TensorBoard."""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2_jax import progress
from gpt2_jax.evaluate.label_metrics import summary
from gpt2_jax.recipe import to_dict
from gpt2_jax.training.boards import Board, TensorBoard, Wandb
from gpt2_jax.training.hardware import mfu
from gpt2_jax.training.plan import Plan
from gpt2_jax.training.records import METRICS, SAMPLES, Records

FIRST_LINES = 3  # without a terminal, each of the first 3 steps has a line
SECONDS_A_LINE = 10  # without a terminal, at least so many seconds between later lines
ROOM = 85  # terminal columns for the numbers beside the bar
RECENT = 20  # the mean speed is over this many steps


class Report:
    """Reports the progress of a run: use `with Report(...) as report:`, and one call for each event.

    It writes RUN/metrics.jsonl and RUN/samples.jsonl, and what recipe.monitor.tensorboard and .wandb ask for. On
    standard error it shows a progress bar on a terminal, else a line now and then. It never writes to standard output.

    Args:
      plan: the plan of the run.
      run_dir: the run's folder, which must exist.
      first_step: optimizer steps done before; entries of later steps are removed from the files.
      clock: returns a time in seconds; only differences are used.

    Raises:
      ValueError: a complete line of a file is not a JSON object with a step.
    """

    def __init__(
        self, plan: Plan, run_dir: str | os.PathLike, first_step: int = 0, clock: Callable[[], float] = time.monotonic
    ):
        self._folder, self._first_step, self._clock = Path(run_dir), first_step, clock
        self._recipe, self._n_steps = plan.recipe, plan.recipe.steps
        self._mfu = functools.partial(
            mfu, config=plan.config, n_tokens=plan.n_tokens, devices=list(plan.mesh.devices.flat)
        )
        self._started: tuple[int, float] | None = None  # the first step of this process, and when it ended
        self._recent: collections.deque[tuple[int, float]] = collections.deque(maxlen=RECENT)  # (tokens, seconds)
        self._shown: dict[str, str] = {}
        self._last_line = -math.inf
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Report:
        with contextlib.ExitStack() as stack:  # closes what is open if the next file cannot be opened
            self._metrics, self._samples = (
                stack.enter_context(contextlib.closing(Records(self._folder / name, self._first_step)))
                for name in (METRICS, SAMPLES)
            )
            self._boards = [stack.enter_context(contextlib.closing(board)) for board in self._opened_boards()]
            self._bar = stack.enter_context(progress.bars("text", titled=False, room=ROOM, stay=True))
            self._bar.update("training", self._first_step, self._n_steps, "compiling the step")
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the bar, and close the files."""
        self._open.close()

    def step(self, step: int, metrics: Mapping[str, float], tokens: int, seconds: float) -> None:
        """Report an optimizer step.

        The first step of a process compiles. It has no speed, and does not count in the estimate of the time left.

        Args:
          step: its number, counted from 1.
          metrics: what train_step returned, including "loss".
          tokens: tokens that the step read, over all devices.
          seconds: how long the step took.
        """
        now = self._clock()
        speed = None if self._started is None else tokens / max(seconds, 1e-9)
        record = {"step": step, **metrics, "tokens": tokens, "seconds": seconds, "tokens_per_second": speed}
        used = None if speed is None else self._mfu(speed)
        self._metrics.write(record | {"mfu": used})
        self._plot(step, {f"train/{name}": value for name, value in metrics.items()})
        self._plot(step, {"speed/tokens_per_second": speed, "speed/mfu": used})
        if self._started is None:
            self._started = step, now
        else:
            self._recent.append((tokens, seconds))
        self._shown["loss"] = f"loss {float(metrics['loss']):.3f}" if metrics.get("n_tokens", 1) else "no target"
        self._shown |= self._speed() | {"left": f"{_duration(self._seconds_left(step, now))} left"}
        if self._bar.shown:
            columns = self._bar.width if self._bar.width < ROOM + progress.NARROWEST else ROOM
            self._bar.update("training", step, self._n_steps, self._fitting(self._place(step), columns))
        elif self._is_due(step, now):
            self._line(step, self._sentence())
            self._last_line = now

    def evaluation(
        self, step: int, loss: float, perplexity: float, best: bool, by_name: Mapping[str, float] | None = None
    ) -> None:
        """Report a validation loss in nats a token, whether it is the best so far, and those of named texts."""
        named = {f"val/{name}": one for name, one in (by_name or {}).items()}
        self._metrics.write({"step": step, "val_loss": loss, "perplexity": perplexity, "best": best} | named)
        self._plot(step, {"val/loss": loss, "val/perplexity": perplexity} | named)
        self._shown["val"] = f"val {loss:.3f}"
        said = f"validation loss {loss:.4f} nats a token, perplexity {perplexity:.2f}{', the best so far' * bool(best)}"
        self._line(step, said + "".join(f"; {name} {one:.4f}" for name, one in named.items()))

    def classification(self, step: int, loss: float, metrics: Mapping[str, Any], best: bool) -> None:
        """Report a classifier's validation loss in nats a text, and its `label_metrics`."""
        shown = {name: metrics[name] for name in ("accuracy", "macro_f1")}
        self._metrics.write({"step": step, "val_loss": loss, **shown, "by_label": metrics["by_label"], "best": best})
        self._plot(step, {"val/loss": loss} | {f"val/{name}": value for name, value in shown.items()})
        self._shown["val"] = f"val {loss:.3f}"
        said = f"validation loss {loss:.4f} nats a text, {summary(metrics)}"
        self._line(step, f"{said}{', the best so far' * bool(best)}")

    def sample(self, step: int, prompt: str, text: str, verbatim: float | None = None) -> None:
        """Report the text that a model wrote after a prompt, and the share of it that is in the training text."""
        self._samples.write({"step": step, "prompt": prompt, "text": text, "verbatim": verbatim})
        for board in self._boards:
            board.add_text(f"sample/{prompt or 'from nothing'}", text, step)
        self._line(step, f"a sample\n{_printable(prompt + text)}\n")

    def message(self, text: str) -> None:
        """Print a message, above the bar if there is one. If nobody reads standard error, the run goes on silently."""
        if self._bar.shown:
            self._bar.say(text)
            return
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)

    def _line(self, step: int, text: str) -> None:
        self.message(self._place(step) + text)

    def _place(self, step: int) -> str:
        return f"step {step:,}/{self._n_steps:,}: "

    def _sentence(self, left_out: Sequence[str] = ()) -> str:
        names = [name for name in ("loss", "val", "speed", "mfu", "left") if name in self._shown]
        return ", ".join(self._shown[name] for name in names if name not in left_out)

    def _fitting(self, place: str, columns: int) -> str:
        """Return the text beside the bar: without what matters less than the time left, if the terminal is narrow."""
        less = ("mfu", "speed", "val")
        texts = [place + self._sentence(less[:n]) for n in range(len(less) + 1)]
        return next((text for text in texts if len(text) <= columns), texts[-1])

    def _is_due(self, step: int, now: float) -> bool:
        """Return whether a step has a line if there is no terminal."""
        first_or_last = step - self._first_step <= FIRST_LINES or step == self._n_steps
        return first_or_last or now - self._last_line >= SECONDS_A_LINE

    def _speed(self) -> dict[str, str]:
        """Return the texts for the mean speed of the last steps; evaluations between them do not count."""
        if not self._recent:
            return {}
        tokens, seconds = map(sum, zip(*self._recent, strict=True))
        speed = tokens / max(seconds, 1e-9)
        used = self._mfu(speed)
        return {"speed": f"{_short(speed)} tokens/s", "mfu": "MFU n/a" if used is None else f"MFU {used:.1%}"}

    def _seconds_left(self, step: int, now: float) -> float | None:
        """Return the seconds left at the pace so far, which includes evaluations and saves."""
        if self._started is None or step <= self._started[0]:
            return None
        first, then = self._started
        return (now - then) / (step - first) * (self._n_steps - step)

    def _plot(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write numbers to the boards. Non-finite numbers are left out: they would only cause warnings."""
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                for board in self._boards:
                    board.add_scalar(name, float(value), step)

    def _opened_boards(self) -> Iterator[Board]:
        if self._recipe.monitor.tensorboard:
            yield TensorBoard(self._folder / "tensorboard", self._first_step)
        if project := self._recipe.monitor.wandb:
            yield Wandb(project, self._folder, to_dict(self._recipe))


class Silence(Report):
    """Reports nothing: the processes of a run except process 0."""

    def __enter__(self) -> Silence:
        return self

    def step(self, step: int, metrics: Mapping[str, float], tokens: int, seconds: float) -> None:
        """Do nothing."""

    def evaluation(
        self, step: int, loss: float, perplexity: float, best: bool, by_name: Mapping[str, float] | None = None
    ) -> None:
        """Do nothing."""

    def classification(self, step: int, loss: float, metrics: Mapping[str, Any], best: bool) -> None:
        """Do nothing."""

    def sample(self, step: int, prompt: str, text: str, verbatim: float | None = None) -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Do nothing."""


def _short(speed: float) -> str:
    """Return a number in about four characters: 812, 26.4k, 1.31M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if speed >= size:
            return f"{speed / size:.3g}{letter}"
    return f"{speed:.3g}"


def _duration(seconds: float | None) -> str:
    """Return seconds as 0:12:33, or 2d 03:04 for days."""
    if seconds is None:
        return "n/a"
    minutes, second = divmod(max(round(seconds), 0), 60)
    hours, minute = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}:{minute:02}:{second:02}"
    return f"{hours // 24}d {hours % 24:02}:{minute:02}"


def _printable(text: str) -> str:
    """Return text without characters that move a terminal's cursor or change its colors."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
