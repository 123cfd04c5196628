"""Head scores: those of known heads, and those of any heads compared with loops over the patterns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forward import CONFIG, padding_masks, some_tokens
from toy_induction import INDUCTION, PREVIOUS, induction_toy

import gpt2_jax
from gpt2_jax import edits
from gpt2_jax.changes import Changes
from gpt2_jax.research import heads
from gpt2_jax.research._forward import forward

SCORES = ("previous", "duplicate", "induction")


def test_the_toys_heads_are_found_and_no_others():
    config, params = induction_toy()
    tokens = heads.repeated_tokens(config, jax.random.key(3), 7, 8)
    found = heads.head_scores(config, params, tokens)
    for scores, known in ((found.previous, PREVIOUS), (found.induction, INDUCTION)):
        assert scores[known] > 0.999  # measured: 1.0
        assert np.delete(np.asarray(scores).ravel(), 3 * known[0] + known[1]).max() < 0.2  # uniform attention: 0.16
    assert found.duplicate.max() < 0.1  # 0.08


def by_hand(pattern_BNTS, tokens, mask):
    """Compute the three scores [N] of one layer in loops."""
    attention = {name: [] for name in SCORES}
    for weights_NTS, row, real in zip(pattern_BNTS, tokens, mask, strict=True):
        slots = np.flatnonzero(real)
        for t, slot in enumerate(slots):
            chosen = {
                "previous": [t - 1] if t else [],
                "duplicate": [s for s in range(t) if row[slots[s]] == row[slot]],
                "induction": [s for s in range(1, t) if row[slots[s - 1]] == row[slot]],
            }
            for name, places in chosen.items():
                if places:
                    attention[name].append(weights_NTS[:, slot, slots[places]].sum(-1))
    return {name: np.mean(sums, axis=0) for name, sums in attention.items()}


@pytest.mark.parametrize("where", ["nowhere", "left", "right", "holes"])
def test_scores_are_means_over_the_patterns(params, where):
    mask = padding_masks(17)[where] if where != "nowhere" else np.ones((3, 17), bool)
    tokens = np.where(mask, some_tokens(CONFIG, 3, 17) % 5, 2)  # 5 ids: many duplicates, also in the padding
    found = heads.head_scores(CONFIG, params, tokens, None if where == "nowhere" else mask)
    _, captured = forward(CONFIG, params, tokens, mask, capture="pattern")
    for layer in range(3):
        expected = by_hand(np.asarray(captured[f"h{layer}/attn/pattern"], np.float64), tokens, mask)
        for name in SCORES:  # measured: 3e-8
            np.testing.assert_allclose(getattr(found, name)[layer], expected[name], rtol=0, atol=1e-6, err_msg=name)


def test_an_edited_pattern_is_what_is_scored(params):
    tokens = some_tokens(CONFIG, 2, 7)
    before = np.eye(7, k=-1, dtype=np.float32)
    found = heads.head_scores(CONFIG, params, tokens, edits=edits.replace("h1/attn/pattern", before, heads=2))
    assert found.previous[1, 2] == 1
    assert (found.previous[1, :2] < 0.9).all()


def test_a_tap_of_the_pattern_is_what_is_scored(params):
    """The patterns of layer 1 become uniform over all tokens up to the query's, as they are after masking."""
    tokens = some_tokens(CONFIG, 2, 9)
    taps = {"h1/attn/pattern": _uniform}
    found = heads.head_scores(CONFIG, params, tokens, taps=taps).previous
    to = {"previous": np.eye(9, k=-1, dtype=bool)}
    for scores in (found, heads.mean_attention(CONFIG, params, tokens, to=to, taps=taps)["previous"]):
        np.testing.assert_allclose(scores[1], np.mean(1 / np.arange(2, 10)), rtol=1e-6)
    np.testing.assert_array_equal(found[0], heads.head_scores(CONFIG, params, tokens).previous[0])


def _uniform(pattern, position_BT):
    return jnp.ones_like(pattern) / (position_BT[:, None, :, None] + 1)


def test_attention_to_tokens_of_ones_choice(params):
    """Attention to the first token, only for tokens 3 and 5; and to later tokens, which are masked."""
    tokens = some_tokens(CONFIG, 3, 11)
    first, later = np.zeros((11, 11), bool), np.triu(np.ones((3, 11, 11), bool), k=1)
    first[[3, 5], 0] = True
    found = heads.mean_attention(CONFIG, params, tokens, to={"later": later, "first": first})
    _, captured = forward(CONFIG, params, tokens, capture="pattern")
    patterns = np.stack([np.asarray(pattern) for pattern in captured.values()])
    assert list(found) == ["later", "first"]
    expected = patterns[:, :, :, [3, 5], 0].mean((1, 3))
    np.testing.assert_allclose(found["first"], expected, rtol=0, atol=1e-6)  # measured: 3e-8
    assert np.isnan(found["later"]).all()


def test_patterns_do_not_pile_up():
    config = gpt2_jax.GPT2Config(n_vocab=5, n_ctx=256, n_embd=6, n_head=3, n_layer=11)
    tokens, params = jax.ShapeDtypeStruct((1, 256), jnp.int32), gpt2_jax.abstract_params(config)
    program = heads._head_scores.lower(config, params, tokens, None, Changes()).compile()
    one_layer = 4 * 3 * 256 * 256
    assert program.memory_analysis().temp_size_in_bytes < 4 * one_layer  # measured: 3.0; 11 patterns would be 11


def test_it_works_inside_other_programs(params):
    tokens = jnp.asarray(some_tokens(CONFIG, 3, 11))
    plain = heads.head_scores(CONFIG, params, tokens)
    jitted = jax.jit(functools.partial(heads.head_scores, CONFIG))(params, tokens)
    slope = jax.grad(
        lambda gain: heads.head_scores(CONFIG, params, tokens, edits=edits.scale("h1/attn/q", gain, heads=1)).previous[
            1, 1
        ]
    )(1.0)
    np.testing.assert_allclose(jitted.previous, plain.previous, rtol=0, atol=1e-6)
    assert np.isfinite(slope)
    assert slope != 0


@pytest.mark.parametrize(("n_rows", "n_tokens", "first"), [(1, 1, None), (23, 9, 18), (7, 9, 0), (5, 9, None)])
def test_repeated_tokens_repeat_what_differs(n_rows, n_tokens, first):
    config = gpt2_jax.GPT2Config(n_vocab=19, n_ctx=19, n_embd=2, n_head=1, n_layer=1)
    rows = np.asarray(heads.repeated_tokens(config, jax.random.key(11), n_rows, n_tokens, first))
    start = 0 if first is None else 1
    assert rows.shape == (n_rows, start + 2 * n_tokens)
    assert (rows[:, :start] == first).all()
    once, again = np.split(rows[:, start:], 2, axis=1)
    np.testing.assert_array_equal(once, again)
    assert all(len(set(row)) == start + n_tokens for row in rows)
    assert ((rows >= 0) & (rows < 19)).all()


def test_rows_and_keys_have_tokens_of_their_own():
    config = gpt2_jax.GPT2Config(n_vocab=997, n_ctx=99, n_embd=2, n_head=1, n_layer=1)
    first, second = (np.asarray(heads.repeated_tokens(config, jax.random.key(seed), 2, 47)) for seed in (0, 1))
    assert len({tuple(row) for row in (*first, *second)}) == 4
    np.testing.assert_array_equal(first, heads.repeated_tokens(config, jax.random.key(0), 2, 47))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"n_rows": 0}, "n_rows must be a whole number, 1 or more, not 0"),
        ({"n_tokens": 2.0}, "n_tokens must be a whole number, 1 or more, not 2.0"),
        ({"key": 7}, r"key must be a key, jax.random.key\(seed\), not 7"),
        ({"first": 53}, "first must be a whole number, from 0 to 52, not 53"),
        ({"n_tokens": 12}, "two copies of 12 different tokens do not fit the model's n_vocab of 53 and n_ctx of 23"),
        ({"n_tokens": 11, "first": 1, "config": CONFIG.replace(n_ctx=22)}, "do not fit"),
        ({"n_tokens": 11, "config": CONFIG.replace(n_vocab=10)}, "do not fit"),
    ],
)
def test_rows_that_cannot_be_are_refused(change, told):
    with pytest.raises(ValueError, match=told):
        heads.repeated_tokens(**({"config": CONFIG, "key": jax.random.key(0), "n_rows": 3, "n_tokens": 5} | change))


def test_a_mask_of_another_shape_is_refused(params):
    with pytest.raises(ValueError, match=r"mask must be bool\(3, 5\), like the tokens, not of shape \(3, 4\)"):
        heads.head_scores(CONFIG, params, some_tokens(CONFIG, 3, 5), np.ones((3, 4), bool))


def test_choices_of_another_shape_or_kind_are_refused(params):
    for chosen in (np.ones((3, 5, 4), bool), np.ones((3, 5, 5), np.float32), np.ones((2, 5, 5), bool)):
        with pytest.raises(ValueError, match=r"to\['x'\] must be bool\[3, 5, 5\], not"):
            heads.mean_attention(CONFIG, params, some_tokens(CONFIG, 3, 5), to={"x": chosen})
