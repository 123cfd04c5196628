"""Tokens and text out of a model, and how likely it finds them.

Here belong the settings of a call, the compiled programs and the loop that calls them, prompts from files, and the
log-probabilities of given tokens. What is concluded from those (`gpt2_jax.evaluate`) and how the model computes them
(`gpt2_jax.model`, `gpt2_jax.sampling`) do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpt2_jax import _lazy

if TYPE_CHECKING:
    from gpt2_jax.generation.decoding import Completion, Logprobs, complete, generate, stream
    from gpt2_jax.generation.scoring import Score, score
    from gpt2_jax.generation.settings import Settings

__all__ = ["Completion", "Logprobs", "Score", "Settings", "complete", "generate", "score", "stream"]

_MODULES = dict.fromkeys(__all__, "decoding") | {"Score": "scoring", "Settings": "settings", "score": "scoring"}

__getattr__, __dir__ = _lazy.attach(__name__, _MODULES)
