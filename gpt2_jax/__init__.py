"""GPT-2 in JAX: the params pytree is OpenAI's checkpoint, and everything else is a pure function over it."""

from gpt2_jax.config import SIZES, GPT2Config
from gpt2_jax.model import GPT2, abstract_params, init_params
