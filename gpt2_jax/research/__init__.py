"""Look inside GPT-2 and change it: activations, edits of a pass, edits of weights, and what researchers ask of them."""

from gpt2_jax.activations import AXES, activation_names
from gpt2_jax.edits import Edit, add, patch, replace, scale
from gpt2_jax.research.forward import forward

__all__ = ["AXES", "Edit", "activation_names", "add", "forward", "patch", "replace", "scale"]
