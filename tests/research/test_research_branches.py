"""Branch inputs and results: each head's copy of the stream, the MLP's copy, and what each head writes."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_activations as naive
import numpy_reference
import pytest
from forward import padding_masks, some_tokens
from numpy_activations import CONFIG

import gpt2_jax
from gpt2_jax import research

TOKENS = some_tokens(CONFIG, 3, 7)
BOUND = 5e-6  # of float32, relative to the largest value; measured: 5.3e-7
SHAPES = {"attn/in": (3, 7, 3, 15), "attn/q_in": (3, 7, 3, 15), "attn/k_in": (3, 7, 3, 15), "attn/v_in": (3, 7, 3, 15),
          "attn/result": (3, 7, 3, 15), "mlp/in": (3, 7, 15)}  # fmt: skip
NAMES = [f"h{i}/{name}" for i in range(CONFIG.n_layer) for name in SHAPES]


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, naive.weights())


def by_hand(params, tokens_T, change):
    """Logits [T, V] and activations of a text in float64. Each head reads its own copy of the stream, by a loop.

    `change(name, x)` returns the activation to use.
    """
    seen, n_head, width = {}, CONFIG.n_head, CONFIG.n_embd // CONFIG.n_head

    def see(name, x):
        seen[name] = np.array(change(name, x))
        return seen[name]

    def norm(x, p):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["g"] + p["b"]

    x_TD = params["wte"][tokens_T] + params["wpe"][: len(tokens_T)]
    for i in range(CONFIG.n_layer):
        p, h = params[f"h{i}"], f"h{i}"
        x_TND = see(f"{h}/attn/in", np.repeat(x_TD[:, None], n_head, axis=1))
        copies = {kind: see(f"{h}/attn/{kind}_in", x_TND) for kind in "qkv"}
        result_TND = np.zeros_like(x_TND)
        for n in range(n_head):
            parts = []
            for j, kind in enumerate("qkv"):
                columns = slice((j * n_head + n) * width, (j * n_head + n + 1) * width)
                c_attn = {key: leaf[..., columns] for key, leaf in p["attn"]["c_attn"].items()}
                parts.append(norm(copies[kind][:, n], p["ln_1"]) @ c_attn["w"] + c_attn["b"])
            scores = np.where(np.tri(len(tokens_T), dtype=bool), parts[0] @ parts[1].T / np.sqrt(width), -np.inf)
            pattern = np.exp(scores - scores.max(-1, keepdims=True))
            z = pattern / pattern.sum(-1, keepdims=True) @ parts[2]
            result_TND[:, n] = z @ p["attn"]["c_proj"]["w"][n * width : (n + 1) * width]
        x_TD = x_TD + see(f"{h}/attn/result", result_TND).sum(1) + p["attn"]["c_proj"]["b"]
        pre = norm(see(f"{h}/mlp/in", x_TD), p["ln_2"]) @ p["mlp"]["c_fc"]["w"] + p["mlp"]["c_fc"]["b"]
        x_TD = x_TD + numpy_reference.gelu_tanh(pre) @ p["mlp"]["c_proj"]["w"] + p["mlp"]["c_proj"]["b"]
    return norm(x_TD, params["ln_f"]) @ params["wte"].T, seen


def assert_by_hand(params, found, change, mask_BT=None):
    mask_BT = np.ones(TOKENS.shape, bool) if mask_BT is None else mask_BT
    weights = numpy_reference.as_float64(params)
    for b, mask_T in enumerate(mask_BT):
        logits_TV, expected = by_hand(weights, TOKENS[b, mask_T], lambda name, x, b=b: change(name, x, b))
        assert naive.error(found[0].logits[b, mask_T], logits_TV) < BOUND
        for name, value in found[1].items():
            assert naive.error(value[b, mask_T], expected[name]) < BOUND, name


def test_they_have_these_names_and_axes(params):
    assert set(research.BRANCHES) == set(SHAPES)
    _, seen = research.forward(CONFIG, params, TOKENS, capture=["attn/(q_|k_|v_)?in$", "attn/result", "mlp/in"])
    assert list(seen) == NAMES
    assert {name: value.shape for name, value in seen.items()} == {name: SHAPES[name[3:]] for name in NAMES}
    every = research.activation_names(CONFIG, branches=True)
    assert [name for name in every if name in NAMES] == NAMES
    assert [name for name in every if name not in NAMES] == research.activation_names(CONFIG)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_without_a_change_they_are_numpys(params, padding):
    masks = padding_masks(7)
    mask_BT = {"none": None, **masks}.get(padding, [*masks.values()][1 if padding == "left" else -1])
    found = research.forward(CONFIG, params, TOKENS, mask_BT, capture=["_in$", "attn/in$", "result", "mlp/in"])
    assert_by_hand(params, found, lambda name, x, b: x, mask_BT)


@pytest.mark.parametrize("name", NAMES)
def test_edits_of_each_are_numpys(params, name):
    """One head at two positions is replaced, and the whole is scaled. What comes later changes as it must."""
    value_D = np.random.default_rng(3).normal(0, 2, 15).astype(np.float32)
    heads = {} if name.endswith("mlp/in") else {"heads": 1}
    edits = [research.replace(name, value_D, positions=[2, 5], **heads), research.scale(name, 1.25)]
    found = research.forward(CONFIG, params, TOKENS, capture=["_in$", "attn/in$", "result", "mlp/in"], edits=edits)

    def change(at, x, b):
        if at != name:
            return x
        x = x.copy()
        x[([2, 5], 1) if heads else [2, 5]] = value_D
        return x * 1.25

    assert_by_hand(params, found, change)


def test_edits_of_all_together_are_numpys(params):
    """Each is added to. attn/q_in is attn/in after its change."""
    rng = np.random.default_rng(5)
    values = {name: rng.normal(0, 1, SHAPES[name[3:]]).astype(np.float32) for name in NAMES}
    edits = [research.add(name, value) for name, value in values.items()]
    found = research.forward(CONFIG, params, TOKENS, capture=["_in$", "attn/in$", "result", "mlp/in"], edits=edits)
    assert_by_hand(params, found, lambda name, x, b: x + values[name][b])


def test_gradients_are_finite_differences():
    """Of a sum of logits with respect to what is added to each, in float64, where nothing is added."""
    with jax.enable_x64(True):
        config = CONFIG.replace(param_dtype="float64", compute_dtype="float64")
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), naive.weights())
        rng = np.random.default_rng(7)
        weights_BTV = rng.normal(0, 1, (3, 7, config.n_vocab))
        directions = {name: rng.normal(0, 1, SHAPES[name[3:]]) for name in NAMES}

        @jax.jit
        def value(added):
            edits = [research.add(name, added[name]) for name in NAMES]
            return (research.forward(config, params, TOKENS, edits=edits)[0].logits * weights_BTV).sum()

        nothing = {name: np.zeros(SHAPES[name[3:]]) for name in NAMES}
        slopes = jax.grad(value)(nothing)
        for name, direction in directions.items():
            ahead, back = (value({**nothing, name: step * direction}) for step in (1e-5, -1e-5))
            slope = (slopes[name] * direction).sum()
            assert abs((ahead - back) / 2e-5 / slope - 1) < 1e-6, name  # measured: 3e-9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_they_work_with_a_cache_and_in_vmap(params, dtype):
    """Step by step, and for several strengths at once, an edit gives what the whole row gives."""
    config = CONFIG.replace(compute_dtype=dtype)

    def edits(strength):
        return [
            research.scale("attn/result", strength, heads=2),
            research.add("attn/k_in", strength, positions=[1, 4]),
            research.scale("h1/mlp/in", strength),
        ]

    strengths = jnp.array([0.0, 1.0, 2.5])
    whole = jax.vmap(lambda s: research.forward(config, params, TOKENS, edits=edits(s))[0].logits)(strengths)
    bound = BOUND if dtype == "float32" else 0.05  # measured: 6e-7; 0.013 in bfloat16, whose sums differ
    for strength, expected_BTV in zip(strengths, whole, strict=True):
        cache, parts = gpt2_jax.init_cache(config, 3, 9), []
        for span in (slice(0, 3), slice(3, 4), slice(4, 7)):
            out, _ = research.forward(config, params, TOKENS[:, span], cache=cache, edits=edits(strength))
            cache = out.cache
            parts.append(np.asarray(out.logits))
        assert naive.error(np.concatenate(parts, axis=1), expected_BTV) < bound


def test_captured_alone_they_change_no_bit(params):
    """Also the last block's, in a batch."""
    plain, _ = research.forward(CONFIG, params, TOKENS)
    out, _ = research.forward(CONFIG, params, TOKENS, capture=["_in$", "attn/in$", "result", "mlp/in"])
    assert np.asarray(out.logits).tobytes() == np.asarray(plain.logits).tobytes()


def test_what_is_not_asked_for_is_not_computed(params):
    """No array of the compiled program has a copy of the stream for each head. One edit gives those of one block."""
    config = CONFIG.replace(n_head=5)

    def program(**how):
        run = jax.jit(lambda params, tokens: research.forward(config, params, tokens, **how))
        return run.lower(params, TOKENS).compile().as_text()

    assert "[3,7,5,15]" not in program()
    assert "[3,7,5,15]" not in program(capture=".", edits=research.scale("attn/z", 0.5))
    assert "[3,7,5,15]" in program(edits=research.scale("h0/attn/q_in", 0.5))
