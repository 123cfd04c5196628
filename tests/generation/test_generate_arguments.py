"""The arguments that generate rejects, before it uses a parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIG

import gpt2_jax

UNTOUCHED = {"wte": object()}  # JAX cannot trace this: any attempt raises TypeError


@pytest.mark.parametrize(
    ("prompts", "n"),
    [
        ([[1]], 41),
        ([[1] * 41], 1),
        ([[1] * 20, [2, 3]], 22),
        ([[1], [2] * 30, [3]], 12),
        ([[1] * 42], 0),
        ([[1]], 10**9),
    ],
    ids=["one token", "full prompt", "first row", "middle row", "long prompt", "far beyond"],
)
def test_beyond_the_context_is_refused(prompts, n):
    """Position n_ctx does not exist. The call is rejected before anything is traced; the message has three numbers."""
    longest = max(map(len, prompts))
    with pytest.raises(ValueError, match=r"n_ctx|context") as caught:
        gpt2_jax.generate(CONFIG, UNTOUCHED, prompts, n)
    message = str(caught.value).replace(",", "").replace("_", "")
    assert "41" in message
    assert str(longest) in message
    assert str(n) in message
    assert "\n" not in str(caught.value)


BAD_PROMPTS = {
    "no prompts": ([], ""),
    "empty prompt": ([[]], ""),
    "empty among others": ([[1, 2], [], [3]], "1"),
    "flat list": ([1, 2, 3], ""),
    "flat array": (np.arange(3), ""),
    "text": ("ROMEO:", ""),
    "texts": (["ROMEO:", "JULIET:"], ""),
    "bytes": ([b"ROMEO:"], ""),
    "none": (None, ""),
    "number": (7, ""),
    "three levels": ([[[1, 2]]], ""),
    "float": ([[1, 2.5]], "2.5"),
    "whole float": ([[1, 2.0]], "2.0"),
    "float array": ([np.array([1.0, 2.0])], ""),
    "bool array": ([np.array([True, False])], ""),
    "none inside": ([[1, None]], "None"),
    "beyond the vocabulary": ([[1], [36, 37]], "37"),
    "far beyond": ([[1, 2**40]], str(2**40)),
    "wraps to zero": ([[1, 2**32]], str(2**32)),
    "no 64 bits": ([[1, 2**70]], str(2**70)),
    "negative": ([[1, -1]], "-1"),
    "beyond in an array": (np.array([[1, 37]]), "37"),
    "negative in an array": ([np.array([1, -2])], "-2"),
}


@pytest.mark.parametrize(("prompts", "shown"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_bad_prompts_are_refused(prompts, shown):
    with pytest.raises(ValueError, match="prompt") as caught:
        gpt2_jax.generate(CONFIG, UNTOUCHED, prompts, 3)
    message = str(caught.value)
    assert shown in message
    assert "\n" not in message


BAD_ARGUMENTS = [
    ("max_new_tokens", -1), ("max_new_tokens", 2.5), ("max_new_tokens", 3.0), ("max_new_tokens", "3"),
    ("max_new_tokens", None),
    ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", float("-inf")),
    ("temperature", "hot"), ("temperature", None),
    ("top_k", -1), ("top_k", 2.5), ("top_k", "3"), ("top_k", None),
    ("top_p", 0), ("top_p", 0.0), ("top_p", -0.1), ("top_p", 1.0001), ("top_p", float("nan")), ("top_p", float("inf")),
    ("top_p", "most"), ("top_p", None),
    ("seed", -1), ("seed", 1.5), ("seed", "3"), ("seed", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_ARGUMENTS, ids=lambda x: str(x))
def test_bad_arguments_are_refused(name, value):
    """One sentence with the argument's name and the value, before anything is traced."""
    with pytest.raises(ValueError, match=name) as caught:
        gpt2_jax.generate(CONFIG, UNTOUCHED, [[1, 2]], **{"max_new_tokens": 3} | {name: value})
    message = str(caught.value)
    assert str(value) in message
    assert "\n" not in message


def test_bad_arguments_are_refused_for_nothing_to_do_too():
    """The checks also run for zero new tokens."""
    with pytest.raises(ValueError, match="top_p"):
        gpt2_jax.generate(CONFIG, UNTOUCHED, [[1, 2]], 0, top_p=0)
    with pytest.raises(ValueError, match="37"):
        gpt2_jax.generate(CONFIG, UNTOUCHED, [[37]], 0)


@pytest.mark.parametrize("n", [np.uint8(200), np.int8(127), np.uint16(65_535)], ids=repr)
def test_small_integer_types_do_not_wrap_around_the_context(n):
    with pytest.raises(ValueError, match="n_ctx is 41"):
        gpt2_jax.generate(CONFIG, UNTOUCHED, [[1] * 41], n)


@pytest.mark.parametrize("value", [10**400, 1e39, np.float64(1e300), True], ids=str)
def test_a_temperature_beyond_float32_is_refused(value):
    with pytest.raises(ValueError, match="temperature must be a number"):
        gpt2_jax.generate(CONFIG, UNTOUCHED, [[1]], 1, temperature=value)


def test_a_config_must_be_one():
    for config in (None, CONFIG.to_hparams()):
        with pytest.raises(ValueError, match="config must be a GPT2Config"):
            gpt2_jax.generate(config, UNTOUCHED, [[1]], 1)


def edited(path, value):
    """Initial params with one leaf or branch replaced, or removed if the value is Ellipsis."""
    params = gpt2_jax.init_params(CONFIG, jax.random.key(0))
    *above, last = path.split("/")
    branch = params
    for name in above:
        branch = branch[name]
    del branch[last]
    if value is not ...:
        branch[last] = value
    return params


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (lambda: None, "params must be nested dicts of arrays, not None"),
        (lambda: {1: jnp.zeros(3)}, "params must be nested dicts"),
        (lambda: {"params": edited("wpe", ...)}, "missing: wte .*"),
        (lambda: edited("h1/mlp/c_fc/b", ...), r"missing: h1/mlp/c_fc/b float32\[48\]"),
        (lambda: edited("h1", {}), r"missing: h1/attn/c_attn/b"),
        (
            lambda: edited("wte", jnp.zeros((12, 37))),
            r"misshaped: wte is float32\[12, 37\], expected float32\[37, 12\]",
        ),
        (lambda: edited("wte", jnp.zeros((37, 12), int)), "must hold an array of floats at wte"),
        (lambda: edited("h0/ln_1/g", None), "must hold an array of floats at h0/ln_1/g, not None"),
        (lambda: edited("h0/ln_1/g", [1.0] * 12), "must hold an array of floats at h0/ln_1/g, not "),
    ],
)
def test_params_of_another_config_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        gpt2_jax.generate(CONFIG, params(), [[1]], 1)


def test_nan_in_the_params_is_told_with_its_row():
    params = edited("wpe", jnp.zeros((41, 12)).at[5].set(jnp.nan))  # read by the second row, at its sixth position
    with pytest.raises(
        ValueError, match=r"prompts\[1\]: the logits are NaN or infinite at new token 2: .* params.wpe."
    ):
        gpt2_jax.generate(CONFIG, params, [[1], [2, 3, 4, 5]], 4, temperature=0)
