"""Models rigged for tests of generation: one that says a given text, and one that counts how often it is run.

Tests that share a config, a number of rows and N_SAID new tokens share what is compiled, which is all that takes time.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt2_jax

# Over the embedded vocabulary, and wide enough for `speaker` to tell its 1,281 tokens apart.
TEXT_CONFIG = gpt2_jax.GPT2Config(n_vocab=1281, n_ctx=127, n_embd=64, n_head=2, n_layer=1)


N_SAID = 100


def speaker(ids):
    """Params for TEXT_CONFIG that say these ids: after a prompt of P tokens come ids[P - 1], ids[P], ... and then eot.

    The layers add nothing, and a position's embedding outweighs its token's: it points at the id that is to come. The
    final gain makes every other token's probability next to nothing, so that sampled rows say the same.
    """
    rng = np.random.default_rng(17)
    code_VD = rng.standard_normal((TEXT_CONFIG.n_vocab, TEXT_CONFIG.n_embd)).astype(np.float32)
    code_VD -= code_VD.mean(-1, keepdims=True)  # or the final norm would change it
    code_VD /= np.linalg.norm(code_VD, axis=-1, keepdims=True)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), gpt2_jax.abstract_params(TEXT_CONFIG))
    params["wte"] = jnp.asarray(code_VD)
    said = [*ids, *[TEXT_CONFIG.n_vocab - 1] * TEXT_CONFIG.n_ctx][: TEXT_CONFIG.n_ctx]
    params["wpe"] = jnp.asarray(1000 * code_VD[np.array(said)])
    params["ln_f"]["g"] = jnp.full(TEXT_CONFIG.n_embd, 10.0)
    return params


RUNS = []


class CountingGPT2(gpt2_jax.GPT2):
    """The model, which notes the shape [B, T] of every run of `hidden`, also inside a compiled loop."""

    def hidden(self, tokens_BT, *args, **kwargs):
        shape = tokens_BT.shape
        jax.debug.callback(lambda: RUNS.append(shape))
        return super().hidden(tokens_BT, *args, **kwargs)


@pytest.fixture
def decode_steps(monkeypatch):
    """Make generate and stream count; calling the fixture gives the decode steps since it was last called."""
    monkeypatch.setattr("gpt2_jax.generation.decoding.GPT2", CountingGPT2)
    RUNS.clear()

    def steps_since():
        jax.effects_barrier()
        n_steps = sum(n_tokens == 1 for _, n_tokens in RUNS)
        RUNS.clear()
        return n_steps

    return steps_since
