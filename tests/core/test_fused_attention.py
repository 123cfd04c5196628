"""Fused kernels equal plain attention: splash attention in Pallas' interpreter, cuDNN's by JAX's own computation of it."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from strength import campaign

import gpt2_jax
from gpt2_jax import fused_attention, sharding
from gpt2_jax.attention import causal_attention
from gpt2_jax.fused_attention import Padding, cudnn, kernels, splash
from gpt2_jax.params import flatten

KERNELS = {
    "splash": functools.partial(splash, interpret=True),
    "cudnn": functools.partial(cudnn, implementation="xla"),
}
TPU = types.SimpleNamespace(platform="tpu", device_kind="TPU v5p")
H200 = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
ONE = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
CONFIG = gpt2_jax.GPT2Config(n_vocab=37, n_ctx=256, n_embd=128, n_head=2, n_layer=2, compute_dtype="bfloat16")
LENGTHS = campaign([130, 384], [130, 200, 384, 640, 1024])


def arrays(n_tokens, dtype, padded, n_rows=2):
    """Queries, keys, values and weights of 2 heads of 64; the padding, None for none, and which tokens are real."""
    *keys, key = jax.random.split(jax.random.key(n_tokens), 5)
    arrays = [jax.random.normal(key, (n_rows, n_tokens, 2, 64), jnp.float32).astype(dtype) for key in keys]
    real_BT, padding = jnp.ones((n_rows, n_tokens), bool), None
    if padded == "anywhere":
        real_BT = jax.random.bernoulli(key, 0.8, real_BT.shape).at[0, :3].set(False)
        padding = Padding(real_BT)
    elif padded == "right":
        length_B = jnp.array([n_tokens - 7, 0][:n_rows], jnp.int32)  # a row may be empty
        real_BT = jnp.arange(n_tokens) < length_B[:, None]
        padding = Padding(real_BT, length_B)
    return arrays, padding, real_BT


def plain(q_BTNH, k_BTNH, v_BTNH, real_BT, divisor):
    mask_BTS = jnp.tril(jnp.ones((q_BTNH.shape[1],) * 2, bool)) & real_BT[:, None]
    return causal_attention(
        q_BTNH, k_BTNH.transpose(0, 2, 3, 1), v_BTNH.transpose(0, 2, 1, 3), mask_BTS, divisor=divisor
    )


def with_gradients(form, qkv, weights_BTNH, real_BT):
    """Return z at real tokens, and the gradients of its weighted sum, in float32."""

    def z(*qkv):
        return form(*qkv).astype(jnp.float32)

    def loss(*qkv):
        return jnp.where(real_BT[..., None, None], z(*qkv) * weights_BTNH.astype(jnp.float32), 0).sum()

    z_BTNH, gradients = jax.jit(lambda *qkv: (z(*qkv), jax.grad(loss, (0, 1, 2))(*qkv)))(*qkv)
    assert all(np.isfinite(np.asarray(array, np.float32)).all() for array in (z_BTNH, *gradients))
    z_BTNH = jnp.where(real_BT[..., None, None], z_BTNH, 0)
    return [np.asarray(array, np.float32) for array in (z_BTNH, *gradients)]


@pytest.mark.parametrize(
    ("kernel", "padded"),
    [("splash", None), ("splash", "anywhere"), ("splash", "right"), ("cudnn", None), ("cudnn", "right")],
)
@pytest.mark.parametrize("n_tokens", LENGTHS)
def test_a_kernel_equals_plain_attention(kernel, padded, n_tokens):
    """In float32. Splash attention by the same arithmetic as on a TPU, except for the precision of its products."""
    divisor = 3 if n_tokens == 130 else 1
    (*qkv, weights_BTNH), padding, real_BT = arrays(n_tokens, "float32", padded)
    form = functools.partial(KERNELS[kernel], padding=padding, divisor=divisor)
    ours = with_gradients(form, qkv, weights_BTNH, real_BT)
    theirs = with_gradients(functools.partial(plain, real_BT=real_BT, divisor=divisor), qkv, weights_BTNH, real_BT)
    np.testing.assert_allclose(ours[0], theirs[0], atol=2e-6, rtol=0)  # measured 5.4e-7
    for our, their in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_allclose(our, their, atol=2e-5, rtol=0)  # measured 4.3e-6


@pytest.mark.parametrize(("divisor", "bound"), [(1, 1.1), (3, 1.45)])  # measured 1.07 and 1.35, gradients of queries
@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_is_rounded_little_more_than_in_plain_attention(kernel, divisor, bound):
    """Root-mean-square distance to float32, relative to plain attention's. A divisor of 3 rounds splash's queries."""
    (*qkv, weights_BTNH), padding, real_BT = arrays(200, "bfloat16", "right", n_rows=1)
    reference = functools.partial(plain, real_BT=real_BT, divisor=divisor)
    forms = functools.partial(KERNELS[kernel], padding=padding, divisor=divisor), reference
    exact = with_gradients(reference, [array.astype(jnp.float32) for array in qkv], weights_BTNH, real_BT)
    ours, theirs = (with_gradients(form, qkv, weights_BTNH, real_BT) for form in forms)
    for our, their, right in zip(ours, theirs, exact, strict=True):
        assert np.sqrt(np.square(our - right).mean() / np.square(their - right).mean()) < bound


def test_a_batched_kernel_is_the_kernel_row_by_row():
    """Edits are batched with `vmap`, and then the padding is not."""
    (q, k, v, _), padding, _ = arrays(130, "float32", "anywhere", n_rows=1)
    q_EBTNH = jnp.stack([q, 2 * q, -q])
    batched = jax.jit(jax.vmap(lambda q: KERNELS["splash"](q, k, v, padding)))(q_EBTNH)
    for q_BTNH, z_BTNH in zip(q_EBTNH, batched, strict=True):
        np.testing.assert_array_equal(z_BTNH, KERNELS["splash"](q_BTNH, k, v, padding))


# ---- which kernel


def has(monkeypatch, *devices):
    """Let this process and every mesh have these devices. Kernels of TPUs run in the interpreter."""
    kinds = [[device for device in devices if device is kind] for kind in (TPU, H200)]
    monkeypatch.setattr(fused_attention, "_accelerators", lambda mesh: [found for found in kinds if found])
    for name, kernel in KERNELS.items():
        monkeypatch.setattr(fused_attention, name, kernel)


def padding_of(right):
    real_BT = np.ones((1, 128), bool)
    return Padding(real_BT, real_BT.sum(-1) if right else None)


@pytest.mark.parametrize(
    ("devices", "mesh", "expected"),
    [
        ([], None, ()),
        ([TPU], None, ("tpu",)),
        ([H200], None, ("cuda",)),
        ([TPU, H200], None, ("tpu", "cuda")),
        ([TPU, TPU], None, ()),
        ([H200, H200, TPU], None, ("tpu",)),
        ([TPU, TPU], ONE, ("tpu",)),
        ([H200, H200], ONE, ("cuda",)),
    ],
)
def test_auto_takes_the_kernels_of_the_devices(monkeypatch, devices, mesh, expected):
    has(monkeypatch, *devices)
    assert kernels(CONFIG, mesh, 128, None) == expected
    assert kernels(CONFIG.replace(attention="plain"), mesh, 128, None) == ()
    assert kernels(CONFIG.replace(attention="fused"), mesh, 127, None) == ()


IMPOSSIBLE = [
    ([], {}, {}, "a CPU has no fused kernel"),
    ([TPU], {}, {"opened": True}, "a fused kernel does not store the scores and the pattern that a tap reads or changes"),
    ([TPU], {}, {"dropped": True}, "a fused kernel has no dropout on attention weights: set attn_pdrop, in a recipe "
        "model.dropout, to 0"),
    ([H200], {}, {"tapped": True}, "on a GPU, a fused kernel does not work with taps"),
    ([H200], {}, {"padding": padding_of(right=False)}, "on a GPU, a fused kernel takes no mask: leave it out if all tokens "
        "are real"),
    ([H200], {"compute_dtype": "float32"}, {}, "the kernel of NVIDIA H200 takes a compute_dtype of bfloat16 or float16, "
        "not float32"),
    ([H200], {"n_head": 32}, {}, "the kernel of NVIDIA H200 takes a head width of a multiple of 8 up to 128, not 4"),
    ([TPU], {"compute_dtype": "float16"}, {}, "the kernel of TPU v5p takes a compute_dtype of bfloat16 or float32, not "
        "float16"),
    ([TPU, TPU], {}, {}, "this process has 2 devices: say on which the model runs, GPT2(config, mesh=mesh)"),
]  # fmt: skip


@pytest.mark.parametrize(("devices", "fields", "call", "why"), IMPOSSIBLE)
def test_fused_says_why_it_is_impossible_and_auto_is_plain(monkeypatch, devices, fields, call, why):
    has(monkeypatch, *devices)
    config, call = CONFIG.replace(**fields), {"mesh": None, "n_tokens": 128, "padding": None} | call
    assert kernels(config, **call) == ()
    with pytest.raises(ValueError, match="impossible") as error:
        kernels(config.replace(attention="fused"), **call)
    assert str(error.value) == f'attention="fused" is impossible here: {why}'


def test_other_devices_have_no_kernel(monkeypatch):
    for kind, capability in [("Tesla V100", "7.0"), ("AMD Instinct MI300X", "gfx942"), ("Arc", None)]:
        device = types.SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
        monkeypatch.setattr(fused_attention, "_accelerators", lambda mesh, device=device: [[device]])
        with pytest.raises(ValueError, match=f"{kind} has no fused kernel"):
            kernels(CONFIG.replace(attention="fused"), None, 128, None)


def test_what_serves_padding_and_taps(monkeypatch):
    has(monkeypatch, TPU, H200)
    assert kernels(CONFIG, None, 128, padding_of(right=True)) == ("tpu", "cuda")
    assert kernels(CONFIG, None, 128, padding_of(right=False)) == ("tpu",)
    assert kernels(CONFIG, None, 128, None, tapped=True) == ("tpu",)
    assert kernels(CONFIG.replace(compute_dtype="float16"), None, 128, None) == ("cuda",)
    assert kernels(CONFIG.replace(compute_dtype="float32"), None, 128, None) == ()
    assert kernels(CONFIG.replace(compute_dtype="float32", attention="fused"), None, 128, None) == ("tpu",)


def test_splash_attention_does_not_compile_under_some_switches(monkeypatch):
    has(monkeypatch, TPU)
    for switch in (jax.enable_x64(True), jax.default_matmul_precision("highest")):
        with switch:
            assert kernels(CONFIG, None, 128, None) == ()
    with jax.default_matmul_precision("highest"):  # in float32 it means something, and compiles
        assert kernels(CONFIG.replace(compute_dtype="float32", attention="fused"), None, 128, None) == ("tpu",)


# ---- the whole model


def model_of(attention, mesh=None, **fields):
    config = CONFIG.replace(attention=attention, compute_dtype="float32", attn_pdrop=0.0, **fields)
    return config, gpt2_jax.GPT2(config, mesh=mesh)


@pytest.mark.parametrize("masked", [False, True])
def test_a_model_has_the_same_logits_and_gradients(monkeypatch, masked):
    has(monkeypatch, TPU)
    config = model_of("plain", scale_attn_by_inverse_layer_idx=True)[0]
    params = jax.tree.map(lambda leaf: 5 * leaf, gpt2_jax.init_params(config, jax.random.key(3)))
    tokens_BT = jax.random.randint(jax.random.key(4), (2, 140), 0, 37)
    mask_BT = jnp.ones((2, 140), bool).at[0, 120:].set(False).at[1, :9].set(False) if masked else None
    found = {}
    for attention in ("plain", "fused"):
        model = model_of(attention, ONE, scale_attn_by_inverse_layer_idx=True)[1]

        def loss(params, model=model):
            logits_BTV = model.apply({"params": params}, tokens_BT, mask_BT).logits
            logits_BTV = logits_BTV if mask_BT is None else jnp.where(mask_BT[..., None], logits_BTV, 0)
            return jax.nn.log_softmax(logits_BTV)[..., 3].mean(), logits_BTV

        (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        found[attention] = {"logits": logits, **flatten(gradients)}
    assert np.abs(found["plain"]["logits"]).max() > 1
    for name, array in found["plain"].items():
        scale = max(float(jnp.abs(array).max()), 1e-6)
        far = float(jnp.abs(found["fused"][name] - array).max()) / scale
        print(name, far)
        assert far < 1e-4, name
