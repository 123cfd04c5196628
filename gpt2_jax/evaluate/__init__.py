"""How good a model is: perplexity of text, last words (LAMBADA), blanks to fill, each by a convention it states.

Here belong measures that others report too, the files they are computed on, and lm-evaluation-harness on our models.
The log-probabilities themselves (`gpt2_jax.generation`) and questions about the inside of a model
(`gpt2_jax.research`) do not.
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
