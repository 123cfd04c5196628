"""Beyond n_ctx: `overflow="slide"` cuts the window to half when it is full. Nothing else changes."""

import naive_generation as naive
import numpy as np
import pytest
from strength import campaign
from tiny_models import CONFIG, random_params

import gpt2_jax

PROMPTS = [[5], list(range(37)), [7] * 19, [3, 1, 4, 1, 5, 9, 2, 6], [0, 36] * 20, [8] * 29, [1, 2]]
UNTOUCHED = {"wte": object()}  # JAX cannot trace this: any attempt raises TypeError


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0)


def slide(params, prompts, n, config=CONFIG, **settings):
    return gpt2_jax.generate(config, params, prompts, n, overflow="slide", **{"temperature": 0} | settings)


def test_ragged_batches_equal_windows_that_are_run_anew(params):
    """Rows that exceed n_ctx at different times, twice each: every token equals the slow loop's over its own window."""
    rows = slide(params, PROMPTS, 71)
    assert rows == [naive.greedy(CONFIG, params, *pair) for pair in zip(PROMPTS, rows, strict=True)]
    assert [len(row) for row in rows] == [71] * len(PROMPTS)


def test_sampled_rows_equal_windows_that_are_run_anew(params):
    """The same for draws, with all settings in use: a slide changes no key, and the penalty still counts all tokens."""
    knobs = {"temperature": 1.3, "top_k": 17, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2}
    rows = slide(params, PROMPTS, 53, seed=9, **knobs)
    assert rows == [
        naive.sampled(CONFIG, params, prompt, row, i, 9, **knobs)
        for i, (prompt, row) in enumerate(zip(PROMPTS, rows, strict=True))
    ]


def test_the_penalty_counts_tokens_that_left_the_window(params):
    """Greedy with a penalty over three slides: all tokens of the row count, also those outside the window."""
    rows = slide(params, PROMPTS[:3], 97, repetition_penalty=1.5)
    assert rows == [naive.greedy(CONFIG, params, *pair, 1.5) for pair in zip(PROMPTS[:3], rows, strict=True)]


@pytest.mark.parametrize("length", campaign([41, 42, 62, 63, 207], [40, 41, 42, 43, 61, 62, 63, 64, 83, 84, 207]))
def test_prompts_longer_than_the_context(params, length):
    """A prompt of any length is cut to the window that a row of its length has, next to a prompt that is not."""
    prompts = [np.random.default_rng(length).integers(0, CONFIG.n_vocab, length).tolist(), [1, 2, 3]]
    rows = slide(params, prompts, 29)
    assert rows == [naive.greedy(CONFIG, params, *pair) for pair in zip(prompts, rows, strict=True)]


def test_a_call_goes_on_where_another_ended(params):
    """Two calls, where the second continues the first, equal one call, for any cut."""
    whole = slide(params, PROMPTS[:3], 83)
    for n in campaign((4, 39, 62), (1, 3, 4, 5, 22, 39, 40, 41, 60, 61, 62, 82)):
        longer = [prompt + row[:n] for prompt, row in zip(PROMPTS[:3], whole, strict=True)]
        assert slide(params, longer, 83 - n) == [row[n:] for row in whole], n


def test_rows_slide_for_themselves(params):
    """A row gives the same alone and in a batch, greedy and sampled: its slides depend only on its own length."""
    for settings in ({}, {"temperature": 1.2, "seed": 3}):
        rows = slide(params, PROMPTS, 47, **settings)
        assert slide(params, PROMPTS[:1], 47, **settings) == rows[:1]
        assert slide(params, PROMPTS[:3], 47, **settings) == rows[:3]
        others = [[9] * (5 * b + 1) for b in range(6)]
        assert slide(params, [*others, PROMPTS[6]], 47, **settings)[6] == rows[6]


def test_sliding_changes_nothing_where_all_fits(params):
    """Within n_ctx both values of overflow give the same, up to the last position."""
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[3]]
    for settings in ({"temperature": 0}, {"seed": 2, "temperature": 1.0}):
        expected = gpt2_jax.generate(CONFIG, params, prompts, 22, **settings)
        assert slide(params, prompts, 22, **settings) == expected


@pytest.mark.parametrize("n_ctx", campaign([1, 3], [1, 2, 3, 5]))
def test_tiny_contexts(n_ctx):
    """Models with very short contexts slide at nearly every token, and every token is correct."""
    config = gpt2_jax.GPT2Config(n_vocab=37, n_ctx=n_ctx, n_embd=6, n_head=2, n_layer=1)
    params = random_params(config, n_ctx)
    for prompt in ([5], [3, 1, 4, 1, 5, 9, 2], [36, 0]):
        [row] = slide(params, [prompt], 19, config=config)
        assert row == naive.greedy(config, params, prompt, row)


def test_stops_while_sliding(params):
    """Stop ids end rows before, at and after slides. The other rows are not affected."""
    whole = slide(params, PROMPTS, 71, temperature=1.5, seed=5)
    rng = np.random.default_rng(2)
    lengths = set()
    for _ in range(campaign(5, 23)):
        stop_ids = rng.choice(CONFIG.n_vocab, 2, replace=False).tolist()
        rows = slide(params, PROMPTS, 71, temperature=1.5, seed=5, stop_ids=stop_ids)
        assert rows == [naive.cut_at_ids(row, stop_ids) for row in whole], stop_ids
        lengths |= {len(row) for row in rows}
    assert min(lengths) < 4
    assert max(lengths) > 40


def test_five_thousand_tokens(params):
    """A row of 122 contexts has the requested length, and every checked token is correct."""
    prompt = PROMPTS[3]
    [row] = slide(params, [prompt], 5000, temperature=1.5, seed=7)
    assert len(row) == 5000
    assert len(set(row[-500:])) > 9  # still varied text, not one repeated token
    looked_at = [*range(30, 80), *range(100, 4990, 97), *range(4990, 5000)]
    for t in looked_at:
        seen = [*prompt, *row[:t]]
        # The slow loop draws this token from the tokens before it, as token 0 of a row that begins at t.
        logits = naive.logits_before(CONFIG, params, seen, row[t : t + 1])
        assert draw(logits, 1.5, seed=7, t=t) == row[t], t


def draw(logits_1V, temperature, seed, t):
    """The t-th draw of row 0, by hand: the Gumbel trick with the key of the seed, the row and t."""
    import jax

    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), t)
    return int(np.argmax(logits_1V[0] / temperature + np.asarray(jax.random.gumbel(key, logits_1V.shape[1:]))))


# ---- rejected arguments


def test_too_long_is_an_error_unless_sliding_is_asked_for(params):
    """By default, and with overflow="error", what does not fit n_ctx is rejected before tracing; the message says how
    to continue."""
    for settings in ({}, {"overflow": "error"}):
        with pytest.raises(ValueError, match=r"n_ctx.*41") as caught:
            gpt2_jax.generate(CONFIG, UNTOUCHED, [[1] * 20], 22, **settings)
        assert "slide" in str(caught.value)
        with pytest.raises(ValueError, match="n_ctx"):
            gpt2_jax.generate(CONFIG, UNTOUCHED, [[1] * 42], 0, **settings)


@pytest.mark.parametrize("word", ["crop", "Slide", "", None, True, 1])
def test_other_words_for_overflow_are_refused(word):
    """The message has the argument, the value, and the two allowed values."""
    with pytest.raises(ValueError, match="overflow") as caught:
        gpt2_jax.generate(CONFIG, UNTOUCHED, [[1]], 3, overflow=word)
    assert all(known in str(caught.value) for known in ("error", "slide", repr(word)))
