"""NaN, infinite and too large numbers: an error that names the cause, and never an id outside the vocabulary.

At the size of the released vocabulary, because XLA's max over an axis on a CPU skips NaN from 4,096 elements on
(openxla/xla#21461).
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from strength import campaign
from tiny_models import CONFIG, random_params

import gpt2_jax
from gpt2_jax.generation import Settings, complete
from gpt2_jax.generation.non_finite import cause
from gpt2_jax.research import add, replace, scale

LARGE = gpt2_jax.GPT2Config(n_vocab=50257, n_ctx=64, n_embd=6, n_head=2, n_layer=2)
PROMPTS = [[7, 8, 9], [5]]
DTYPES = campaign(["float32", "float16"], ["float32", "bfloat16", "float16", "float64"])
PENALISED = {"top_k": 40, "repetition_penalty": 1.2, "logprobs": 2}
SAMPLING = campaign([{"temperature": 0}, PENALISED], [{"temperature": 0}, PENALISED, {}, {"top_p": 0.9}])


@pytest.fixture(scope="module")
def params():
    return random_params(LARGE, 1)


def changed(params, name, index, value):
    flat = gpt2_jax.params.flatten(params)
    return gpt2_jax.params.unflatten(flat | {name: flat[name].at[index].set(value)})


PLACES = {  # a value of the params, and the first token whose logits it reaches
    "the last norm": ("ln_f/g", 0, 0),
    "the last norm's bias": ("ln_f/b", 5, 0),
    "one row of wte, which no prompt reads": ("wte", (40000, 2), 0),
    "a product": ("h1/mlp/c_fc/w", (0, 0), 0),
    "keys": ("h0/attn/c_attn/b", 7, 0),
    "the position of a later token": ("wpe", (4, 0), 2),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_number_that_is_not_finite_becomes_a_token(params, dtype):
    """NaN of both signs and infinity, in each kind of parameter; the message names it and the row."""
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        config = LARGE.replace(compute_dtype=dtype)
        for name, index, token in PLACES.values():
            infinite = [jnp.inf, -jnp.inf] if name != "wte" else []  # that may be a logit of -inf: probability 0
            for value in campaign([-jnp.nan], [jnp.nan, -jnp.nan, *infinite]):
                broken = changed(params, name, index, value)
                for settings in SAMPLING:
                    message = rf"^prompts\[\d\]: the logits are NaN or infinite at new token {token}: NaN or infinite "
                    with pytest.raises(ValueError, match=message + rf"values in params\[{name}\]: load other weights$"):
                        gpt2_jax.generate(config, broken, PROMPTS, 5, **settings)


@pytest.mark.parametrize(("name", "index"), [("ln_f/g", 0), ("wte", (40000, 2)), ("h1/mlp/c_fc/w", (0, 0))])
def test_score_names_the_params(params, name, index):
    broken = changed(params, name, index, -jnp.nan)
    with pytest.raises(ValueError, match=rf"^prompts\[0\]: the logits .* at token 1: .* in params\[{name}\]: load"):
        gpt2_jax.score(LARGE, broken, [[1, 2, 3]])


def test_one_infinite_logit_is_no_score(params):
    """The other tokens' probabilities would all be 0, and their log-probabilities -inf."""
    biased = changed(params, "ln_f/g", slice(None), 0.0)
    broken = changed(changed(biased, "ln_f/b", 0, 3e38), "wte", (40000, 0), 3e38)
    for call in (lambda: gpt2_jax.score(LARGE, broken, [[1, 2, 3]]), lambda: gpt2_jax.generate(LARGE, broken, [[1]])):
        with pytest.raises(
            ValueError, match="overflow in float32: all params are finite, but the params are too large"
        ):
            call()


def test_many_broken_params_are_counted(params):
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    with pytest.raises(ValueError, match=r"params\[\S+\], params\[\S+\], params\[\S+\] and 25 more: load"):
        gpt2_jax.generate(LARGE, broken, [[1]])


EDITS = {
    "an infinite replacement": replace("h1/mlp/out", jnp.inf),
    "NaN added": add("h0/attn/z", np.nan, positions=2),
    "an infinite factor": scale("ln_f/out", -np.inf),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_edit_that_is_not_finite_is_named(params, case, tokenizer):
    edit = EDITS[case]
    message = f"the value of the edit of {edit.name} is not finite"
    for call in (gpt2_jax.generate, lambda *args, **more: gpt2_jax.score(*args, **more)):
        with pytest.raises(ValueError, match=rf"^prompts\[0\]: .* token \d: {message}"):
            call(LARGE, params, [[1, 2, 3, 4]], edits=[add("h1/mlp/out", 1.0), edit])
    with pytest.raises(ValueError, match=f"^prompt: .*{message}"):
        list(gpt2_jax.stream(LARGE, params, [1, 2, 3, 4], tokenizer, edits=[edit]))


def test_params_and_an_edit_are_both_named(params):
    """Weights and activations of a broken model: neither hides the other."""
    broken = changed(params, "ln_f/g", 0, jnp.nan)
    with pytest.raises(
        ValueError, match=r"in params\[ln_f/g\]: load other weights; the value of the edit of h1/mlp/out"
    ):
        gpt2_jax.generate(LARGE, broken, [[1, 2]], edits=EDITS["an infinite replacement"])


def test_values_of_each_layer_and_taps_are_causes(params):
    values = {"h0/mlp/out": np.ones(3), "h1/mlp/out": np.array([1, np.nan])}
    edit = replace("h1/mlp/out", 0.0).replace(value=values)
    assert cause(LARGE, params, [edit]).startswith("the value of the edit of h1/mlp/out is not finite")
    said = cause(LARGE, params, [add("h0/attn/z", 1e300)], ["h0/attn/z"])
    assert said.startswith("the value of the edit of h0/attn/z is not finite")  # beyond float32
    said = cause(LARGE, params, [add("h0/attn/z", 1.0)], ["resid_pre$", "z"])
    assert said == "all params and values of edits are finite, so the tap of resid_pre$ or z may have made them"


def test_a_tap_that_makes_nan_is_named(params, tokenizer):
    for call in (gpt2_jax.generate, gpt2_jax.score):
        with pytest.raises(ValueError, match=r"finite, so the tap of mlp/out\$ may have made them"):
            call(LARGE, params, [[1, 2]], taps={"mlp/out$": _not_a_number})


def _not_a_number(value, position_BT):
    return value * jnp.nan


def test_blocked_attention_is_not_a_cause(params):
    blocked = replace("attn/scores", -np.inf, key_positions=0)
    assert len(gpt2_jax.generate(LARGE, params, [[1, 2]], 3, edits=blocked)[0]) == 3
    assert "edit of attn/scores" not in cause(LARGE, params, [blocked])
    for edit in (replace("attn/scores", np.inf), replace("attn/scores", np.nan), scale("h0/attn/scores", -np.inf)):
        assert f"the value of the edit of {edit.name} is not finite" in cause(LARGE, params, [edit])


def test_a_division_by_0_is_a_cause(params):
    with pytest.raises(ValueError, match="overflow in float32, or a division by 0"):
        gpt2_jax.generate(LARGE, params, [[1, 2]], edits=replace("ln_f/scale", 0.0))


def test_an_edit_too_large_is_overflow(params):
    finite = "all params are finite, but the values of the edits"
    for dtype, words in (("float32", finite), ("float16", "whose largest")):
        config = LARGE.replace(compute_dtype=dtype)
        with pytest.raises(ValueError, match=f"overflow in {dtype}.* {words}"):
            gpt2_jax.generate(config, params, [[1, 2]], edits=replace("ln_f/normalized", 3e38))


def test_float16_overflow_is_told_apart(params, tokenizer):
    """Params within float32 and beyond float16; in float32 and bfloat16 they are used."""
    large = changed(params, "h0/mlp/c_proj/b", 0, 1e5)
    overflow = "overflow in float16, whose largest number is 65,504: set compute_dtype to float32 or bfloat16$"
    half = LARGE.replace(compute_dtype="float16")
    with pytest.raises(ValueError, match=overflow):
        gpt2_jax.generate(half, large, [[1, 2]])
    with pytest.raises(ValueError, match=overflow):
        gpt2_jax.score(half, large, [[1, 2]])
    with pytest.raises(ValueError, match=overflow):
        complete(half, large, [[1, 2]], tokenizer, Settings())
    for dtype in campaign(["bfloat16"], ["bfloat16", "float32"]):
        (row,) = gpt2_jax.generate(LARGE.replace(compute_dtype=dtype), large, [[1, 2]], 5)
        assert len(row) == 5


def test_rows_that_ended_before_do_not_count():
    """A row that stopped is not read any more: its NaN after the stop is no error."""
    params = random_params(CONFIG, 0)
    (row,) = gpt2_jax.generate(CONFIG, params, [[5]], 9, temperature=0)
    broken = changed(params, "wpe", 4, jnp.nan)
    stop = row[2]
    assert gpt2_jax.generate(CONFIG, broken, [[5]], 9, temperature=0, stop_ids=[stop]) == [row[: row.index(stop)]]
