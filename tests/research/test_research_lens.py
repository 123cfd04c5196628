"""The logit lens: what it reads after layer i is the output of a model of the first i layers, computed in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from forward import CONFIG, in_bfloat16, padding_masks, relative_error, some_tokens

import gpt2_jax
from gpt2_jax import edits
from gpt2_jax.changes import Changes
from gpt2_jax.research import lens
from gpt2_jax.research._forward import forward

NAMES = ("h0/resid_pre", "h0/resid_post", "h1/resid_post", "h2/resid_post")


def truth(params, tokens, mask=None):
    """Return the log-probabilities [L, B, T, V] of the models of 0, 1, 2 and 3 layers, in float64."""
    layers = []
    for n in range(CONFIG.n_layer + 1):
        first = {name: leaf for name, leaf in params.items() if name not in {f"h{i}" for i in range(n, 3)}}
        logits = numpy_reference.forward(first, tokens, CONFIG.n_head, mask)
        layers.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return np.stack(layers)


def test_the_last_stream_gives_the_models_logits_to_the_bit(params):
    out, captured = forward(CONFIG, params, some_tokens(CONFIG, 3, 17), capture="resid_post")
    np.testing.assert_array_equal(lens.stream_logits(CONFIG, params, captured["h2/resid_post"]), out.logits)
    assert not np.array_equal(lens.stream_logits(CONFIG, params, captured["h1/resid_post"]), out.logits)


def test_in_bfloat16_the_last_stream_gives_them_up_to_its_rounding(params):
    """XLA does not round values to bfloat16 that it keeps in registers, such as the stream before ln_f."""
    config = in_bfloat16(CONFIG)
    out, captured = forward(config, params, some_tokens(config, 3, 17), capture="h2/resid_post")
    logits = lens.stream_logits(config, params, captured["h2/resid_post"])
    assert relative_error(np.asarray(logits), np.asarray(out.logits)) < 1e-2  # measured: 4e-3


def test_every_layer_is_read_as_if_it_were_the_last(params):
    tokens = some_tokens(CONFIG, 3, 17)
    found, expected = lens.logit_lens(CONFIG, params, tokens, k=7), truth(params, tokens)
    assert found.names == NAMES
    np.testing.assert_array_equal(found.ids, np.argsort(-expected, axis=-1)[..., :7])
    best = -np.sort(-expected, axis=-1)[..., :7]
    np.testing.assert_allclose(found.logprobs, best, rtol=0, atol=3e-6)  # measured: 8e-7
    following = np.broadcast_to(tokens[:, 1:, None], (4, 3, 16, 1))
    logprob = np.take_along_axis(expected[:, :, :-1], following, -1)
    np.testing.assert_allclose(found.next_logprobs[:, :, :-1], logprob[..., 0], rtol=0, atol=3e-6)
    np.testing.assert_array_equal(found.next_ranks[:, :, :-1], (expected[:, :, :-1] > logprob).sum(-1))
    assert np.isnan(found.next_logprobs[:, :, -1]).all()
    assert (found.next_ranks[:, :, -1] == -1).all()


@pytest.mark.parametrize("where", ["left", "right", "holes"])
def test_padding_is_neither_read_nor_predicted(params, where):
    """A padded row's tokens have the values of the row without padding. Its next token is the next real token."""
    mask, tokens = padding_masks(17)[where], some_tokens(CONFIG, 3, 17, seed=2)
    padded = lens.logit_lens(CONFIG, params, np.where(mask, tokens, 0), mask)
    expected = truth(params, tokens, mask)
    best = -np.sort(-expected, axis=-1)[..., :5]
    np.testing.assert_allclose(np.asarray(padded.logprobs)[:, mask], best[:, mask], rtol=0, atol=3e-6)
    for b in range(3):
        row, real = tokens[b, mask[b]], np.asarray(padded.next_logprobs)[:, b, mask[b]]
        logprobs = expected[:, b, mask[b]]
        np.testing.assert_allclose(real[:, :-1], logprobs[:, np.arange(len(row) - 1), row[1:]], rtol=0, atol=3e-6)
        assert np.isnan(real[:, -1]).all()
    assert np.isnan(np.asarray(padded.next_logprobs)[:, ~mask]).all()
    assert (np.asarray(padded.next_ranks)[:, ~mask] == -1).all()


def test_chunks_do_not_show(params, monkeypatch):
    tokens = some_tokens(CONFIG, 2, 19)
    whole = lens.logit_lens(CONFIG, params, tokens, k=3)
    monkeypatch.setattr(lens, "CHUNK", 7)  # 4 x 2 x 19 positions: 21 chunks, and 5 positions are left
    lens._read.clear_cache()
    parts = lens.logit_lens(CONFIG, params, tokens, k=3)
    lens._read.clear_cache()
    np.testing.assert_array_equal(whole.ids, parts.ids)
    np.testing.assert_allclose(whole.next_logprobs, parts.next_logprobs, rtol=0, atol=3e-6)  # measured: 1e-6


def test_the_logits_of_all_layers_never_exist_at_once():
    config = gpt2_jax.GPT2Config(n_vocab=4999, n_ctx=256, n_embd=8, n_head=1, n_layer=7)
    tokens, params = jax.ShapeDtypeStruct((1, 256), jnp.int32), gpt2_jax.abstract_params(config)
    names = tuple(f"h{i}/resid_post" for i in range(7))
    program = lens._read.lower(config, names, 5, params, tokens, None, Changes()).compile()
    one_layer = 4 * 256 * config.n_vocab  # as large as a chunk
    assert program.memory_analysis().temp_size_in_bytes < 3 * one_layer  # measured: 2.0, or 16 without chunks


def test_edits_and_names_are_forwards_own(params):
    tokens = some_tokens(CONFIG, 3, 11)
    edit = edits.scale("h1/attn/z", 0.0, positions=5, heads=2)
    found = lens.logit_lens(CONFIG, params, tokens, names=["resid_mid", "^embed$"], k=CONFIG.n_vocab, edits=edit)
    assert found.names == ("embed", "h0/resid_mid", "h1/resid_mid", "h2/resid_mid")
    _, captured = forward(CONFIG, params, tokens, capture=["resid_mid", "^embed$"], edits=edit)
    for i, name in enumerate(found.names):
        logprobs = jax.nn.log_softmax(lens.stream_logits(CONFIG, params, captured[name]))
        best = -np.sort(-np.asarray(logprobs), axis=-1)
        np.testing.assert_allclose(found.logprobs[i], best, rtol=0, atol=3e-6)  # measured: 1e-6
    plain = lens.logit_lens(CONFIG, params, tokens, names="resid_mid", k=1)
    assert (np.asarray(plain.logprobs[1]) != found.logprobs[2, ..., :1])[:, 5:].any()


def test_a_tap_is_what_it_does_to_the_stream(params):
    tokens = some_tokens(CONFIG, 3, 11)
    tapped = lens.logit_lens(CONFIG, params, tokens, taps={r"h\d/mlp/out": _doubled})
    edited = lens.logit_lens(CONFIG, params, tokens, edits=edits.scale("mlp/out", 2.0))
    np.testing.assert_allclose(tapped.logprobs, edited.logprobs, rtol=0, atol=3e-6)  # measured: 0
    assert (np.asarray(tapped.logprobs) != lens.logit_lens(CONFIG, params, tokens).logprobs).any()
    with pytest.raises(ValueError, match="position 11"):
        lens.logit_lens(CONFIG, params, tokens, edits=edits.scale("mlp/out", 2.0, positions=11))


def _doubled(value, position_BT):
    return 2 * value


def test_it_works_inside_other_programs(params):
    tokens = jnp.asarray(some_tokens(CONFIG, 3, 11))
    plain = lens.logit_lens(CONFIG, params, tokens)
    jitted = jax.jit(functools.partial(lens.logit_lens, CONFIG))(params, tokens)
    mapped = jax.vmap(lambda row: lens.logit_lens(CONFIG, params, row[None]))(tokens)
    np.testing.assert_allclose(jitted.logprobs, plain.logprobs, rtol=0, atol=3e-6)  # measured: 0
    np.testing.assert_allclose(mapped.logprobs[:, :, 0].swapaxes(0, 1), plain.logprobs, rtol=0, atol=3e-6)
    beyond = jax.jit(functools.partial(lens.logit_lens, CONFIG))(params, tokens.at[0, 4].set(CONFIG.n_vocab))
    assert np.isnan(beyond.next_logprobs[:, 0, 3]).all()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"k": 0}, "k must be a whole number, from 1 to 53, not 0"),
        ({"k": 54}, "not 54"),
        ({"k": True}, "not True"),
        ({"names": "attn/z"}, "h0/attn/z cannot be read as the residual stream: its axes are BTNH"),
        ({"names": "h7"}, "no activation name matches 'h7'"),
        ({"tokens_BT": [[1, 99]]}, "id 99"),
        ({"edits": edits.scale("h0/attn/z", 0.0, heads=3)}, "heads"),
    ],
)
def test_bad_arguments_are_refused(params, change, told):
    with pytest.raises(ValueError, match=told):
        lens.logit_lens(CONFIG, params, **({"tokens_BT": [[1, 2, 3]]} | change))


def test_a_stream_of_another_width_is_refused(params):
    with pytest.raises(ValueError, match=r"the stream must have the shape \[..., 21\] \(n_embd\), not \(3, 20\)"):
        lens.stream_logits(CONFIG, params, np.zeros((3, 20), np.float32))
