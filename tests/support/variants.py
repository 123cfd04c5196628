"""Models whose arithmetic differs from OpenAI's GPT-2, one difference at a time and all together."""

import jax.numpy as jnp
import numpy as np
import numpy_reference
from forward import CONFIG

CASES = {
    "gelu": {"activation_function": "gelu"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "inverse layer": {"scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True},
    "untied": {"tie_word_embeddings": False},
    "all": {
        "activation_function": "gelu",
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "tie_word_embeddings": False,
    },
}
SAME = ("upcast",)  # this field changes no number


def model(name, **changes):
    """Return the config and the params of a case, float32. The weights that all cases have are the same."""
    config = CONFIG.replace(**CASES[name], **changes)
    params = numpy_reference.random_params(config, np.random.default_rng(23))
    return config, {key: _arrays(branch, config.param_dtype) for key, branch in params.items()}


def _arrays(tree, dtype):
    return {k: _arrays(v, dtype) for k, v in tree.items()} if isinstance(tree, dict) else jnp.asarray(tree, dtype)


def expected(config, params, tokens_BT, mask_BT=None):
    """Return the logits [B, T, V] in NumPy float64."""
    return numpy_reference.forward(
        params,
        tokens_BT,
        config.n_head,
        mask_BT,
        gelu=numpy_reference.ACTIVATIONS[config.activation_function],
        inverse_layer=config.scale_attn_by_inverse_layer_idx,
    )
