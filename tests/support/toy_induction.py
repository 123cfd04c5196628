"""A two-layer model with hand-written weights. The function of each head is known.

| layer | head | attends to | adds to the residual stream |
|---|---|---|---|
| 0 | 1, PREVIOUS | the previous token; the first token: itself | which token that is |
| 1 | 2, INDUCTION | the token after an earlier equal token; the first token if there is none | what comes next |

All other heads have zero weights: they attend to all tokens equally and add nothing. The MLPs add nothing. For a token
that occurred once before, the model predicts the token that followed it: "b" after "a b c a". For a new token, it
predicts the same token again.

The residual stream has one number for each token, one for each place, and one for each token as the previous token.
They are 0 or SCALE, and two or three of them are not 0 at every place. So LayerNorm is one multiplication and one
addition, the same for all tokens. g and b make its results 0 or 1.
"""

import jax
import jax.numpy as jnp
import numpy as np

import gpt2_jax

PREVIOUS = (0, 1)
INDUCTION = (1, 2)
SCALE = 4.0
SHARP = 30.0  # the score of a match; other scores are at most half of it


def induction_toy(n_vocab=19, n_ctx=17):
    """Return (config, params) of the model above: 2 layers of 3 heads, float32, JAX arrays."""
    width = max(n_vocab, n_ctx)
    config = gpt2_jax.GPT2Config(n_vocab=n_vocab, n_ctx=n_ctx, n_embd=3 * width, n_head=3, n_layer=2)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), gpt2_jax.abstract_params(config))
    token, place = np.arange(n_vocab), n_vocab + np.arange(n_ctx)
    before = n_vocab + n_ctx + token
    params["wte"][token, token] = SCALE
    params["wpe"][np.arange(n_ctx), place] = SCALE
    params["ln_f"]["g"][:] = 1
    for layer, n_hot in enumerate([2, 3]):
        params[f"h{layer}"]["ln_1"] = _ones_of(n_hot, config.n_embd)

    q, k, v, out = _head(config, params, *PREVIOUS)
    q[place[1:], np.arange(n_ctx - 1)] = SHARP  # place p looks for place p - 1
    q[place[0], 0] = SHARP
    k[place, np.arange(n_ctx)] = np.sqrt(width)
    v[token, token] = 1
    out[token, before] = SCALE

    q, k, v, out = _head(config, params, *INDUCTION)
    q[token, token] = SHARP
    k[before, token] = np.sqrt(width)
    k[token, token] = -np.sqrt(width)  # the first token, whose previous token is itself, must not match
    k[place[0]] = np.sqrt(width) / 2  # but it must win if nothing matches
    v[token, token], v[before, token] = 1, -1  # the token minus its previous token; 0 for the first
    out[token, token] = SCALE
    return config, jax.tree.map(jnp.asarray, params)


def _ones_of(n_hot, n_embd):
    """The LayerNorm that turns the `n_hot` numbers equal to SCALE into 1, and the others into 0."""
    mean = n_hot / n_embd
    deviation = np.sqrt(SCALE**2 * mean * (1 - mean) + 1e-5) / SCALE
    return {"g": np.full(n_embd, deviation, np.float32), "b": np.full(n_embd, mean, np.float32)}


def _head(config, params, layer, head):
    """Views of a head's weights: q, k, v [D, H], out [H, D]."""
    attn, columns = params[f"h{layer}"]["attn"], slice(head * config.head_dim, (head + 1) * config.head_dim)
    qkv = [attn["c_attn"]["w"][:, i * config.n_embd :][:, columns] for i in range(3)]
    return *qkv, attn["c_proj"]["w"][columns]
