"""Edits inside programs: an edit that changes nothing changes no bit, and edits work under vmap and grad."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_activations as naive
import pytest
from forward import relative_error, some_tokens
from numpy_activations import CONFIG, has_heads

import gpt2_jax
from gpt2_jax import research

NAMES = naive.names(CONFIG.n_layer)
KINDS = {"replace": research.replace, "add": research.add, "scale": research.scale}
BOUND = 5e-6  # of float32, relative to the largest value; measured: 6.4e-7
NOWHERE = 9999
LENGTH = 7
TOKENS = some_tokens(CONFIG, 3, LENGTH)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, naive.weights())


# --- edits that change nothing ---------------------------------------------------------------------------------------

ODD_HEADS = CONFIG.replace(n_layer=1)  # 5 wide: the root that divides scores is not a power of 2
EVEN_HEADS = ODD_HEADS.replace(n_embd=12)  # 4 wide: it is a power of 2, as at every released size
LONG_TEXT = EVEN_HEADS.replace(n_ctx=509)
BFLOAT16 = EVEN_HEADS.replace(compute_dtype="bfloat16")
NO_OPS = {
    "add": lambda name, seen: research.add(name, 0.0),
    "scale": lambda name, seen: research.scale(name, 1.0),
    "patch": lambda name, seen: research.patch(name, seen),
    "nowhere": lambda name, seen: research.replace(name, 7.0, positions=[]),
}


@functools.cache
def unedited(config, length):
    """Return params, tokens, the plain model's logits, and all activations."""
    params = jax.tree.map(jnp.asarray, naive.weights(config))
    tokens_BT = some_tokens(config, 2, length, seed=7)
    # Params are arguments: XLA computes products of constants at compile time, by a routine that may round differently.
    logits_BTV = jax.jit(lambda *args: gpt2_jax.GPT2(config).apply(*args).logits)({"params": params}, tokens_BT)
    return params, tokens_BT, np.asarray(logits_BTV), research.forward(config, params, tokens_BT, capture=".")[1]


def assert_no_bit_changes(config, length, how, names):
    params, tokens_BT, logits_BTV, seen = unedited(config, length)
    out, _ = research.forward(config, params, tokens_BT, edits=[NO_OPS[how](name, seen) for name in names])
    assert np.asarray(out.logits).tobytes() == logits_BTV.tobytes()


@pytest.mark.parametrize("how", ["add", "patch"])
def test_changing_nothing_anywhere_changes_no_bit(how):
    assert_no_bit_changes(EVEN_HEADS, 211, how, naive.names(1))


@pytest.mark.parametrize("length", [7, 211])
def test_changing_nothing_of_branches_changes_no_bit(length):
    """Products of each head's own input may round otherwise. They are added only where the input changes."""
    params, tokens_BT, logits_BTV, _ = unedited(EVEN_HEADS, length)
    for names in [*([name] for name in research.BRANCHES), research.BRANCHES]:
        edits = [research.add(name, 0.0) for name in names]
        out, _ = research.forward(EVEN_HEADS, params, tokens_BT, edits=edits)
        assert np.asarray(out.logits).tobytes() == logits_BTV.tobytes(), names


@pytest.mark.parametrize("name", ["h0/attn/q", "h0/attn/pattern", "h0/resid_mid", "ln_f/scale"])
def test_changing_nothing_changes_no_bit_where_scores_are_rounded_twice(name):
    """Only attn/scores may change: XLA fuses them with the softmax if nothing reads them."""
    assert_no_bit_changes(ODD_HEADS, 7, "add", [name])


@pytest.mark.parametrize("name", ["h0/attn/scores", "h0/attn/pattern"])
@pytest.mark.parametrize("how", NO_OPS)
def test_opening_attention_changes_no_bit(name, how):
    assert_no_bit_changes(EVEN_HEADS, 7, how, [name])


@pytest.mark.parametrize("i", range(8))
def test_changing_nothing_of_some_activations_changes_no_bit(i):
    """Three activations at a time, far apart, with each kind of edit in turn."""
    assert_no_bit_changes(EVEN_HEADS, 7, [*NO_OPS][i % 4], naive.names(1)[i::8])


@pytest.mark.parametrize(
    ("name", "how"),
    [("h0/attn/scores", "scale"), ("h0/attn/scores", "patch"), ("h0/attn/pattern", "add"),
     ("h0/attn/z", "nowhere"), ("h0/ln_1/scale", "patch")],
)  # fmt: skip
def test_changing_nothing_of_a_long_text_changes_no_bit(name, how):
    """Attention runs in four blocks here, which are long enough for sums in another order to round differently."""
    assert_no_bit_changes(LONG_TEXT, LONG_TEXT.n_ctx, how, [name])


def test_changing_nothing_in_bfloat16_rounds_at_most():
    """XLA may keep float32 values where nothing reads them. An edit rounds them to the 8 bits of bfloat16."""
    params, tokens_BT, logits_BTV, _ = unedited(BFLOAT16, 7)
    edits = [research.add(name, 0.0) for name in naive.names(1)]
    out, _ = research.forward(BFLOAT16, params, tokens_BT, edits=edits)
    assert relative_error(np.asarray(out.logits), logits_BTV) < 2**-6  # measured: 0.004


# --- vmap and grad ---------------------------------------------------------------------------------------------------


def test_vmap_over_values_places_and_heads(params):
    """One call over a grid gives the same as a call for each edit."""
    values_KH = np.random.default_rng(5).normal(0, 1, (5, 5)).astype(np.float32)
    places_K, heads_K = np.array([0, 3, 3, 6, 1]), np.array([2, 0, 1, 1, 2])

    def run(value_H, place, head):
        edits = [research.replace("h0/attn/z", value_H, place, head), research.add("h1/resid_pre", value_H[0], place)]
        return research.forward(CONFIG, params, TOKENS, capture="h1/attn/out", edits=edits)

    outs, seen = jax.jit(jax.vmap(run))(values_KH, places_K, heads_K)
    assert seen["h1/attn/out"].shape == (5, 3, LENGTH, 15)
    for k, (value_H, place, head) in enumerate(zip(values_KH, places_K, heads_K, strict=True)):
        described = [
            naive.edit("replace", "h0/attn/z", value_H, [place], [head]),
            naive.edit("add", "h1/resid_pre", value_H[0], [place]),
        ]
        one = jax.tree.map(lambda leaf, k=k: leaf[k], (outs, seen))
        naive.assert_agrees(one, params, TOKENS, None, described, bound=BOUND)


def test_edits_are_data(params):
    """An edit is a pytree: it passes in and out of programs, and through vmap."""
    edits = [research.add("h0/resid_post", float(k), positions=k) for k in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack([*leaves]), *edits)
    assert isinstance(stacked, research.Edit)
    run = jax.vmap(lambda edit: research.forward(CONFIG, params, TOKENS, edits=edit)[0].logits)
    for k, logits_BTV in enumerate(jax.jit(run)(stacked)):
        expected_BTV, _ = naive.forward(CONFIG, params, TOKENS, None, [naive.edit("add", "h0/resid_post", k, [k])])
        assert relative_error(np.asarray(logits_BTV), expected_BTV) < BOUND


@pytest.fixture(scope="module")
def double():
    with jax.enable_x64(True):
        config = CONFIG.replace(param_dtype="float64", compute_dtype="float64")
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), naive.weights())
        weight_BTV = np.random.default_rng(9).normal(0, 1, (*TOKENS.shape, CONFIG.n_vocab))
        _, seen = research.forward(config, params, TOKENS, capture=".")
        yield config, params, weight_BTV, {name: np.asarray(value) for name, value in seen.items()}


def test_gradients_of_values_are_finite_differences(double):
    """For every activation, at some positions and heads, in float64: values that replace, are added, and multiply.

    A replaced activation gives no gradient to what is before it, so only one is replaced at a time.
    """
    config, params, weight_BTV, seen = double
    values = {f"add {name}": np.zeros(naive.shape_of(name, 3, LENGTH)[-1]) for name in NAMES}
    values |= {f"scale {name}": np.ones(naive.shape_of(name, 3, LENGTH)[-1]) for name in NAMES}
    values |= {f"replace {name}": seen[name] for name in NAMES}

    @jax.jit
    @jax.value_and_grad
    def loss(values, put_in):
        edits = []
        for key, value in values.items():
            kind, name = key.split()
            positions = put_in[name] if kind == "replace" else [1, 2, 4]
            edits.append(KINDS[kind](name, value, positions, [0, 2] if has_heads(name) else None))
        return (research.forward(config, params, TOKENS, edits=edits)[0].logits * weight_BTV).sum()

    nowhere, step, rng = dict.fromkeys(NAMES, NOWHERE), 1e-6, np.random.default_rng(2)
    for key, value in values.items():
        kind, name = key.split()
        put_in = nowhere | ({name: 3} if kind == "replace" else {})
        direction = rng.normal(0, 1, value.shape)
        gradient = loss(values, put_in)[1][key]
        up, down = (float(loss(values | {key: value + sign * step * direction}, put_in)[0]) for sign in (1, -1))
        slope = float((gradient * direction).sum())
        assert abs(slope) > 1e-3, key
        assert abs((up - down) / (2 * step) - slope) < 1e-6 * max(1, abs(slope)), key


def test_gradients_of_values_are_those_of_the_parameters_they_stand_for(double):
    """A vector that is added is a bias, one that multiplies is a gain, and one added to pos_embed is a row of wpe."""
    config, params, weight_BTV, _ = double
    one_D, zero_D = np.ones(15), np.zeros(15)
    values = {
        "h0/attn/out": zero_D, "h1/mlp/out": zero_D, "h0/ln_1/out": zero_D, "ln_f/out": zero_D,
        "h1/mlp/pre": np.zeros(60),
        "h1/attn/q": np.zeros((3, 5)), "h0/attn/v": np.zeros((3, 5)), "pos_embed": np.zeros((LENGTH, 15)),
        "h1/ln_2/normalized": one_D,
    }  # fmt: skip

    def loss(params, values):
        edits = [(research.scale if "normalized" in name else research.add)(name, v) for name, v in values.items()]
        return (research.forward(config, params, TOKENS, edits=edits)[0].logits * weight_BTV).sum()

    of_params, of = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, values)
    of_qkv = {name: of_params[name]["attn"]["c_attn"]["b"].reshape(3, 3, 5) for name in ("h0", "h1")}
    pairs = [
        (of["h0/attn/out"], of_params["h0"]["attn"]["c_proj"]["b"]),
        (of["h1/mlp/out"], of_params["h1"]["mlp"]["c_proj"]["b"]),
        (of["h1/mlp/pre"], of_params["h1"]["mlp"]["c_fc"]["b"]),
        (of["h0/ln_1/out"], of_params["h0"]["ln_1"]["b"]),
        (of["ln_f/out"], of_params["ln_f"]["b"]),
        (of["h1/attn/q"], of_qkv["h1"][0]),
        (of["h0/attn/v"], of_qkv["h0"][2]),
        (of["pos_embed"], of_params["wpe"][:LENGTH]),
        (of["h1/ln_2/normalized"], of_params["h1"]["ln_2"]["g"] * params["h1"]["ln_2"]["g"]),
    ]
    for ours, theirs in pairs:
        assert np.abs(theirs).max() > 0.1
        assert np.allclose(ours, theirs, rtol=1e-10, atol=1e-10)
