"""Models that are small enough to sample thousands of times, and depend on every token in their context."""

import jax
import jax.numpy as jnp
import numpy as np

import gpt2_jax

CONFIG = gpt2_jax.GPT2Config(n_vocab=37, n_ctx=41, n_embd=12, n_head=3, n_layer=2)


def random_params(config, seed: int, scale: float = 0.6):
    """Large random weights: the next token depends strongly on every earlier token and on their order."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape_dtype):
        values = rng.normal(0, scale, shape_dtype.shape)
        return jnp.asarray({"g": 1 + values / 4, "b": values / 4}.get(path[-1].key, values), shape_dtype.dtype)

    return jax.tree_util.tree_map_with_path(leaf, gpt2_jax.abstract_params(config))


def chosen_logits(logits):
    """A model that always gives exactly these logits. The final norm's gain is 0, and its bias selects wte[:, 0]."""
    config = gpt2_jax.GPT2Config(n_vocab=len(logits), n_ctx=7, n_embd=2, n_head=1, n_layer=1)
    params = random_params(config, 3)
    params["ln_f"] = {"g": jnp.zeros(2), "b": jnp.array([1.0, 0.0])}
    params["wte"] = params["wte"].at[:, 0].set(jnp.array(logits, jnp.float32))
    return config, params
