"""What capturing costs: nothing without capture, and one tensor for one name."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpy_activations as naive
import pytest
from forward import some_tokens
from numpy_activations import CONFIG

import gpt2_jax
from gpt2_jax import research

LONG = CONFIG.n_ctx
TOKENS = some_tokens(CONFIG, 3, 7)
BOUND = 5e-6  # of float32, relative to the largest value; measured: 3.4e-7


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, naive.weights())


@functools.partial(jax.jit, static_argnums=0)
def plain(config, params, tokens_BT, mask_BT=None):
    return gpt2_jax.GPT2(config).apply({"params": params}, tokens_BT, mask_BT=mask_BT).logits


# --- cost ------------------------------------------------------------------------------------------------------------


def compiled(params, length, capture=None):
    """Compile a program of logits and captured activations. It is the plain model's if `capture` is None."""

    def run(params, tokens_BT):
        if capture is None:
            return gpt2_jax.GPT2(CONFIG).apply({"params": params}, tokens_BT).logits
        out, seen = research.forward(CONFIG, params, tokens_BT, capture=capture)
        return (out.logits, *seen.values()) if capture else out.logits

    return jax.jit(run).lower(params, jax.ShapeDtypeStruct((2, length), jnp.int32)).compile()


def operations(program):
    """Count the operations of a compiled program by name and result shape."""
    return collections.Counter(re.findall(r" = (\S+ [\w-]+)\(", program.as_text()))


@pytest.mark.parametrize("length", [7, LONG])
def test_capturing_nothing_costs_nothing(params, length):
    """The compiled program has the same operations, cost and memory as the plain model's."""
    ours, bare = compiled(params, length, capture=()), compiled(params, length)
    assert operations(ours) == operations(bare)
    assert ours.cost_analysis() == bare.cost_analysis()
    assert str(ours.memory_analysis()) == str(bare.memory_analysis())


@pytest.fixture(scope="module")
def bare(params):
    return compiled(params, LONG)


@pytest.mark.parametrize("name", ["h1/resid_mid", "h0/attn/z", "h0/ln_1/scale", "h0/mlp/post", "h0/attn/pattern"])
def test_capturing_one_adds_no_other_tensor(params, bare, name):
    """There is one more output of its size (and two pointers), and no more temporary memory."""
    ours = compiled(params, LONG, capture=f"^{name}$")
    size = 4 * np.prod(naive.shape_of(name, 2, LONG))
    room, bare_room = ours.memory_analysis(), bare.memory_analysis()
    assert size <= room.output_size_in_bytes - bare_room.output_size_in_bytes <= size + 2 * 8
    opens_attention = name.endswith("pattern")
    assert room.temp_size_in_bytes <= bare_room.temp_size_in_bytes + size * opens_attention
    if not opens_attention:
        assert 0 <= ours.cost_analysis()["flops"] - bare.cost_analysis()["flops"] <= size  # of a scale, a square root


def test_capturing_a_pattern_opens_no_other_layers_attention(params, bare):
    """The other layer's attention is still computed in blocks, which skip most masked scores."""
    whole, ours = f"f32[2,3,{LONG},{LONG}]", compiled(params, LONG, capture="h0/attn/pattern")
    assert whole not in bare.as_text()
    assert whole in ours.as_text()
    # Measured: 5.0 more operations for each number of the pattern, or 1.0 if the plain model computes it whole too.
    assert ours.cost_analysis()["flops"] - bare.cost_analysis()["flops"] > 3 * 2 * 3 * LONG * LONG
    lines = [line for line in ours.as_text().splitlines() if "h1/attn" in line]
    assert lines
    assert not any(whole in line for line in lines)


@pytest.mark.parametrize("length", [7, LONG])
def test_logits_are_the_plain_models_to_the_bit(params, length):
    """This holds if nothing is captured and if everything is."""
    tokens_BT = some_tokens(CONFIG, 2, length, seed=3)
    expected = np.asarray(plain(CONFIG, params, tokens_BT))
    bare, seen = research.forward(CONFIG, params, tokens_BT)
    assert seen == {}
    assert bare.cache is None
    assert np.asarray(bare.logits).tobytes() == expected.tobytes()
    out, _ = research.forward(CONFIG, params, tokens_BT, capture=".")
    assert np.asarray(out.logits).tobytes() == expected.tobytes()


# --- under transformations -------------------------------------------------------------------------------------------


def test_under_jit_vmap_and_grad(params):
    """Capture works inside other programs: for one row at a time, and differentiated with respect to params."""
    _, seen = naive.forward(CONFIG, params, TOKENS)

    @jax.jit
    @jax.vmap
    def rows(tokens_T):
        return research.forward(CONFIG, params, tokens_T[None], capture=["^h0/attn/pattern$", "^ln_f/scale$"])[1]

    found = rows(TOKENS)
    assert sorted(found) == ["h0/attn/pattern", "ln_f/scale"]
    for name, value in found.items():
        assert naive.error(value[:, 0], seen[name]) < BOUND

    @jax.jit
    @jax.grad
    def of_a_neuron(params):
        return research.forward(CONFIG, params, TOKENS, capture="^h0/mlp/pre$")[1]["h0/mlp/pre"][..., 17].sum()

    gradient = of_a_neuron(params)
    n_tokens_F = np.where(np.arange(60) == 17, TOKENS.size, 0)
    assert np.allclose(gradient["h0"]["mlp"]["c_fc"]["b"], n_tokens_F, rtol=1e-6, atol=0)
    out_D = seen["h0/ln_2/out"].sum((0, 1))
    assert naive.error(gradient["h0"]["mlp"]["c_fc"]["w"][:, 17], out_D) < BOUND
    assert not np.any(gradient["h1"]["mlp"]["c_fc"]["w"])


def test_taps_may_be_any_functions(params):
    """`apply` takes any function of an activation and the tokens' positions that returns the new activation."""
    mask_BT, places = np.arange(7) >= np.array([0, 2, 5])[:, None], []

    def square(post_BTF, position_BT):
        places.append(position_BT)
        return post_BTF**2 * position_BT[..., None]

    model = gpt2_jax.GPT2(CONFIG)
    out = model.apply({"params": params}, TOKENS, mask_BT, taps={"h0/mlp/post": square})
    _, seen = naive.forward(CONFIG, params, TOKENS, mask_BT)
    place_BT = mask_BT.cumsum(-1) - 1
    assert np.array_equal(places[0][mask_BT], place_BT[mask_BT])
    put_in = naive.edit("replace", "h0/mlp/post", seen["h0/mlp/post"] ** 2 * place_BT[..., None])
    expected_BTV, _ = naive.forward(CONFIG, params, TOKENS, mask_BT, [put_in])
    assert naive.error(out.logits[mask_BT], expected_BTV[mask_BT]) < BOUND
    with pytest.raises(ValueError, match="h0/mlp/pots"):
        model.apply({"params": params}, TOKENS, taps={"h0/mlp/pots": square})


@pytest.mark.parametrize("remat", [True, "elementwise"])
def test_taps_and_capturing_work_with_rematerialization(params, remat):
    """Logits, captured activations and gradients equal those without it."""
    taps = {"mlp/post": lambda value, position_BT: value * 1.5, "h1/attn/pattern": lambda value, position_BT: value**2}
    names = ("h0/mlp/post", "h1/attn/pattern", "ln_f/scale")

    def run(params, remat):
        how = {"taps": taps, "capture": names, "method": "run"}
        h_BTD, _, seen = gpt2_jax.GPT2(CONFIG, remat=remat).apply({"params": params}, TOKENS, **how)
        return (h_BTD**2).sum() + (seen["h0/mlp/post"] ** 3).sum(), seen

    plain, again = (jax.value_and_grad(run, has_aux=True)(params, how) for how in (False, remat))
    assert set(plain[0][1]) == set(names)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, again)  # measured: 3e-6
