"""Text generation, and scoring: how likely a model finds given tokens.

This package has the settings of a call, the compiled programs and the loop that calls them, prompts from files, the
log-probabilities of given tokens, and the labels of a classifier. Evaluations are in `gpt2_jax.evaluate`. The model and
the choice of tokens are in `gpt2_jax.model` and `gpt2_jax.sampling`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpt2_jax import _lazy

if TYPE_CHECKING:
    from gpt2_jax.generation.answers import answer
    from gpt2_jax.generation.decoding import Completion, complete, generate, stream
    from gpt2_jax.generation.labelling import classify
    from gpt2_jax.generation.rows import Logprobs
    from gpt2_jax.generation.scoring import Score, score
    from gpt2_jax.generation.settings import Settings

__all__ = [
    "Completion",
    "Logprobs",
    "Score",
    "Settings",
    "answer",
    "classify",
    "complete",
    "generate",
    "score",
    "stream",
]

_MODULES = dict.fromkeys(__all__, "decoding") | {"Logprobs": "rows", "Settings": "settings"}
_MODULES |= {"answer": "answers", "Score": "scoring", "score": "scoring", "classify": "labelling"}

__getattr__, __dir__ = _lazy.attach(__name__, _MODULES)
