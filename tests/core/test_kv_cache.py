"""A cache in two parts gives the results of a cache in one part. Its rows can be replaced one by one."""

import jax
import numpy as np
import pytest
from forward import CONFIG, cached_step, logits_of, relative_error, some_tokens

import gpt2_jax
from gpt2_jax import kv_cache
from gpt2_jax.changes import NO_CHANGES
from gpt2_jax.generation.buckets import bucket_length, bucket_rows

insert, merge = jax.jit(kv_cache.insert), jax.jit(kv_cache.merge)


def step(params, tokens_BT, cache, mask_BT=None):
    logits_BTV, cache = cached_step(CONFIG, params, tokens_BT, mask_BT, cache)
    return np.asarray(logits_BTV), cache


def packed(params, tokens_BT, lengths, slots):
    """A cache with `lengths[b]` tokens in row b's first slots."""
    mask_BT = np.arange(tokens_BT.shape[1]) < np.array(lengths)[:, None]
    _, cache = step(params, tokens_BT, gpt2_jax.init_cache(CONFIG, len(tokens_BT), tokens_BT.shape[1]), mask_BT)
    empty = gpt2_jax.init_cache(CONFIG, len(tokens_BT), slots)
    return insert(empty, cache, np.arange(len(tokens_BT)))


def test_two_parts_are_one(params):
    """Rows of several lengths, with the next tokens in a separate part, merged and continued: equal to whole rows."""
    tokens_BT = some_tokens(CONFIG, 3, 17)
    whole_BTV = logits_of(CONFIG, params, tokens_BT)
    lengths = [7, 1, 5]
    past = packed(params, tokens_BT[:, :7], lengths, slots=7 + 2 * 3)
    for n_merged in (0, 3):
        recent = gpt2_jax.init_cache(CONFIG, 3, 3).replace(past=past)
        for i in range(3):
            next_B1 = np.stack([tokens_BT[b, n + n_merged + i] for b, n in enumerate(lengths)])[:, None]
            logits_B1V, recent = step(params, next_B1, recent)
            for b, n in enumerate(lengths):
                assert relative_error(logits_B1V[b, 0], whole_BTV[b, n + n_merged + i]) < 3e-6  # measured 5.6e-7
        assert np.array_equal(recent.n_tokens_B, np.array(lengths) + n_merged + 3)
        past = merge(past, recent.replace(past=None))
        assert np.array_equal(past.n_tokens_B, recent.n_tokens_B)
        assert np.array_equal(past.mask_BS, np.arange(past.n_slots) < np.asarray(past.n_tokens_B)[:, None])


def test_rows_are_replaced_and_the_others_stay(params):
    tokens_BT = some_tokens(CONFIG, 4, 11)
    cache = packed(params, tokens_BT, [11, 3, 7, 2], slots=13)
    other = packed(params, tokens_BT[::-1][:2], [1, 5], slots=11)
    after = insert(cache, other, np.array([2, 0]))
    assert np.asarray(after.n_tokens_B).tolist() == [5, 3, 1, 2]
    for b, source, row in ((0, other, 1), (1, cache, 1), (2, other, 0), (3, cache, 3)):
        n = int(after.n_tokens_B[b])
        for layer in range(CONFIG.n_layer):
            assert np.array_equal(after.k_BNHS[layer][b, ..., :n], source.k_BNHS[layer][row, ..., :n])
            assert np.array_equal(after.v_BNSH[layer][b, :, :n], source.v_BNSH[layer][row, :, :n])


@pytest.mark.parametrize("fixed", [False, True])
def test_what_decoding_reads_it_does_not_copy(params, fixed):
    """The decoding loop does not update the long part: it makes no copy, and no other value, of its shape."""
    from gpt2_jax.generation import programs
    from gpt2_jax.sampling import Sampling

    model, n_slots = gpt2_jax.GPT2(CONFIG), 89
    past, h_BD = programs.empty(model, 3, n_slots)
    row_B = np.arange(3, dtype=np.uint32)
    none_B, sampling, stop_ids = np.zeros(3, bool), Sampling(np.float32(1)), np.array([-2], np.int32)
    seen_BV = np.zeros((3, CONFIG.n_vocab), bool)
    state, _ = programs.first(model, params, h_BD, seen_BV, none_B, row_B, np.uint32(0), sampling, stop_ids, None)
    knobs = (sampling, stop_ids, np.int32(3), None, fixed)
    compiled = programs.decode.lower(model, params, NO_CHANGES, past, state, none_B, *knobs).compile()
    shapes = [
        f"f32[3,{CONFIG.n_head},{CONFIG.head_dim},{n_slots}]",
        f"f32[3,{CONFIG.n_head},{n_slots},{CONFIG.head_dim}]",
    ]
    lines = [line for line in compiled.as_text().splitlines() if any(f"= {shape}" in line for shape in shapes)]
    assert [line for line in lines if "parameter(" not in line and "get-tuple-element(" not in line] == []
    assert lines
    one_array = past.k_BNHS[0].nbytes
    merged = programs.merge_recent.lower(past, state.recent).compile().memory_analysis()
    assert merged.temp_size_in_bytes < one_array  # in place


@pytest.mark.parametrize("bad", ["past of another model", "past of other rows"])
def test_a_past_that_does_not_fit_is_refused(params, bad):
    config = CONFIG.replace(n_layer=CONFIG.n_layer + 1) if "model" in bad else CONFIG
    past = gpt2_jax.init_cache(config, 2 if "rows" in bad else 3, 11)
    cache = gpt2_jax.init_cache(CONFIG, 3, 5).replace(past=past)
    with pytest.raises(ValueError, match="cache"):
        step(params, some_tokens(CONFIG, 3, 1), cache)


def test_buckets_are_few_and_large_enough():
    lengths = {bucket_length(n) for n in range(1, 1025)}
    assert sorted(lengths) == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    rows = {bucket_rows(n) for n in range(1, 65)}
    assert sorted(rows) == [1, 2, 4, 8, 12, 16, 24, 32, 48, 64]
    for n in range(1, 3000):
        assert n <= bucket_length(n) < max(33, 1.51 * n)
        assert n <= bucket_rows(n) < 2 * n
