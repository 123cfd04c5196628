"""Fused kernels equal plain attention: splash attention in Pallas' interpreter, cuDNN's call by XLA."""

import functools
import types
from pathlib import Path

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from strength import campaign

import gpt2_jax
from gpt2_jax import fused_attention, model, sharding
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


@pytest.mark.parametrize("n_tokens", LENGTHS)
def test_splash_attention_keeps_texts_of_a_row_apart(n_tokens):
    """Packed rows: segments of odd sizes, and padding at the end."""
    (*qkv, weights_BTNH), _, _ = arrays(n_tokens, "float32", None)
    sizes = [[1, 41, n_tokens - 59], [n_tokens - 31, 13, 18]]
    segment_BT = jnp.array([np.repeat([1, 2, 3, 0], [*row, n_tokens - sum(row)]) for row in sizes], jnp.int32)
    real_BT, same_BTS = segment_BT > 0, segment_BT[:, :, None] == segment_BT[:, None]

    def by_mask(q_BTNH, k_BTNH, v_BTNH):
        mask_BTS = jnp.tril(jnp.ones((n_tokens,) * 2, bool)) & same_BTS
        return causal_attention(q_BTNH, k_BTNH.transpose(0, 2, 3, 1), v_BTNH.transpose(0, 2, 1, 3), mask_BTS, divisor=1)

    form = functools.partial(KERNELS["splash"], padding=Padding(real_BT, None, segment_BT))
    ours = with_gradients(form, qkv, weights_BTNH, real_BT)
    theirs = with_gradients(by_mask, qkv, weights_BTNH, real_BT)
    np.testing.assert_allclose(ours[0], theirs[0], atol=2e-6, rtol=0)  # measured 4.5e-7
    for our, their in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_allclose(our, their, atol=2e-5, rtol=0)  # measured 9.6e-7


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


def test_cudnn_computes_every_query_and_no_row_without_keys(monkeypatch):
    """The values of neither would be defined."""
    seen = {}
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **how: seen.update(how) or q)
    (*qkv, _), padding, _ = arrays(130, "bfloat16", "right")
    cudnn(*qkv, padding, divisor=3)
    assert seen["key_value_seq_lengths"].tolist() == [123, 1]
    assert "query_seq_lengths" not in seen
    assert (seen["is_causal"], seen["implementation"], seen["scale"]) == (True, "cudnn", pytest.approx(1 / 24))


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


NO_SCORES = "a fused kernel does not store the scores and the pattern that a tap reads or changes"
NO_DROPOUT = "a fused kernel has no dropout on attention weights: set attn_pdrop, in a recipe model.dropout, to 0"
NO_MASK = "on a GPU, a fused kernel takes no mask: leave it out if all tokens are real"
NO_MESH = "this process has 2 devices: say on which the model runs, GPT2(config, mesh=mesh)"
OF_H200, OF_V5P = "the kernel of NVIDIA H200 takes a", "the kernel of TPU v5p takes a"
IMPOSSIBLE = [
    ([], {}, {}, "a CPU has no fused kernel"),
    ([TPU], {}, {"opened": True}, NO_SCORES),
    ([TPU], {}, {"dropped": True}, NO_DROPOUT),
    ([H200], {}, {"tapped": True}, "on a GPU, a fused kernel does not work with taps"),
    ([H200], {}, {"padding": padding_of(right=False)}, NO_MASK),
    ([H200], {"compute_dtype": "float32"}, {}, f"{OF_H200} compute_dtype of bfloat16 or float16, not float32"),
    ([H200], {"n_head": 32}, {}, f"{OF_H200} head width of a multiple of 8 up to 128, not 4"),
    ([TPU], {"compute_dtype": "float16"}, {}, f"{OF_V5P} compute_dtype of bfloat16 or float32, not float16"),
    ([TPU, TPU], {}, {}, NO_MESH),
]


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


@pytest.mark.parametrize("masked", [False, True])
def test_a_model_has_the_same_logits_and_gradients(monkeypatch, masked):
    has(monkeypatch, TPU)
    fields = {"compute_dtype": "float32", "scale_attn_by_inverse_layer_idx": True}
    config = CONFIG.replace(attention="plain", **fields)
    params = jax.tree.map(lambda leaf: 5 * leaf, gpt2_jax.init_params(config, jax.random.key(3)))
    tokens_BT = jax.random.randint(jax.random.key(4), (2, 140), 0, 37)
    real_BT = jnp.ones((2, 140), bool).at[0, 120:].set(not masked).at[1, :9].set(not masked)

    def outcome(attention):
        gpt2 = gpt2_jax.GPT2(config.replace(attention=attention), mesh=ONE)

        def loss(params):
            logits_BTV = gpt2.apply({"params": params}, tokens_BT, real_BT if masked else None).logits
            logits_BTV = jnp.where(real_BT[..., None], logits_BTV, 0)
            return jax.nn.log_softmax(logits_BTV)[..., 3].mean(), logits_BTV

        (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return {"logits": logits, **flatten(gradients)}

    ours, theirs = outcome("fused"), outcome("plain")
    assert np.abs(theirs["logits"]).max() > 1
    assert (ours["logits"] != theirs["logits"]).any()  # a kernel was taken
    for name, array in theirs.items():
        np.testing.assert_allclose(
            ours[name], array, atol=3e-5 * np.abs(array).max(), rtol=0, err_msg=name
        )  # measured 5.5e-6 of the largest


def test_right_padding_on_a_gpu(monkeypatch):
    """The hidden states of real tokens, and the new cache."""
    has(monkeypatch, H200)
    config = CONFIG.replace(n_vocab=31)
    params = gpt2_jax.init_params(config, jax.random.key(3))
    tokens_BT, mask_BT = jnp.arange(2 * 140).reshape(2, 140) % 31, jnp.arange(140) < jnp.array([[140], [90]])
    found = {}
    for attention in ("plain", "fused"):
        gpt2 = gpt2_jax.GPT2(config.replace(attention=attention), mesh=ONE)
        cache = gpt2_jax.init_cache(config, 2, 140)
        h_BTD, cache = gpt2.apply({"params": params}, tokens_BT, mask_BT, cache, right_padded=True, method="hidden")
        found[attention] = [jnp.where(mask_BT[..., None], h_BTD, 0), *cache.k_BNHS[:1], cache.mask_BS, cache.length]
    for ours, theirs in zip(found["fused"], found["plain"], strict=True):
        ours, theirs = (np.asarray(array, np.float32) for array in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=0.04, rtol=0)  # measured 0.016: a bfloat16's last bit near 3


def test_prefill_and_score_promise_right_padding(monkeypatch):
    """They take the kernel of a GPU, and where params are on a CPU plain attention all the same."""
    config = CONFIG.replace(n_vocab=29)
    params = gpt2_jax.init_params(config, jax.random.key(3))
    prompts = [np.arange(n_tokens) % 29 for n_tokens in (150, 131)]
    expected = gpt2_jax.generate(config, params, prompts, 3, temperature=0), gpt2_jax.score(config, params, prompts)
    has(monkeypatch, H200)
    taken = []
    monkeypatch.setattr(model, "kernels", lambda *args: taken.append(kernels(*args)) or taken[-1])
    jax.clear_caches()
    ids = gpt2_jax.generate(config, params, prompts, 3, temperature=0)
    assert set(taken) == {("cuda",)}
    scores = gpt2_jax.score(config, params, prompts)
    assert set(taken) == {("cuda",)}
    assert len(taken) == 2 * config.n_layer
    jax.clear_caches()
    np.testing.assert_array_equal(ids, expected[0])
    for ours, theirs in zip(scores, expected[1], strict=True):
        np.testing.assert_array_equal(ours.logprobs, theirs.logprobs)


def test_a_model_on_a_cpu_is_the_same_program():
    variables = {"params": gpt2_jax.init_params(CONFIG, jax.random.key(0))}
    tokens_BT, mask_BT = jnp.zeros((2, 140), jnp.int32), jnp.ones((2, 140), bool)
    programs = set()
    for attention, mesh in (("plain", None), ("auto", None), ("auto", ONE)):
        gpt2 = gpt2_jax.GPT2(CONFIG.replace(attention=attention), mesh=mesh)
        programs |= {str(jax.make_jaxpr(gpt2.apply)(variables, tokens_BT, mask)) for mask in (None, mask_BT)}
    assert len(programs) == 2  # with and without a mask
    with pytest.raises(ValueError, match="impossible here: a CPU has no fused kernel"):
        gpt2_jax.GPT2(CONFIG.replace(attention="fused")).apply(variables, tokens_BT)


def test_taps_and_dropout_in_a_model(monkeypatch):
    has(monkeypatch, TPU)
    gpt2 = gpt2_jax.GPT2(CONFIG.replace(attention="fused"), mesh=ONE)
    variables, tokens_BT = {"params": gpt2_jax.init_params(CONFIG, jax.random.key(0))}, jnp.zeros((1, 128), jnp.int32)

    def same(value, position_BT):
        return value

    gpt2.apply(variables, tokens_BT, taps={"h1/attn/z": same})
    with pytest.raises(ValueError, match="scores and the pattern"):
        gpt2.apply(variables, tokens_BT, taps={"h1/attn/pattern": same})
    with pytest.raises(ValueError, match="no dropout on attention weights"):
        gpt2.apply(variables, tokens_BT, None, None, False, rngs={"dropout": jax.random.key(1)})
    gpt2_jax.GPT2(CONFIG.replace(attention="fused", attn_pdrop=0), mesh=ONE).apply(
        variables, tokens_BT, None, None, False, rngs={"dropout": jax.random.key(1)}
    )


# ---- several devices

EIGHT = """
    import functools, json, sys
    sys.path.insert(0, sys.argv[1])
    import jax, jax.numpy as jnp, numpy as np
    import gpt2_jax
    import test_fused_attention as here
    from gpt2_jax import fused_attention
    from gpt2_jax.sharding import make_mesh

    found = {}
    for name, kernel in here.KERNELS.items():
        (*qkv, weights_BTNH), padding, real_BT = here.arrays(130, "float32", "right")
        setattr(fused_attention, name, kernel)
        platform = {"splash": "tpu", "cudnn": "cuda"}[name]
        for sizes in [(2, 2), (1, 8), (8, 1)]:
            def divided(*qkv):
                return fused_attention.fused_attention(*qkv, None, padding, 1, (platform,), make_mesh(*sizes))
            one = here.with_gradients(functools.partial(kernel, padding=padding), qkv, weights_BTNH, real_BT)
            all = here.with_gradients(divided, qkv, weights_BTNH, real_BT)
            found[f"{name} {sizes}"] = max(float(abs(a - b).max()) for a, b in zip(one, all))
    print(json.dumps(found))
"""


def test_a_mesh_divides_rows_and_heads():
    for case, far in commands.on_eight_devices(EIGHT, Path(__file__).parent).items():
        assert far < 1e-6, case  # measured 0


def test_the_mesh_axes_are_those_of_sharding():
    """They are defined once, in `sharding`, whose `array_sharding` divides rows and heads."""
    assert not {"DATA", "MODEL"} & vars(fused_attention).keys()
    assert fused_attention.array_sharding is sharding.array_sharding
