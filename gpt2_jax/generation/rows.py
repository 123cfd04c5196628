"""One row of `generate`, `stream` and `complete`: its new tokens, its text, its stop and its log-probabilities."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.non_finite import NoLogits
from gpt2_jax.generation.programs import Picked, nothing_captured
from gpt2_jax.generation.settings import Settings
from gpt2_jax.generation.text import RowText
from gpt2_jax.sampling import NO_LOGITS
from gpt2_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Logprobs:
    """Log-probabilities (base e) of one row's n new tokens under the model itself: temperature 1, no filters.

    Attributes:
      chosen: float32 [n], those of the chosen tokens.
      top_ids: int32 [n, k], the k most likely tokens, most likely first.
      top: float32 [n, k], those of `top_ids`.
    """

    chosen: np.ndarray
    top_ids: np.ndarray
    top: np.ndarray


class Row:
    """The tokens picked so far for one row, cut at its stop."""

    def __init__(
        self,
        name: str,
        prompt: np.ndarray,
        settings: Settings,
        tokenizer: Tokenizer | None,
        wants_text: bool = False,
        capture: tuple[str, ...] = (),
    ):
        self.name, self.prompt, self.stop_ids = name, prompt, set(settings.stop_ids)
        needs_text = wants_text or bool(settings.stop_strings)
        self.text = RowText(tokenizer, settings.stop_strings) if tokenizer is not None and needs_text else None
        self.all_ids: list[int] = []
        self.picked: list[Picked] = []  # the same with log-probabilities and activations, if requested
        self.capture = capture
        self.pieces: list[str] = []  # pieces of text that were not returned yet
        self.stop: int | str | None = None
        self.n_top = settings.logprobs

    @property
    def stopped(self) -> bool:
        """Whether the row has ended at a stop."""
        return self.stop is not None

    @property
    def ids(self) -> list[int]:
        """The new ids, up to a stop."""
        return self.all_ids if self.text is None else self.text.ids

    def take(self, picked: Picked) -> bool:
        """Add what the next steps picked. Return whether the row has ended."""
        ids = picked.id_BR.tolist()
        n = next((i for i, token in enumerate(ids) if token in self.stop_ids or token == NO_LOGITS), len(ids))
        if n < len(ids) and ids[n] == NO_LOGITS:
            step = len(self.all_ids) + n
            raise NoLogits(f"{self.name}: the logits are NaN or infinite at new token {step}")
        if self.n_top is not None or self.capture:
            self.picked.append(jax.tree.map(lambda array_R: array_R[:n], picked))
        self.all_ids += ids[:n]
        if self.text is not None:
            self.pieces.append(self.text.add(ids[:n]))
        if self.text is not None and self.text.stopped:
            self.stop = self.text.stop
        elif n < len(ids):
            self.stop = ids[n]
        return self.stopped

    def new_text(self, last: bool = False) -> str:
        """Return the text since the last call. With `last`, also return the text that was held back."""
        pieces, self.pieces = self.pieces, []
        return "".join(pieces) + (self.text.end() if last and self.text is not None else "")

    def logprobs(self) -> Logprobs:
        """Return the log-probabilities of `ids`."""
        if not self.picked:  # none were requested
            none = np.zeros((0, self.n_top or 0), np.float32)
            return Logprobs(none.sum(-1), none.astype(np.int32), none)
        picked = self._all_picked()
        return Logprobs(picked.chosen_BR, picked.top_id_BRK, picked.top_BRK)

    def activations(self, config: GPT2Config) -> dict[str, np.ndarray]:
        """Return {name: [n, ...]}, the captured activations of the tokens that the n `ids` were predicted from."""
        if not self.picked:  # no new tokens
            return {name: array_1R[0, :0] for name, array_1R in nothing_captured(config, (1, 1), self.capture).items()}
        return {name: self._all_picked().captured[name] for name in self.capture}

    def _all_picked(self) -> Any:
        n = len(self.ids)
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:n], *self.picked)
