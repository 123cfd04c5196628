"""generate: greedy equals the original id for id, sampling follows its rules, a row depends only on itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measures import COMPILATIONS
from strength import full_only
from tiny_models import CONFIG, chosen_logits, random_params

import gpt2_jax

# Prompts of many lengths, with the first and last ids of the vocabulary. A row must not depend on its place among them.
PROMPTS = [
    [5],
    [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9],
    [36, 0],
    [7] * 19,
    [2, 7, 1, 8, 2],
    [0],
    list(range(23)),
    [11] * 8,
]


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0)


def uncached(config, params, prompt, n):
    """The argmax loop over whole prefixes, padded to one shape. No position attends to the zeros after it."""
    apply = jax.jit(lambda tokens_BT: gpt2_jax.GPT2(config).apply({"params": params}, tokens_BT).logits)
    tokens = np.zeros((1, len(prompt) + n), np.int32)
    tokens[0, : len(prompt)] = prompt
    for at in range(len(prompt), len(prompt) + n):
        tokens[0, at] = np.argmax(apply(tokens)[0, at - 1])
    return tokens[0, len(prompt) :].tolist()


# ---- greedy


def test_greedy_equals_the_original(shakespeare, reference):
    """120 tokens of the two reference rows, id for id."""
    config, params = shakespeare
    prompts = reference["tokens"][:2, :9].tolist()
    assert gpt2_jax.generate(config, params, prompts, 120, temperature=0) == reference["greedy"][:, 9:].tolist()


@full_only("test_greedy_equals_the_original has the cached one")
def test_greedy_uncached_equals_the_original(shakespeare, reference):
    """The same from whole forward passes: the reference does not depend on the cache."""
    config, params = shakespeare
    for tokens, greedy in zip(reference["tokens"][:2, :9].tolist(), reference["greedy"], strict=True):
        assert uncached(config, params, tokens, 120) == greedy[9:].tolist()


def test_greedy_in_a_ragged_batch_equals_the_original(shakespeare, reference):
    """The reference rows among longer, shorter and one-token prompts: padding is masked."""
    config, params = shakespeare
    rows = reference["tokens"]
    prompts = [rows[3, :61], rows[0, :9], rows[2, :1], rows[1, :9], rows[2, :97], rows[3, :10]]
    new_ids = gpt2_jax.generate(config, params, [row.tolist() for row in prompts], 120, temperature=0)
    assert [new_ids[1], new_ids[3]] == reference["greedy"][:, 9:].tolist()
    assert [len(row) for row in new_ids] == [120] * 6


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_up_to_the_last_position(params, prompt):
    """Prompt and new tokens fill n_ctx exactly. The last token is as correct as the first."""
    n = CONFIG.n_ctx - len(prompt)
    assert gpt2_jax.generate(CONFIG, params, [prompt], n, temperature=0) == [uncached(CONFIG, params, prompt, n)]


def test_greedy_rows_equal_rows_alone(params):
    alone = [gpt2_jax.generate(CONFIG, params, [prompt], 17, temperature=0)[0] for prompt in PROMPTS]
    assert gpt2_jax.generate(CONFIG, params, PROMPTS, 17, temperature=0) == alone
    assert gpt2_jax.generate(CONFIG, params, PROMPTS[::-1], 17, temperature=0) == alone[::-1]


@pytest.mark.parametrize(
    "knobs",
    [{"top_k": 1}, {"top_p": 1e-6}, {"top_p": 1e-30}, {"temperature": 1e-5}, {"temperature": 1e-38},
     {"temperature": 0, "top_k": 5, "top_p": 0.5, "seed": 9}, {"temperature": 1e-38, "top_k": 3, "top_p": 0.9}],
    ids=str,
)  # fmt: skip
def test_narrow_sampling_is_greedy(params, knobs):
    """If one token is left to draw from, it is the most likely one. A temperature close to 0 does not overflow."""
    greedy = gpt2_jax.generate(CONFIG, params, PROMPTS, 17, temperature=0)
    assert gpt2_jax.generate(CONFIG, params, PROMPTS, 17, **knobs) == greedy


# ---- a row depends on the seed, its index and its prompt


@pytest.mark.parametrize("knobs", [{}, {"temperature": 1.7, "top_k": 11, "top_p": 0.9}], ids=str)
def test_sampled_row_ignores_its_neighbours(params, knobs):
    """Row i of a batch equals row i of any other batch: other rows, lengths, padding and batch size."""
    rows = gpt2_jax.generate(CONFIG, params, PROMPTS, 17, seed=5, **knobs)
    for i in (0, 2):
        fewer = [[1]] * i + [PROMPTS[i]]
        assert gpt2_jax.generate(CONFIG, params, fewer, 17, seed=5, **knobs)[i] == rows[i]
    for i, prompt in enumerate(PROMPTS):
        others = [[30 - j] * (24 - 2 * j) for j in range(11)]
        more = [*others[:i], prompt, *others[i + 1 :], [9] * 24]
        assert gpt2_jax.generate(CONFIG, params, more, 17, seed=5, **knobs)[i] == rows[i]


@full_only("the test above has a small model")
def test_sampled_row_of_the_embedded_model_ignores_its_neighbours(shakespeare, reference):
    config, params = shakespeare
    prompts = [row[: 9 + 17 * i].tolist() for i, row in enumerate(reference["tokens"])]
    rows = gpt2_jax.generate(config, params, prompts, 60, seed=11)
    others = [[1], [2] * 180, prompts[2], [4]]
    assert gpt2_jax.generate(config, params, others, 60, seed=11)[2] == rows[2]


def test_fewer_tokens_are_a_prefix_of_more(params):
    """The number of requested tokens does not change the tokens."""
    long = gpt2_jax.generate(CONFIG, params, PROMPTS, 17, seed=3)
    for n in (1, 2, 16):
        assert gpt2_jax.generate(CONFIG, params, PROMPTS, n, seed=3) == [row[:n] for row in long]


def test_earlier_calls_change_nothing(params):
    """No state between calls: the same call gives the same ids after calls with other seeds, shapes and weights."""
    first = gpt2_jax.generate(CONFIG, params, PROMPTS, 13, seed=7)
    gpt2_jax.generate(CONFIG, params, [[1, 2]], 5, seed=8)
    gpt2_jax.generate(CONFIG, random_params(CONFIG, 1), PROMPTS, 13, seed=7)
    np.random.seed(0)  # noqa: NPY002
    assert gpt2_jax.generate(CONFIG, params, PROMPTS, 13, seed=7) == first


def test_seeds_and_rows_differ(params):
    """Every seed and every row has its own draws, also rows with the same prompt, and seeds of 2**31 or more."""
    prompts = [[5, 6, 7]] * 5
    draws = [gpt2_jax.generate(CONFIG, params, prompts, 19, seed=seed) for seed in (0, 1, 2, 2**31, 2**32 - 1)]
    rows = [tuple(row) for rows in draws for row in rows]
    assert len(set(rows)) == len(rows) == 25
    assert gpt2_jax.generate(CONFIG, params, prompts, 19) == draws[0]


def test_steps_of_a_row_draw_independently():
    """With equal logits, no step repeats the draw of another step, and no row is a shifted copy of another."""
    config = gpt2_jax.GPT2Config(n_vocab=997, n_ctx=41, n_embd=2, n_head=1, n_layer=1)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), gpt2_jax.abstract_params(config))
    rows = np.array(gpt2_jax.generate(config, params, [[0]] * 31, 40, seed=1))
    for row in range(31):
        for shift in range(1, 5):
            assert np.mean(rows[row, shift:] == rows[row, :-shift]) < 0.2
            assert np.mean(rows[(row + 1) % 31, shift:] == rows[row, :-shift]) < 0.2
            assert np.mean(rows[(row + 1) % 31, :-shift] == rows[row, shift:]) < 0.2
    assert len(np.unique(rows)) > 600  # 997 (1 - exp(-1240 / 997)) = 710 expected


# ---- results


@pytest.mark.parametrize("n", [0, 1, 2, 17])
def test_exactly_as_many_tokens_as_asked(params, n):
    """`length` tokens for each row, as plain Python ints; zero is allowed and gives empty lists."""
    rows = gpt2_jax.generate(CONFIG, params, PROMPTS, max_new_tokens=n)
    assert isinstance(rows, list)
    assert all(isinstance(row, list) for row in rows)
    assert [len(row) for row in rows] == [n] * len(PROMPTS)
    assert all(type(i) is int for row in rows for i in row)


def test_default_length(params):
    assert [len(row) for row in gpt2_jax.generate(CONFIG, params, [[1], [2, 3]])] == [32, 32]


def test_never_stops_at_the_last_id():
    """As in the original, `<|endoftext|>`, the last id, is an ordinary token and does not end a row."""
    config, params = chosen_logits([0.0, 0.0, 9.0])
    assert gpt2_jax.generate(config, params, [[0], [2]], 5, temperature=0) == [[2] * 5] * 2


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    temperature=st.floats(0, 2.0**99, width=32),
    top_k=st.integers(0, CONFIG.n_vocab),
    top_p=st.floats(0, 1, exclude_min=True, width=32),
)
def test_ids_stay_in_the_vocabulary(params, seed, temperature, top_k, top_p):
    """With any sampling settings, every row has ids of the vocabulary."""
    rows = gpt2_jax.generate(CONFIG, params, PROMPTS, 5, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    assert all(len(row) == 5 and all(0 <= i < CONFIG.n_vocab for i in row) for row in rows)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.uint16])
def test_arrays_are_prompts(params, dtype):
    """NumPy and jax arrays of any integer type, tuples, and a 2-D array of equally long prompts."""
    expected = gpt2_jax.generate(CONFIG, params, PROMPTS, 5)
    assert gpt2_jax.generate(CONFIG, params, [np.array(prompt, dtype) for prompt in PROMPTS], 5) == expected
    assert gpt2_jax.generate(CONFIG, params, tuple(map(tuple, PROMPTS)), 5) == expected
    square = np.arange(15, dtype=dtype).reshape(3, 5)
    assert gpt2_jax.generate(CONFIG, params, square, 5) == gpt2_jax.generate(CONFIG, params, square.tolist(), 5)


def test_jax_arrays_are_prompts(params):
    square = jnp.arange(15).reshape(3, 5)
    expected = gpt2_jax.generate(CONFIG, params, square.tolist(), 5)
    assert (
        gpt2_jax.generate(CONFIG, params, square, 5) == gpt2_jax.generate(CONFIG, params, list(square), 5) == expected
    )


def test_numpy_scalars_are_numbers(params):
    """NumPy scalars work like Python numbers."""
    knobs = {"temperature": np.float32(0.5), "top_k": np.int64(7), "top_p": np.float64(0.75), "seed": np.uint32(3)}
    plain = {"temperature": 0.5, "top_k": 7, "top_p": 0.75, "seed": 3}
    expected = gpt2_jax.generate(CONFIG, params, PROMPTS, 5, **plain)
    assert gpt2_jax.generate(CONFIG, params, PROMPTS, np.int32(5), **knobs) == expected


# ---- compilation


def test_values_compile_nothing_new(params):
    """Settings, seeds, weights and prompt ids are traced: after one call of each kind of sampling, none compiles."""
    prompts = [[(3 * i + j) % CONFIG.n_vocab for j in range(i)] for i in (3, 7, 2)]
    turned = [prompt[::-1] for prompt in prompts]
    other = random_params(CONFIG, 2)
    knobs = [{"temperature": 0.5}, {"temperature": 2}, {"temperature": 0}, {"top_k": 3}, {"top_k": 20}, {"top_p": 0.5},
             {"top_p": 0.25}, {"seed": 1}, {"seed": 2**32 - 1},
             {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "seed": 3}]  # fmt: skip
    for kind in ({"temperature": 0}, {"top_p": 0.9}):
        gpt2_jax.generate(CONFIG, params, prompts, 9, **kind)
    first = gpt2_jax.generate(CONFIG, params, prompts, 9)
    compiled = {}
    for knob in knobs:
        before = len(COMPILATIONS)
        gpt2_jax.generate(CONFIG, params, prompts, 9, **knob)
        compiled[str(knob)] = len(COMPILATIONS) - before
    for what, weights, ids in [("params", other, prompts), ("prompts", params, turned)]:
        before = len(COMPILATIONS)
        assert gpt2_jax.generate(CONFIG, weights, ids, 9) != first
        compiled[what] = len(COMPILATIONS) - before
    assert {what: n for what, n in compiled.items() if n} == {}


def test_lengths_of_one_bucket_compile_nothing_new(params):
    """Prompts of 2 to 23 tokens use one program, and so do 9 and 17 new tokens."""
    gpt2_jax.generate(CONFIG, params, [PROMPTS[1], PROMPTS[2]], 9)
    before = len(COMPILATIONS)
    gpt2_jax.generate(CONFIG, params, [PROMPTS[3], PROMPTS[4]], 17)
    gpt2_jax.generate(CONFIG, params, [PROMPTS[0], PROMPTS[6]], 1)
    assert len(COMPILATIONS) == before


def test_a_new_shape_is_counted(params):
    """The counter of the test above works: a model of another shape does compile."""
    before = len(COMPILATIONS)
    config = gpt2_jax.GPT2Config(n_vocab=5, n_ctx=3, n_embd=2, n_head=1, n_layer=1)
    gpt2_jax.generate(config, random_params(config, 0), [[1]], 2)
    assert len(COMPILATIONS) > before
