"""Gradients with respect to every activation, and edits of what a branch reads, equal TransformerLens's by hooks."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import numpy_activations as naive
import pytest
from bridge import bridge_of, hook_of, values_and_gradients
from forward import some_tokens

import gpt2_jax
from gpt2_jax import research

pytestmark = pytest.mark.parity

ODD = gpt2_jax.GPT2Config(n_vocab=53, n_ctx=23, n_embd=21, n_head=3, n_layer=3)
# Relative to the largest value. Measured over all names, for values, gradients and the logits of edits:
# float32 1.9e-6, float64 3.1e-15.
BOUNDS = {"float32": 1e-5, "float64": 1e-13}
EVERY = [".", *(f"{name}$" for name in research.BRANCHES)]


@pytest.fixture(scope="module", params=BOUNDS)
def pair(request):
    """Return our config and params with random biases, their bridge, tokens and the bound."""
    dtype = request.param
    with jax.enable_x64(dtype == "float64"):
        config = ODD.replace(param_dtype=dtype, compute_dtype=dtype)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), naive.weights(ODD))
        bridge = bridge_of(config, params).requires_grad_(True)
        bridge.set_use_attn_result(True)
        bridge.set_use_hook_mlp_in(True)
        yield config, params, bridge, some_tokens(config, 2, 11), BOUNDS[dtype]


@pytest.fixture(scope="module")
def ours(pair):
    """Return every activation, and the loss's gradient with respect to it: one edit for each, in one program."""
    config, params, _, tokens_BT, _ = pair

    def loss(pushes):
        edits = [research.add(name, push) for name, push in pushes.items()]
        out, seen = research.forward(config, params, tokens_BT, capture=EVERY, edits=edits)
        logprobs_BTV = jax.nn.log_softmax(out.logits[:, :-1])
        return jnp.take_along_axis(logprobs_BTV, tokens_BT[:, 1:, None], -1).sum(), seen

    shapes = jax.eval_shape(lambda: research.forward(config, params, tokens_BT, capture=EVERY)[1])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    grads, seen = jax.grad(loss, has_aux=True)(zeros)
    return seen, grads


def theirs(bridge, tokens_BT, names):
    """Return the activations and gradients that hooks see."""
    import torch

    tokens = torch.tensor(tokens_BT).long()

    def loss(logits):
        return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).sum()

    found = values_and_gradients(bridge, tokens, names, loss)
    return [{name: x.numpy() for name, x in values.items()} for values in found]


@contextlib.contextmanager
def computing(bridge, branches):
    """Let the bridge compute the inputs of heads: attn/in, or the other three."""
    switch = bridge.set_use_attn_in if "attn/in" in branches else bridge.set_use_split_qkv_input
    switch(True)
    yield
    switch(False)


def assert_same(ours, theirs, bound, but=()):
    (our_values, our_grads), (values, grads) = ours, theirs
    for name in values:
        last = name.split("/")[-1]
        hidden = np.broadcast_to(
            ~np.tri(11, dtype=bool) if last in ("scores", "pattern") else False, values[name].shape
        )
        value = np.where(hidden & (last == "scores"), -1e10, values[name])
        assert naive.error(our_values[name], value) < bound, name
        # Ours masks a pattern again behind its edit, so a hidden entry has no effect. Theirs has one.
        if last not in but:
            assert np.abs(grads[name][~hidden]).max() > 0.01, name
            assert naive.error(our_grads[name], np.where(hidden, 0, grads[name])) < bound, name


def test_gradients_of_all_activations(pair, ours):
    _, _, bridge, tokens_BT, bound = pair
    names = naive.names(ODD.n_layer)
    values, grads = theirs(bridge, tokens_BT, [*names, *(f"h{i}/mlp/in" for i in range(3))])
    assert_same(ours, (values, grads), bound, but=["resid_mid"])
    for i in range(3):  # Their hook_resid_mid is ln2's input: it sees the gradient of the MLP's branch alone.
        through_mlp, around_it = grads[f"h{i}/mlp/in"], grads[f"h{i}/resid_post"]
        assert naive.error(grads[f"h{i}/resid_mid"], through_mlp) < bound
        assert naive.error(ours[1][f"h{i}/resid_mid"], through_mlp + around_it) < bound


@pytest.mark.parametrize("branches", [["attn/in", "attn/result", "mlp/in"], ["attn/q_in", "attn/k_in", "attn/v_in"]])
def test_gradients_of_what_branches_read_and_heads_write(pair, ours, branches):
    """One program of ours has all of them at once. Theirs computes attn/in only without the other three."""
    _, _, bridge, tokens_BT, bound = pair
    with computing(bridge, branches):
        names = [f"h{i}/{name}" for i in range(3) for name in branches]
        assert_same(ours, theirs(bridge, tokens_BT, names), bound)


VALUE_D = np.random.default_rng(5).normal(0, 1, ODD.n_embd)
BRANCHES = {
    "attn/in": [research.add("h1/attn/in", VALUE_D, positions=slice(2, 9), heads=[0, 2])],
    "the others": [
        research.scale("h1/attn/q_in", -2.0, heads=1),
        research.add("h2/attn/k_in", VALUE_D, positions=[3, 4]),
        research.scale("h0/attn/v_in", 0.0, heads=[2], positions=-1),
        research.scale("h1/attn/result", 0.0, heads=0),
        research.replace("h2/mlp/in", VALUE_D, positions=5),
    ],
}


def add(x_BTND, hook):
    x_BTND[:, 2:9, [0, 2]] += x_BTND.new_tensor(VALUE_D)


def scale(x_BTND, hook):
    x_BTND[:, :, 1] *= -2


def add_to_some(x_BTND, hook):
    x_BTND[:, [3, 4]] += x_BTND.new_tensor(VALUE_D)


def silence_last(x_BTND, hook):
    x_BTND[:, -1, 2] = 0


def silence(x_BTND, hook):
    x_BTND[:, :, 0] = 0


def put(x_BTD, hook):
    x_BTD[:, 5] = x_BTD.new_tensor(VALUE_D)


def of_a_copy(function):
    """A hook that changes a copy. A change in place of hook_mlp_in would change the stream around the MLP too."""

    def hook(x, hook):
        x = x.clone()
        function(x, hook)
        return x

    return hook


FUNCTIONS = {"attn/in": [add], "the others": [scale, add_to_some, silence_last, silence, put]}


@pytest.mark.parametrize("kind", BRANCHES)
def test_edits_of_what_branches_read_and_heads_write(pair, kind):
    """All in one pass, and each in a pass of its own."""
    import torch

    config, params, bridge, tokens_BT, bound = pair
    edits, tokens = BRANCHES[kind], torch.tensor(tokens_BT).long()
    hooks = [(hook_of(edit.name), of_a_copy(f)) for edit, f in zip(edits, FUNCTIONS[kind], strict=True)]
    with computing(bridge, kind), torch.no_grad():
        plain = bridge(tokens).numpy()
        for chosen in [range(len(edits)), *([i] for i in range(len(edits)))]:
            expected = bridge.run_with_hooks(tokens, fwd_hooks=[hooks[i] for i in chosen]).numpy()
            out, _ = research.forward(config, params, tokens_BT, edits=[edits[i] for i in chosen])
            assert naive.error(expected, plain) > 1e-3
            assert naive.error(out.logits, expected) < bound, chosen
