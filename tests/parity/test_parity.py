"""Comparison with Hugging Face torch: ops, layers, logits and gradients, in float32 and float64.

In float64 the two differ only by rounding in the sixteenth digit, so any larger difference is a bug. In float32 the
bounds show how much float32 rounding the real program has.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from bridge import by_torch_name, torch_model

import gpt2_jax
from gpt2_jax.activations import NO_TAPS
from gpt2_jax.model import MLP, Attention, Block, Conv1D, LayerNorm

pytestmark = pytest.mark.parity

# Measured: one op 6.9e-7 and 1.9e-15, layers and logits 8.2e-7 and 2.1e-15, gradients 1.6e-6 and 2.9e-15.
BOUNDS = {"float32": 4e-6, "float64": 1e-13}
ODD = {"n_vocab": 53, "n_ctx": 23, "n_embd": 21, "n_head": 3, "n_layer": 3}


class Pair(NamedTuple):
    """The same weights twice: `params` for ours, `hf` a GPT2LMHeadModel in torch."""

    config: gpt2_jax.GPT2Config
    params: dict[str, Any]
    hf: Any
    torch: Any
    tokens_BT: np.ndarray
    bound: float

    def tensor(self, array):
        return self.torch.tensor(np.asarray(array))

    def check(self, ours, theirs):
        """Compare with a torch tensor; the bound is relative to the largest absolute value."""
        ours, theirs = np.asarray(ours), theirs.detach().numpy()
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= self.bound * np.abs(theirs).max()

    def stream(self, *shape):
        """A random array in the pair's dtype."""
        return np.random.default_rng(17).standard_normal(shape).astype(self.config.param_dtype)

    def masks(self, length):
        """Return the causal mask for each side: ours [1, T, S], theirs [1, 1, T, S], which is added to the scores."""
        mask_BTS = np.tri(length, dtype=bool)[None]
        theirs = np.where(mask_BTS[:, None], 0.0, -1e10).astype(self.config.param_dtype)
        return jnp.asarray(mask_BTS), self.tensor(theirs)


@pytest.fixture(scope="module")
def torch():
    """Return torch, or skip: both packages come with the `parity` extra."""
    reason = "needs the `parity` extra: pip install -e '.[parity]'"
    pytest.importorskip("transformers", reason=reason)
    return pytest.importorskip("torch", reason=reason)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture(params=["odd", "embedded"])
def pair(request, dtype, torch, shakespeare, reference):
    """Return random weights at odd sizes and the trained weights, each in both dtypes."""
    if request.param == "embedded":
        shape, weights = shakespeare
        tokens_BT = reference["tokens"]
        sizes = {name: getattr(shape, name) for name in ODD}
    else:
        sizes, rng = ODD, np.random.default_rng(19)
        weights = numpy_reference.random_params(gpt2_jax.GPT2Config(**ODD), rng)
        tokens_BT = rng.integers(0, ODD["n_vocab"], (3, 17), dtype=np.int32)
    config = gpt2_jax.GPT2Config(**sizes, param_dtype=dtype, compute_dtype=dtype)
    weights = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), dtype), weights)
    return Pair(config, weights, torch_model(config, weights).requires_grad_(True), torch, tokens_BT, BOUNDS[dtype])


# --- op by op --------------------------------------------------------------------------------------------------------


def test_layer_norm(pair):
    x_BTD = 3 * pair.stream(2, 7, pair.config.n_embd) + 1
    for ours, theirs in (
        (pair.params["h0"]["ln_2"], pair.hf.transformer.h[0].ln_2),
        (pair.params["ln_f"], pair.hf.transformer.ln_f),
    ):
        pair.check(LayerNorm(pair.config).apply({"params": ours}, x_BTD), theirs(pair.tensor(x_BTD)))


def test_layer_norm_where_epsilon_rules(pair):
    """At a variance near epsilon, an epsilon of 1e-6 instead of 1e-5 would double the result."""
    x_BTD = 1e-3 * pair.stream(2, 7, pair.config.n_embd)
    ours = LayerNorm(pair.config).apply({"params": pair.params["ln_f"]}, x_BTD)
    pair.check(ours, pair.hf.transformer.ln_f(pair.tensor(x_BTD)))


@pytest.mark.parametrize("part", ["attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj"])
def test_conv1d(pair, part):
    """Orientation and bias are right, also for the square attn/c_proj."""
    module, name = part.split("/")
    ours = pair.params["h0"][module][name]
    x_BTD = pair.stream(2, 7, ours["w"].shape[0])
    theirs = getattr(getattr(pair.hf.transformer.h[0], module), name)
    y_BTF = Conv1D(pair.config, ours["w"].shape[1]).apply({"params": ours}, x_BTD)
    pair.check(y_BTF, theirs(pair.tensor(x_BTD)))


def test_gelu_new(pair):
    """Only the activation function: the MLP's dense layers are identities."""
    width = pair.config.n_embd
    eye_DF = np.eye(width, 4 * width, dtype=pair.config.param_dtype)
    params = {
        "c_fc": {"w": jnp.asarray(eye_DF), "b": jnp.zeros(4 * width, eye_DF.dtype)},
        "c_proj": {"w": jnp.asarray(eye_DF.T), "b": jnp.zeros(width, eye_DF.dtype)},
    }
    x_BTD = 2 * pair.stream(2, 7, width)
    theirs = pair.hf.transformer.h[0].mlp.act(pair.tensor(x_BTD))
    pair.check(MLP(pair.config).apply({"params": params}, x_BTD), theirs)


def test_attention(pair):
    x_BTD = pair.stream(2, 7, pair.config.n_embd)
    ours_mask, theirs_mask = pair.masks(7)
    rest = (None, 0, None, True, NO_TAPS)  # kv, start, past, deterministic, taps
    ours, _ = Attention(pair.config).apply({"params": pair.params["h0"]["attn"]}, x_BTD, ours_mask, *rest)
    theirs = pair.hf.transformer.h[0].attn(pair.tensor(x_BTD), attention_mask=theirs_mask)
    pair.check(ours, theirs[0])


def test_mlp(pair):
    x_BTD = pair.stream(2, 7, pair.config.n_embd)
    ours = MLP(pair.config).apply({"params": pair.params["h0"]["mlp"]}, x_BTD)
    pair.check(ours, pair.hf.transformer.h[0].mlp(pair.tensor(x_BTD)))


def test_block(pair):
    x_BTD = pair.stream(2, 7, pair.config.n_embd)
    ours_mask, theirs_mask = pair.masks(7)
    ours, _ = Block(pair.config).apply({"params": pair.params["h1"]}, x_BTD, ours_mask)
    theirs = pair.hf.transformer.h[1](pair.tensor(x_BTD), attention_mask=theirs_mask)
    pair.check(ours, theirs[0] if isinstance(theirs, tuple) else theirs)


# --- the whole model -------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _intermediates(config, params, tokens_BT):
    _, state = gpt2_jax.GPT2(config).apply(
        {"params": params},
        tokens_BT,
        capture_intermediates=lambda module, _: isinstance(module, Block | LayerNorm),
        mutable=["intermediates"],
    )
    return state["intermediates"]


def test_layer_by_layer(pair):
    """The residual stream after each block, and after the final norm."""
    captured = _intermediates(pair.config, pair.params, pair.tokens_BT)
    ours = [captured[f"h{layer}"]["__call__"][0][0] for layer in range(pair.config.n_layer - 1)]
    ours.append(captured["ln_f"]["__call__"][0])
    theirs = pair.hf(pair.tensor(pair.tokens_BT).long(), output_hidden_states=True).hidden_states
    for ours_BTD, theirs_BTD in zip(ours, theirs[1:], strict=True):  # theirs has ln_f's output for the last block
        pair.check(ours_BTD, theirs_BTD)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens_BT, mask_BT=None):
    return gpt2_jax.GPT2(config).apply({"params": params}, tokens_BT, mask_BT=mask_BT).logits


def test_logits(pair):
    theirs = pair.hf(pair.tensor(pair.tokens_BT).long()).logits
    pair.check(_logits(pair.config, pair.params, pair.tokens_BT), theirs)


def test_left_padded_logits(pair):
    """Their usual call for a ragged batch: an attention mask, and positions counted from it."""
    batch, length = pair.tokens_BT.shape
    mask_BT = np.arange(length) >= 5 * np.arange(batch)[:, None]
    mask = pair.tensor(mask_BT).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    theirs = pair.hf(pair.tensor(pair.tokens_BT).long(), attention_mask=mask, position_ids=positions).logits
    ours = _logits(pair.config, pair.params, pair.tokens_BT, jnp.asarray(mask_BT))
    pair.check(ours[mask_BT], theirs[mask.bool()])


def test_gradients_of_every_parameter(pair):
    """The mean cross-entropy of the next token, differentiated by every parameter, compared by name."""
    tokens_BT = pair.tensor(pair.tokens_BT).long()
    logits = pair.hf(tokens_BT).logits
    their_loss = pair.torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
    their_loss.backward()

    @jax.jit
    def loss(params):
        log_p_BTV = jax.nn.log_softmax(_logits(pair.config, params, pair.tokens_BT[:, :-1]))
        return -jnp.take_along_axis(log_p_BTV, pair.tokens_BT[:, 1:, None], axis=-1).mean()

    our_loss, gradient = jax.value_and_grad(loss)(pair.params)
    pair.check(our_loss, their_loss)
    ours, theirs = by_torch_name(gradient), dict(pair.hf.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert parameter.grad.abs().max() > 0, name
        pair.check(ours[name], parameter.grad)
