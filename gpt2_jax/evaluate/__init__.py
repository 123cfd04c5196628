"""How good a model is: perplexity, last words (LAMBADA), cloze questions, and responses to instructions.

Each result states its convention.

This package has measures that others report too, readers for the files to measure on, and an adapter for
lm-evaluation-harness. Log-probabilities are in `gpt2_jax.generation`, and analyses of a model's activations in
`gpt2_jax.research`.
"""

from gpt2_jax.evaluate._cloze import Cloze, Question, cloze
from gpt2_jax.evaluate._lambada import STOP_WORDS, Lambada, lambada
from gpt2_jax.evaluate._perplexity import Perplexity, perplexity
from gpt2_jax.evaluate._responses import Responses, judged, responses, rouge_l
from gpt2_jax.evaluate.continuations import score_continuations
from gpt2_jax.evaluate.detokenizers import DETOKENIZERS
from gpt2_jax.evaluate.judge import Judge

__all__ = [
    "DETOKENIZERS",
    "STOP_WORDS",
    "Cloze",
    "Judge",
    "Lambada",
    "Perplexity",
    "Question",
    "Responses",
    "cloze",
    "judged",
    "lambada",
    "perplexity",
    "responses",
    "rouge_l",
    "score_continuations",
]
