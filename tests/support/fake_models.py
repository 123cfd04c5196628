"""Models for tests of generation: one that generates given ids, and one that counts its forward passes.

Tests with the same config, number of rows and N_SAID new tokens share the compiled programs. Only compilation is slow.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt2_jax

# With the embedded vocabulary, and wide enough for `speaker` to distinguish its 1,281 tokens.
TEXT_CONFIG = gpt2_jax.GPT2Config(n_vocab=1281, n_ctx=127, n_embd=64, n_head=2, n_layer=1)


N_SAID = 100


def speaker(ids):
    """Params for TEXT_CONFIG that generate these ids: after a prompt of P tokens, ids[P - 1], ids[P], ... and then eot.

    The layers add nothing. The position embedding is larger than the token embedding, and points at the next id. The
    final gain makes the probability of every other token almost 0, so sampled rows are the same.
    """
    rng = np.random.default_rng(17)
    code_VD = rng.standard_normal((TEXT_CONFIG.n_vocab, TEXT_CONFIG.n_embd)).astype(np.float32)
    code_VD -= code_VD.mean(-1, keepdims=True)  # otherwise the final norm would change it
    code_VD /= np.linalg.norm(code_VD, axis=-1, keepdims=True)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), gpt2_jax.abstract_params(TEXT_CONFIG))
    params["wte"] = jnp.asarray(code_VD)
    said = [*ids, *[TEXT_CONFIG.n_vocab - 1] * TEXT_CONFIG.n_ctx][: TEXT_CONFIG.n_ctx]
    params["wpe"] = jnp.asarray(1000 * code_VD[np.array(said)])
    params["ln_f"]["g"] = jnp.full(TEXT_CONFIG.n_embd, 10.0)
    return params


RUNS = []


class CountingGPT2(gpt2_jax.GPT2):
    """The model. It records the shape [B, T] of every call of `hidden`, also inside a compiled loop."""

    def hidden(self, tokens_BT, *args, **kwargs):
        shape = tokens_BT.shape
        jax.debug.callback(lambda: RUNS.append(shape))
        return super().hidden(tokens_BT, *args, **kwargs)


@pytest.fixture
def decode_steps(monkeypatch):
    """Count the steps of generate and stream. Calling the fixture returns the decode steps since its last call."""
    monkeypatch.setattr("gpt2_jax.generation.devices.GPT2", CountingGPT2)
    RUNS.clear()

    def steps_since():
        jax.effects_barrier()
        n_steps = sum(n_tokens == 1 for _, n_tokens in RUNS)
        RUNS.clear()
        return n_steps

    return steps_since
