from gpt2_jax.generation.decoding import Completion, Logprobs, complete, generate, stream
from gpt2_jax.generation.scoring import Score, score
from gpt2_jax.generation.settings import Settings

__all__ = ["Completion", "Logprobs", "Score", "Settings", "complete", "generate", "score", "stream"]
