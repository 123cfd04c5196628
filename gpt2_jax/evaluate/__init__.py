"""How good a model is: perplexity, last words (LAMBADA), and cloze questions. Each result states its convention.

This package has measures that others report too, readers for the files to measure on, and an adapter for
lm-evaluation-harness. Log-probabilities are in `gpt2_jax.generation`, and analyses of a model's activations in
`gpt2_jax.research`.
"""

from gpt2_jax.evaluate._cloze import Cloze, Question, cloze
from gpt2_jax.evaluate._lambada import STOP_WORDS, Lambada, lambada
from gpt2_jax.evaluate._perplexity import Perplexity, perplexity
from gpt2_jax.evaluate.continuations import score_continuations
from gpt2_jax.evaluate.detokenizers import DETOKENIZERS

__all__ = [
    "DETOKENIZERS",
    "STOP_WORDS",
    "Cloze",
    "Lambada",
    "Perplexity",
    "Question",
    "cloze",
    "lambada",
    "perplexity",
    "score_continuations",
]
