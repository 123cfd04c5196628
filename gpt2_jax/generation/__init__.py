"""Tokens and text out of a model, and how likely it finds them.

Here belong the settings of a call, the compiled programs and the loop that calls them, prompts from files, and the
log-probabilities of given tokens. What is concluded from those (`gpt2_jax.evaluate`) and how the model computes them
(`gpt2_jax.model`, `gpt2_jax.sampling`) do not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gpt2_jax.generation.settings import Settings

if TYPE_CHECKING:
    from gpt2_jax.generation.decoding import Completion, Logprobs, complete, generate, stream
    from gpt2_jax.generation.scoring import Score, score

__all__ = ["Completion", "Logprobs", "Score", "Settings", "complete", "generate", "score", "stream"]


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: `Settings` alone needs no JAX."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{'scoring' if name.lower() == 'score' else 'decoding'}")
    globals()[name] = getattr(module, name)
    return globals()[name]
