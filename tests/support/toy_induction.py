"""A two-layer model, its weights written by hand, in which it is known what each head does.

| layer | head | it looks at | it adds to the stream |
|---|---|---|---|
| 0 | 1, PREVIOUS | the token before; the first token at itself | which token that is |
| 1 | 2, INDUCTION | the token behind an earlier one equal to this one; the first if there is none | what comes next |

All other heads have weights of zero: they look at all tokens alike and add nothing. The MLPs add nothing. So the model
predicts, for a token that came before (once), the token that followed it then: "b" after "a b c a", and for a token
that is new that same token again.

The stream has one number for each token, one for each place, and one for each token again, as what stood before. They
are 0 or SCALE, two or three of them not 0 in every token, so that LayerNorm is one multiplication and one addition,
the same for all tokens; g and b make what it gives 0 or 1.
"""

import jax
import jax.numpy as jnp
import numpy as np

import gpt2_jax

PREVIOUS = (0, 1)
INDUCTION = (1, 2)
SCALE = 4.0
SHARP = 30.0  # the score of what a head looks for; what it does not look for has half of that at most


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
    q[place[1:], np.arange(n_ctx - 1)] = SHARP  # of place p: column p - 1
    q[place[0], 0] = SHARP
    k[place, np.arange(n_ctx)] = np.sqrt(width)
    v[token, token] = 1
    out[token, before] = SCALE

    q, k, v, out = _head(config, params, *INDUCTION)
    q[token, token] = SHARP
    k[before, token] = np.sqrt(width)
    k[token, token] = -np.sqrt(width)  # the first token, at which "before" is the token itself, is no match
    k[place[0]] = np.sqrt(width) / 2  # but better than nothing
    v[token, token], v[before, token] = 1, -1  # the token and not the one before it; nothing of the first
    out[token, token] = SCALE
    return config, jax.tree.map(jnp.asarray, params)


def _ones_of(n_hot, n_embd):
    """The LayerNorm that makes ones of the `n_hot` numbers that are SCALE, and leaves the others 0."""
    mean = n_hot / n_embd
    deviation = np.sqrt(SCALE**2 * mean * (1 - mean) + 1e-5) / SCALE
    return {"g": np.full(n_embd, deviation, np.float32), "b": np.full(n_embd, mean, np.float32)}


def _head(config, params, layer, head):
    """Views of a head's weights: q, k, v [D, H], out [H, D]."""
    attn, columns = params[f"h{layer}"]["attn"], slice(head * config.head_dim, (head + 1) * config.head_dim)
    qkv = [attn["c_attn"]["w"][:, i * config.n_embd :][:, columns] for i in range(3)]
    return *qkv, attn["c_proj"]["w"][columns]
