"""Variants of GPT-2's arithmetic: another activation function, scores divided by the layer, an untied output head."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
import variants
from forward import CONFIG, cached_step, logits_in_chunks, logits_of, padding_masks, relative_error, run, some_tokens

import gpt2_jax
from gpt2_jax.params import flatten, output_head
from gpt2_jax.research import forward as captured

BOUND = 5e-6  # of the largest logit in float32; measured 7.5e-7


@pytest.fixture(params=variants.CASES)
def case(request):
    return request.param


@pytest.fixture
def model(case):
    return variants.model(case)


# ---- the numbers


def test_logits_with_padding_are_those_of_numpy(model):
    config, params = model
    tokens_BT, mask_BT = some_tokens(config, 3, 19), padding_masks(19)["left"]
    for mask in (None, mask_BT):
        expected, real_BT = variants.expected(config, params, tokens_BT, mask), mask_BT if mask is not None else ...
        logits = logits_of(config, params, tokens_BT, mask)
        assert logits.dtype == np.float32
        assert relative_error(logits[real_BT], expected[real_BT]) < BOUND


def test_float64_logits_are_those_of_numpy_without_rounding(case):
    with jax.enable_x64(True):
        config, params = variants.model(case, param_dtype="float64", compute_dtype="float64")
        tokens_BT = some_tokens(config, 2, 17)
        error = relative_error(logits_of(config, params, tokens_BT), variants.expected(config, params, tokens_BT))
    assert error < 1e-14  # measured 8.8e-16


def test_each_variant_moves_the_logits(model, case):
    """If a field had no effect, the comparisons above would say nothing about it."""
    config, params = model
    tokens_BT = some_tokens(config, 2, 17)
    plain = {name: leaf for name, leaf in params.items() if name != "lm_head"}
    moved = relative_error(logits_of(config, params, tokens_BT), logits_of(CONFIG, plain, tokens_BT))
    assert moved == 0 if case in variants.SAME else moved > 20 * BOUND  # measured 1.8e-4 (gelu) to 1.2


@pytest.mark.parametrize("chunks", [(19,), (7, 1, 11), (1,) * 19])
def test_the_cache_gives_the_same_logits(model, chunks):
    config, params = model
    tokens_BT, mask_BT = some_tokens(config, 3, 19), padding_masks(19)["left"]
    expected = variants.expected(config, params, tokens_BT, mask_BT)
    logits = logits_in_chunks(config, params, tokens_BT, mask_BT, chunks, 19)
    assert relative_error(logits[mask_BT], expected[mask_BT]) < BOUND


def test_a_cache_in_two_parts_gives_the_same_logits(model):
    """Decoding reads the older tokens from `past`: its scores must be divided too."""
    config, params = model
    tokens_BT = some_tokens(config, 2, 12)
    _, past = cached_step(config, params, tokens_BT[:, :9], None, gpt2_jax.init_cache(config, 2, 9))
    cache = dataclasses.replace(gpt2_jax.init_cache(config, 2, 3), past=past)
    logits, _ = cached_step(config, params, tokens_BT[:, 9:], None, cache)
    assert relative_error(np.asarray(logits), variants.expected(config, params, tokens_BT)[:, 9:]) < BOUND


def test_the_captured_scores_and_neurons_are_those_of_numpy(model):
    """Capturing the scores takes another path through attention."""
    config, params = model
    tokens_BT, seen = some_tokens(config, 1, 13), {}

    def see(name, x):
        seen[name] = x
        return x

    numpy_reference.row(
        numpy_reference.as_float64(params),
        tokens_BT[0],
        config.n_head,
        see,
        gelu=numpy_reference.ACTIVATIONS[config.activation_function],
        inverse_layer=config.scale_attn_by_inverse_layer_idx,
    )
    out, found = captured(config, params, tokens_BT, capture=["attn/scores$", "mlp/post$"])
    assert len(found) == 2 * config.n_layer
    for name, value in found.items():
        ours, theirs = np.asarray(value)[0], seen[name]
        if name.endswith("scores"):  # without the masked ones, which are -1e10
            ours, theirs = ours[:, np.tri(13, dtype=bool)], theirs[:, np.tri(13, dtype=bool)]
        assert relative_error(ours, theirs) < BOUND
    assert relative_error(np.asarray(out.logits), variants.expected(config, params, tokens_BT)) < BOUND


def test_greedy_text_is_that_of_the_whole_forward_pass():
    config, params = variants.model("all")
    ids = some_tokens(config, 1, 5)[0].tolist()
    text = gpt2_jax.generate(config, params, [ids], 10, temperature=0)[0]
    for _ in range(10):
        ids.append(int(variants.expected(config, params, np.array([ids]))[0, -1].argmax()))
    assert list(text) == ids[5:]


def test_remat_gives_the_same_gradients():
    """Rematerialization builds the blocks in another way: each must still know its layer."""
    config, params = variants.model("all")
    tokens_BT = some_tokens(config, 2, 11)

    def loss(params, remat):
        logits = gpt2_jax.GPT2(config, remat=remat).apply({"params": params}, tokens_BT[:, :-1]).logits
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens_BT[:, 1:, None], -1).mean()

    one, other = (flatten(jax.jit(jax.grad(loss), static_argnums=1)(params, remat)) for remat in (False, True))
    for name, leaf in one.items():
        assert np.abs(leaf - other[name]).max() <= 4e-6 * max(np.abs(leaf).max(), 1e-3), name  # measured 4e-7


def test_low_precision_does_not_need_reorder_and_upcast():
    """Scores are at least float32 in any case, so the field gives the same program."""
    for dtype in ("float32", "bfloat16", "float16"):
        plain, upcast = (_text(CONFIG.replace(compute_dtype=dtype, reorder_and_upcast_attn=on)) for on in (False, True))
        assert plain == upcast


# ---- the compiled programs


def _text(config):
    params = gpt2_jax.abstract_params(config)
    return run.lower(config, params, jax.ShapeDtypeStruct((2, 11), jnp.int32)).as_text()


def _operations(**changes):
    return collections.Counter(re.findall(r"(?:stablehlo|chlo)\.(\w+)", _text(CONFIG.replace(**changes))))


def test_a_program_without_variants_computes_nothing_for_them():
    """The operations of the default program, counted: a product, a division or a tanh more would change a number."""
    n, plain = CONFIG.n_layer, _operations()
    assert plain["dot_general"] == 6 * n + 1
    assert plain["tanh"] == n
    assert plain["sqrt"] == n  # of the head width
    assert plain["rsqrt"] == 2 * n + 1
    assert plain["divide"] == 2 * n + 2 * (2 * n + 1)  # scores, softmax; two means in each LayerNorm
    assert plain["multiply"] == 6 * n + 2 * (2 * n + 1)  # GELU; scale and g of each LayerNorm
    assert plain["maximum"] == 2 * n  # softmax
    assert plain["exponential"] == n
    assert "erfc" not in plain


def test_a_variant_adds_only_what_it_needs():
    n, plain = CONFIG.n_layer, _operations()
    assert _operations(reorder_and_upcast_attn=True) == plain
    assert _operations(tie_word_embeddings=False) == plain
    by_layer = _operations(scale_attn_by_inverse_layer_idx=True)
    assert by_layer - plain == {"multiply": n - 1, "constant": n - 1}  # not in layer 0
    for name, operation in {"gelu": "erfc", "silu": "exponential", "relu": "maximum"}.items():
        found = _operations(activation_function=name)
        assert found["tanh"] == 0
        assert found[operation] > plain[operation]
        assert found["dot_general"] == plain["dot_general"]


# ---- params and counts


def test_an_untied_head_is_a_parameter_of_its_own():
    config = CONFIG.replace(tie_word_embeddings=False)
    init = jax.jit(gpt2_jax.init_params, static_argnums=0)
    params, tied = init(config, jax.random.key(3)), init(CONFIG, jax.random.key(3))
    assert flatten(params).keys() - flatten(tied).keys() == {"lm_head"}
    for name, leaf in flatten(tied).items():
        np.testing.assert_array_equal(leaf, flatten(params)[name])
    assert params["lm_head"].shape == (CONFIG.n_vocab, CONFIG.n_embd)
    assert abs(params["lm_head"].std() - 0.02) < 0.002  # the standard error is 0.0004
    assert not np.array_equal(params["lm_head"], params["wte"])
    assert output_head(params) is params["lm_head"]
    assert output_head(tied) is tied["wte"]


def test_the_counts_are_those_of_the_arrays(model):
    config, params = model
    counts = dict.fromkeys(config.param_counts, 0)
    for name, leaf in flatten(params).items():
        counts["ln" if "ln_" in name else name.split("/")[min(1, name.count("/"))]] += leaf.size
    assert counts == config.param_counts
    assert config.n_params == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert ("lm_head" in config.param_counts) == (not config.tie_word_embeddings)


@pytest.mark.parametrize("tie", [True, False])
def test_params_of_the_other_kind_are_refused_by_name(tie):
    config = CONFIG.replace(tie_word_embeddings=tie)
    _, params = variants.model("untied" if tie else "upcast")
    with pytest.raises(ValueError, match=f"{'extra' if tie else 'missing'}: lm_head"):
        gpt2_jax.generate(config, params, [[1]], 1)


# ---- the config

ALIASES = {
    "gelu_new": {"gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"},
    "gelu": {"gelu", "gelu_python"},
    "relu": {"relu"},
    "silu": {"silu", "swish"},
}


@pytest.mark.parametrize("name", ALIASES)
def test_other_names_of_an_activation_function_are_the_same_config(name):
    configs = {CONFIG.replace(activation_function=alias) for alias in ALIASES[name]}
    assert configs == {CONFIG.replace(activation_function=name)}


@pytest.mark.parametrize("value", ["quick_gelu", "gelu_10", "tanh", "GELU", "", None, 1])
def test_another_activation_function_is_refused(value):
    with pytest.raises(ValueError, match=r"activation_function must be one of gelu_new, .*silu"):
        CONFIG.replace(activation_function=value)


@pytest.mark.parametrize("name", ["scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "tie_word_embeddings"])
@pytest.mark.parametrize("value", [None, 1, "true"])
def test_the_flags_are_bools(name, value):
    with pytest.raises(ValueError, match=f"{name} must be True or False"):
        CONFIG.replace(**{name: value})


def test_variants_are_the_fields_that_differ(case):
    assert CONFIG.replace(**variants.CASES[case]).variants == variants.CASES[case]
    assert CONFIG.variants == {}
