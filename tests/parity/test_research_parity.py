"""Every activation, and edits of some, equal those of TransformerLens on the same unprocessed weights.

Its bridge wraps Hugging Face's torch modules. Compatibility mode is off here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_activations as naive
import pytest
from bridge import as_torch, bridge_of, hook_of
from forward import some_tokens

import gpt2_jax
from gpt2_jax import research

pytestmark = pytest.mark.parity

ODD = gpt2_jax.GPT2Config(n_vocab=53, n_ctx=23, n_embd=21, n_head=3, n_layer=3)
# Relative to the largest value; measured, over all names: 9.3e-7, 7.7e-7, 1.4e-15.
BOUNDS = {"embedded": 1e-5, "odd": 5e-6, "float64": 1e-13}


@pytest.fixture(scope="module", params=["embedded", "odd", "float64"])
def pair(request, shakespeare):
    """Return our config and params, their bridge, tokens and the bound, for trained and for odd random weights."""
    with jax.enable_x64(request.param == "float64"):
        config, params = shakespeare
        if request.param != "embedded":
            dtype = "float64" if request.param == "float64" else "float32"
            config = ODD.replace(param_dtype=dtype, compute_dtype=dtype)
            params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), naive.weights(ODD))
        tokens_BT = some_tokens(config, 3, 23 if config.n_ctx == 23 else 71)
        yield config, params, bridge_of(config, params), tokens_BT, BOUNDS[request.param]


def test_every_activation_is_its_tensor_of_the_same_meaning(pair):
    config, params, bridge, tokens_BT, bound = pair
    logits_BTV, theirs = bridge.run_with_cache(as_torch(tokens_BT).long())
    out, ours = research.forward(config, params, tokens_BT, capture=".")
    assert not bridge.compatibility_mode
    for name in naive.names(config.n_layer):
        tensor = theirs[hook_of(name)].numpy()
        if name.endswith("scores"):
            # Masked scores are the dtype's smallest number or -inf in theirs, and the original's -1e10 in ours.
            hidden = np.broadcast_to(~np.tri(tokens_BT.shape[1], dtype=bool), tensor.shape)
            assert (tensor[hidden] < -1e30).all()
            tensor = np.where(hidden, -1e10, tensor)
        assert naive.error(ours[name], tensor) < bound, name
    assert naive.error(out.logits, logits_BTV.numpy()) < bound


def test_edits_are_what_its_hooks_do(pair):
    """In one pass of both: scale a head, add to a stream, replace neurons and a pattern, each at some positions."""
    config, params, bridge, tokens_BT, bound = pair
    rng, length = np.random.default_rng(5), tokens_BT.shape[1]
    value_D, value_F = rng.normal(0, 1, config.n_embd), rng.normal(0, 1, 4 * config.n_embd)
    pattern_S = rng.dirichlet(np.ones(length))
    edits = [
        research.add("h0/resid_pre", value_D, positions=[2, 7]),
        research.scale("h0/attn/z", -0.5, positions=slice(5, 19), heads=1),
        research.replace("h1/attn/pattern", pattern_S, positions=11, heads=[0, 2]),
        research.replace("h1/mlp/post", value_F, positions=3),
    ]

    def add(x_BTD, hook):
        x_BTD[:, [2, 7]] += as_torch(value_D)
        return x_BTD

    def scale(z_BTNH, hook):
        z_BTNH[:, 5:19, 1] *= -0.5
        return z_BTNH

    def put_in_pattern(pattern_BNTS, hook):
        pattern_BNTS[:, [0, 2], 11, :12] = as_torch(pattern_S[:12]).to(
            pattern_BNTS.dtype
        )  # no edit of ours shows later tokens
        return pattern_BNTS

    def put_in_post(post_BTF, hook):
        post_BTF[:, 3] = as_torch(value_F).to(post_BTF.dtype)
        return post_BTF

    names = ["h0/resid_pre", "h0/attn/z", "h1/attn/pattern", "h1/mlp/post"]
    hooks = list(zip(map(hook_of, names), [add, scale, put_in_pattern, put_in_post], strict=True))
    theirs = bridge.run_with_hooks(as_torch(tokens_BT).long(), fwd_hooks=hooks).numpy()
    out, _ = research.forward(config, params, tokens_BT, edits=edits)
    plain, _ = research.forward(config, params, tokens_BT)
    assert naive.error(out.logits, theirs) < bound
    assert naive.error(plain.logits, theirs) > 0.01
