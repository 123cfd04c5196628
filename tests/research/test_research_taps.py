"""Taps: functions of activations in every pass, checked, by name or pattern, beside edits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_models import TEXT_CONFIG
from forward import relative_error, some_tokens
from jax.tree_util import Partial
from measures import COMPILATIONS
from tiny_models import CONFIG, random_params

import gpt2_jax
from gpt2_jax import research
from gpt2_jax.activations import InTurn
from gpt2_jax.evaluate import perplexity

TOKENS = some_tokens(CONFIG, 3, 7)
PROMPTS = [[5], list(range(19)), [7] * 13, [3, 1, 4, 1, 5, 9, 2, 6]]
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0)


def logits(params, tokens=TOKENS, config=CONFIG, **how):
    return np.asarray(research.forward(config, params, tokens, **how)[0].logits)


# --- what a tap may return -------------------------------------------------------------------------------------------

WRONG = {
    "one row": lambda value, position_BT: value[:1],
    "a number": lambda value, position_BT: 0.0,
    "another width": lambda value, position_BT: value[..., :-1],
    "complex": lambda value, position_BT: value * 1j,
    "text": lambda value, position_BT: "a",
    "a function": lambda value, position_BT: abs,
    "a list": lambda value, position_BT: [value, value],
}


@pytest.mark.parametrize("what", WRONG)
def test_another_shape_or_no_array_is_refused(params, what):
    """The message names the activation."""
    with pytest.raises(ValueError, match="tap of h1/mlp/out"):
        research.forward(CONFIG, params, TOKENS, taps={"h1/mlp/out": WRONG[what]})
    with pytest.raises(ValueError, match="tap of h1/mlp/out"):
        gpt2_jax.GPT2(CONFIG).apply({"params": params}, TOKENS, taps={"h1/mlp/out": WRONG[what]})


@pytest.mark.parametrize("taps", [{"h0/mlp/out": 3}, {"h0/mlp/out": None}, ["h0/mlp/out"], {"mlp/pots": abs},
                                  {"(": abs}, {3: abs}, 7])  # fmt: skip
def test_what_is_no_tap_is_refused(params, taps):
    with pytest.raises(ValueError, match=r"tap|activation|regular expression"):
        research.forward(CONFIG, params, TOKENS, taps=taps)


def test_a_function_that_cannot_be_hashed_is_refused(params):
    class Unhashable:
        __hash__ = None

        def __call__(self, value, position_BT):
            return value

    with pytest.raises(ValueError, match=r"hash.*Partial"):
        research.forward(CONFIG, params, TOKENS, taps={"h0/mlp/out": Unhashable()})


def test_none_and_the_value_itself_change_nothing(params):
    seen = []
    taps = {"resid_post": lambda value, position_BT: seen.append(value.shape), "attn/q": lambda value, _: value}
    assert logits(params, taps=taps).tobytes() == logits(params).tobytes()
    assert seen == [(3, 7, CONFIG.n_embd)] * CONFIG.n_layer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_are_cast_to_the_activations_dtype(params, dtype):
    """A bfloat16 model stays bfloat16, with a tap that returns float32, and whole numbers are numbers."""
    config = CONFIG.replace(compute_dtype=dtype)
    taps = {
        "h0/mlp/out": lambda value, position_BT: value.astype(jnp.float32) * np.float32(1.5),
        "h1/attn/z": lambda value, position_BT: np.ones(value.shape, int),
    }
    out, seen = research.forward(config, params, TOKENS, taps=taps, capture=".")
    _, plain = research.forward(config, params, TOKENS, capture=".")
    assert {name: value.dtype for name, value in seen.items()} == {name: value.dtype for name, value in plain.items()}
    assert (np.asarray(seen["h1/attn/z"]) == 1).all()
    expected = research.scale("h0/mlp/out", 1.5), research.replace("h1/attn/z", 1)
    assert relative_error(np.asarray(out.logits), logits(params, config=config, edits=expected)) <= (
        0 if dtype == "float32" else 0.02  # measured: 0.006; XLA may keep whole products in float32
    )


# --- names, order, data ----------------------------------------------------------------------------------------------


def test_patterns_choose_several_and_a_layers_number_is_whole():
    config = CONFIG.replace(n_layer=12)
    params, seen = gpt2_jax.init_params(config, jax.random.key(0)), {}

    def note(name):
        return lambda value, position_BT: seen.setdefault(name, []).append(value)

    research.forward(config, params, TOKENS, taps={name: note(name) for name in ("h1/", "h1", r"mlp/out$", "embed")})
    per_block = len([name for name in research.activation_names(config) if name.startswith("h1/")])
    assert {name: len(values) for name, values in seen.items()} == {
        "h1/": per_block, "h1": per_block, r"mlp/out$": 12, "embed": 1,
    }  # fmt: skip
    _, captured = research.forward(config, params, TOKENS, capture="h1")
    assert len(captured) == per_block
    assert len(research.forward(config, params, TOKENS, capture=r"h\d+/mlp/out")[1]) == 12


def test_edits_come_first_and_taps_in_their_order(params):
    taps = {"mlp/out": lambda value, _: value * 2, "h1/mlp/out": lambda value, _: value + 3, "h1/(mlp)": lambda v, _: v}
    edit = research.replace("mlp/out", 0.5)
    _, seen = research.forward(CONFIG, params, TOKENS, edits=edit, taps=taps, capture="mlp/out")
    assert np.unique(seen["h0/mlp/out"]).tolist() == [1.0]
    assert np.unique(seen["h1/mlp/out"]).tolist() == [4.0]


def test_a_tap_may_take_the_positions_that_are_looked_at(params):
    """It blocks what an edit of key_positions blocks, in rows with padding, as a function, with arrays, and jitted."""

    def block(keys_K, value, position_BT, key_position_BS):
        assert position_BT.shape[1:] == value.shape[2:3]
        return jnp.where((key_position_BS[..., None] == keys_K).any(-1)[:, None, None], -jnp.inf, value)

    def first(value, position_BT, key_position_BS):
        return block(jnp.array([1]), value, position_BT, key_position_BS)

    block.takes_keys = first.takes_keys = True
    tokens_BT, mask_BT = research.padded(CONFIG, PROMPTS[1:], "left")
    for tap in (first, jax.jit(first), Partial(block, jnp.array([1])), InTurn("h1/attn/scores", first, first)):
        found = logits(params, tokens_BT, mask_BT=mask_BT, taps={"h1/attn/scores": tap})
        edit = research.replace("h1/attn/scores", -np.inf, key_positions=1)
        np.testing.assert_array_equal(found, logits(params, tokens_BT, mask_BT=mask_BT, edits=edit))

    def chosen(**how):
        _, logprobs = gpt2_jax.generate(CONFIG, params, PROMPTS[1:], 4, **GREEDY, logprobs=0, **how)
        return np.array([row.chosen for row in logprobs])

    np.testing.assert_array_equal(chosen(taps={"h1/attn/scores": first}), chosen(edits=edit))
    assert (chosen(edits=edit) != chosen()).any()


def test_arrays_of_a_partial_are_data(params):
    """Other arrays compile nothing. They may be traced, batched and differentiated."""

    def push(direction_D, value, position_BT):
        return value + direction_D * (position_BT > 2)[..., None]

    def run(direction_D):
        return research.forward(CONFIG, params, TOKENS, taps={"h1/resid_pre": Partial(push, direction_D)})[0].logits

    directions = np.random.default_rng(1).normal(0, 1, (4, CONFIG.n_embd)).astype(np.float32)
    found, n_compiled = [run(directions[0])], len(COMPILATIONS)
    found += [run(direction) for direction in directions[1:]]
    assert len(COMPILATIONS) == n_compiled
    edits = [research.add("h1/resid_pre", direction, positions=slice(3, None)) for direction in directions]
    for logits_BTV, edit in zip(found, edits, strict=True):
        np.testing.assert_allclose(logits_BTV, logits(params, edits=edit), atol=2e-5)  # measured: 0
    np.testing.assert_allclose(jax.vmap(run)(directions), found, atol=2e-5)  # measured: 4e-6, logits to 9
    slope = jax.grad(lambda direction: run(direction)[:, -1, 5].sum())(directions[0])
    direct = jax.grad(lambda v: research.forward(
        CONFIG, params, TOKENS, edits=research.add("h1/resid_pre", v, positions=slice(3, None))
    )[0].logits[:, -1, 5].sum())(directions[0])  # fmt: skip
    np.testing.assert_allclose(slope, direct, atol=2e-5)  # measured: 1e-6


def test_a_callable_pytree_is_a_tap(params):
    """Its arrays are data, as those of a Partial."""
    rng, labels = np.random.default_rng(3), [0, 1] * 30
    erasers = [research.leace(rng.normal(0, 1, (60, CONFIG.n_embd)).astype(np.float32), labels) for _ in range(2)]
    found, compiled = logits(params, taps={"h1/resid_pre": erasers[0]}), len(COMPILATIONS)
    other = logits(params, taps={"h1/resid_pre": erasers[1]})
    assert len(COMPILATIONS) == compiled
    assert not np.array_equal(found, other)
    _, seen = research.forward(CONFIG, params, TOKENS, capture="h1/resid_pre")
    replaced = research.replace("h1/resid_pre", erasers[0](seen["h1/resid_pre"]))
    np.testing.assert_allclose(found, logits(params, edits=replaced), atol=2e-5)  # measured: 2e-6
    assert gpt2_jax.generate(CONFIG, params, [[1, 2]], 3, taps={"h1/resid_pre": erasers[0]})


def test_a_tap_sees_the_positions_of_real_tokens(params):
    """On both sides of padding, and over the calls of a cache."""
    mask_BT, at = np.arange(7) >= np.array([0, 2, 5])[:, None], []
    tap = {"h0/mlp/out": lambda value, position_BT: jax.debug.callback(at.append, position_BT)}
    for mask in (mask_BT, mask_BT[:, ::-1]):
        research.forward(CONFIG, params, TOKENS, mask, taps=tap)
        jax.effects_barrier()
        assert np.asarray(at.pop())[mask].tolist() == (mask.cumsum(-1) - 1)[mask].tolist()
    cache = gpt2_jax.init_cache(CONFIG, 3, 9)
    for span in (slice(0, 4), slice(4, 7)):
        out, _ = research.forward(CONFIG, params, TOKENS[:, span], mask_BT[:, span], cache=cache, taps=tap)
        cache = out.cache
        jax.effects_barrier()
        mask, whole = mask_BT[:, span], (mask_BT.cumsum(-1) - 1)[:, span]
        assert np.asarray(at.pop())[mask].tolist() == whole[mask].tolist()


# --- the other passes ------------------------------------------------------------------------------------------------


def double(value, position_BT):
    return value * jnp.where(position_BT >= 4, 2, 1)[..., None]


DOUBLED = {"taps": {"mlp/out": double}}
THE_SAME = {"edits": research.scale("mlp/out", 2, positions=slice(4, None))}


def test_generate_and_stream_take_taps(params):
    rows = gpt2_jax.generate(CONFIG, params, PROMPTS, 9, **GREEDY, **DOUBLED)
    assert rows == gpt2_jax.generate(CONFIG, params, PROMPTS, 9, **GREEDY, **THE_SAME)
    assert rows != gpt2_jax.generate(CONFIG, params, PROMPTS, 9, **GREEDY)


def test_stream_takes_taps(tokenizer):
    params = random_params(TEXT_CONFIG, 2)
    pieces = [
        "".join(gpt2_jax.stream(TEXT_CONFIG, params, [1, 2, 3, 4], tokenizer, 12, **GREEDY, **how))
        for how in (DOUBLED, THE_SAME, {})
    ]
    assert pieces[0] == pieces[1] != pieces[2]
    with pytest.raises(ValueError, match="mlp/pots"):  # in the call, before the first piece
        gpt2_jax.stream(TEXT_CONFIG, params, [1], tokenizer, taps={"mlp/pots": double})


def test_score_and_evaluations_take_taps(params, tokenizer):
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 1] + [[*range(37), 3, 4, 5]]
    found, expected, plain = (gpt2_jax.score(CONFIG, params, prompts, **how) for how in (DOUBLED, THE_SAME, {}))
    for ours, theirs, without in zip(found, expected, plain, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)  # measured: 0
        assert abs(ours.logprobs - without.logprobs).max() > 0.01
    params = random_params(TEXT_CONFIG, 2)
    kinds = (DOUBLED, THE_SAME, {})
    values = [perplexity(TEXT_CONFIG, params, tokenizer, ["some text"], **how).perplexity for how in kinds]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert values[0] != pytest.approx(values[2], rel=1e-3)


def test_other_arrays_compile_nothing_in_generation(params):
    def push(direction_D, value, position_BT):
        return value + direction_D

    def run(seed):
        direction_D = np.random.default_rng(seed).normal(0, 3, CONFIG.n_embd).astype(np.float32)
        return gpt2_jax.generate(CONFIG, params, PROMPTS, 9, **GREEDY, taps={"resid_pre": Partial(push, direction_D)})

    first, n_compiled = run(0), len(COMPILATIONS)
    assert run(1) != first
    assert len(COMPILATIONS) == n_compiled
