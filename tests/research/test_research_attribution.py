"""Direct logit attribution: the parts sum to the logits, and each equals its definition, computed in NumPy."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from forward import CONFIG, in_bfloat16, padding_masks, relative_error, some_tokens
from toy_induction import INDUCTION, induction_toy

from gpt2_jax import edits
from gpt2_jax.research import attribution
from gpt2_jax.research._forward import forward
from gpt2_jax.research.attribution import logit_attribution

DIVISIONS = ["component", "head", "neuron"]
DOUBLE = dataclasses.replace(CONFIG, param_dtype="float64", compute_dtype="float64")
TOKENS = some_tokens(CONFIG, 3, 17)
PLACES = np.array([0, 7, 16])
ANSWERS = np.array([[1, 52, 3], [4, 5, 0], [7, 8, 9]])
AGAINST = np.array([11, 12, 13])


def summed(found):
    """Return the sum of all parts, in float64."""
    return np.asarray(found.flat()[1], np.float64).sum(0)


@pytest.mark.parametrize("by", DIVISIONS)
def test_the_parts_sum_to_the_logits(params, by):
    out, _ = forward(CONFIG, params, TOKENS)
    found = logit_attribution(CONFIG, params, TOKENS, answers=ANSWERS, positions=PLACES, by=by)
    logits = chosen(out.logits, ANSWERS)
    assert relative_error(summed(found), logits) < 1e-6  # measured: 1e-7
    assert relative_error(np.asarray(found.logits), logits) < 1e-6
    with jax.enable_x64(True):  # without rounding: any difference is a bug
        wide = numpy_reference.as_float64(params)
        out = numpy_reference.forward(wide, TOKENS, CONFIG.n_head)
        found = logit_attribution(DOUBLE, wide, TOKENS, answers=ANSWERS, against=AGAINST, positions=PLACES, by=by)
        differences = chosen(out, ANSWERS) - chosen(out, np.tile(AGAINST, (3, 1)))
        assert relative_error(summed(found), differences) < 1e-12  # measured: 1e-15
        assert relative_error(np.asarray(found.logits), differences) < 1e-12


def chosen(logits, ids):
    """Return the logits of some ids [B, P] at PLACES, in float64."""
    return np.take_along_axis(np.asarray(logits, np.float64)[:, PLACES], ids[..., None], -1)[..., 0]


def test_in_bfloat16_they_sum_up_to_its_rounding(params):
    config = in_bfloat16(CONFIG)
    found = logit_attribution(config, params, TOKENS, answers=ANSWERS, positions=PLACES)
    assert found.logits.dtype == np.float32
    assert relative_error(summed(found), np.asarray(found.logits)) < 2e-2  # measured: 4e-3


@pytest.mark.parametrize("by", DIVISIONS)
def test_each_part_is_what_its_label_says(params, by):
    """The expected part is computed from the captured activations and the weights, with ln_f's scale held."""
    found = logit_attribution(CONFIG, params, TOKENS, answers=ANSWERS, positions=PLACES, by=by)
    labels, values = found.flat()
    _, captured = forward(CONFIG, params, TOKENS, capture="embed|/z|/post|/out|ln_f/scale")
    captured = {name: np.asarray(x, np.float64)[:, PLACES] for name, x in captured.items()}
    wide = numpy_reference.as_float64(params)
    answer_BPD = wide["wte"][ANSWERS]
    n_units = {"component": 2, "head": 3 + 2, "neuron": 2 + 84}[by]
    assert len(labels) == len(set(labels)) == len(values) == 3 + 3 * n_units
    for label, value in zip(labels, np.asarray(values), strict=True):
        if label == "ln_f/b":
            expected = answer_BPD @ wide["ln_f"]["b"]
        else:
            part = part_of(label, captured, wide)
            part = (part - part.mean(-1, keepdims=True)) / captured["ln_f/scale"] * wide["ln_f"]["g"]
            expected = (part * answer_BPD).sum(-1)
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6, err_msg=label)  # measured: 2e-7


def part_of(label, captured, params):
    """Return what a label's part adds to the stream, [B, P, D] or [D]."""
    if label in captured:
        return captured[label]
    layer, room, activation, unit = re.fullmatch(r"(h\d)/(attn|mlp)/(z|post|c_proj)/(\w+)", label).groups()
    c_proj = params[layer][room]["c_proj"]
    if unit == "b":
        return c_proj["b"]
    if activation == "z":
        rows = slice(int(unit) * CONFIG.head_dim, (int(unit) + 1) * CONFIG.head_dim)
        return captured[f"{layer}/attn/z"][:, :, int(unit)] @ c_proj["w"][rows]
    return captured[f"{layer}/mlp/post"][:, :, [int(unit)]] * c_proj["w"][int(unit)]


@pytest.mark.parametrize("layer", [0, 1, 2, None])
def test_the_parts_of_the_stream_sum_to_it(params, layer):
    with jax.enable_x64(True):
        wide = numpy_reference.as_float64(params)
        edit = edits.scale("h0/attn/out", 2.0)
        parts = attribution.residual_parts(DOUBLE, wide, TOKENS, layer=layer, edits=edit)
        name = "h2/resid_post" if layer is None else f"h{layer}/resid_pre"
        _, captured = forward(DOUBLE, wide, TOKENS, capture=name, edits=edit)
        layers = range(3 if layer is None else layer)
        assert list(parts) == ["embed", "pos_embed", *(f"h{i}/{room}/out" for i in layers for room in ("attn", "mlp"))]
        np.testing.assert_allclose(sum(parts.values()), captured[name], rtol=0, atol=1e-14)  # measured: 0


@pytest.mark.parametrize("where", ["left", "right", "holes"])
def test_places_leave_padding_out(params, where):
    """A position is a token's number in its row, without padding. One that the row does not have gives NaN."""
    mask, asked = padding_masks(17)[where], np.array([0, 7, 15])
    padded = np.where(mask, TOKENS, 0)
    logits = numpy_reference.forward(params, padded, CONFIG.n_head, mask)
    places = logit_attribution(CONFIG, params, padded, mask, answers=ANSWERS, positions=asked, by="head")
    last = logit_attribution(CONFIG, params, padded, mask, answers=ANSWERS[:, :1], by="head")
    back = logit_attribution(CONFIG, params, padded, mask, answers=ANSWERS[:, :1], positions=-1, by="head")
    np.testing.assert_array_equal(back.flat()[1], last.flat()[1])
    for b, n in enumerate([16, 8, 1]):
        row = logits[b, mask[b]]
        real = asked < n
        expected = row[asked[real], ANSWERS[b, real]]
        np.testing.assert_allclose(summed(places)[b, real], expected, rtol=0, atol=3e-6)  # measured: 5e-7
        np.testing.assert_allclose(summed(last)[b], row[-1, ANSWERS[b, :1]], rtol=0, atol=3e-6)
        np.testing.assert_array_equal(np.isnan(places.flat()[1][:, b]), np.tile(~real, (3 + 3 * 5, 1)))
        np.testing.assert_array_equal(np.isnan(places.logits[b]), ~real)


def test_several_answers_at_the_last_place_need_no_places(params):
    one_by_one = [logit_attribution(CONFIG, params, TOKENS, answers=i).logits[:, 0] for i in (4, 9, 30, 4)]
    found = logit_attribution(CONFIG, params, TOKENS, answers=[4, 9, 30, 4])
    assert found.parts["attn/out"].shape == (3, 3, 4)
    np.testing.assert_array_equal(found.logits, np.stack(one_by_one, axis=1))


def test_the_parts_of_an_edited_pass_sum_to_its_logits(params):
    silent = edits.scale("h1/attn/z", 0.0, heads=[1])
    found = logit_attribution(CONFIG, params, TOKENS, answers=ANSWERS[:, :1], by="head", edits=silent)
    out, _ = forward(CONFIG, params, TOKENS, edits=silent)
    logits = np.take_along_axis(np.asarray(out.logits)[:, -1], ANSWERS[:, :1], -1)
    assert relative_error(summed(found), logits) < 2e-6  # measured: 2e-7
    assert (found.parts["attn/z"][1, 1] == 0).all()
    assert (found.parts["attn/z"][1, 0] != 0).all()


def test_the_head_that_copies_gets_the_credit():
    config, params = induction_toy()
    tokens = np.array([[3, 11, 5, 8, 2, 3, 11, 5]])
    found = logit_attribution(config, params, tokens, answers=8, against=5, by="head")
    labels, values = found.flat()
    layer, head = INDUCTION
    assert labels[int(np.argmax(values[:, 0, 0]))] == f"h{layer}/attn/z/{head}"
    assert found.parts["attn/z"][INDUCTION][0, 0] > 0.9 * np.abs(values).sum() / 2  # embed's part is negative


def test_it_works_inside_other_programs(params):
    tokens, ids = jnp.asarray(TOKENS), jnp.arange(5)
    plain = logit_attribution(CONFIG, params, tokens, answers=ids, by="neuron")
    ask = functools.partial(logit_attribution, CONFIG, params, tokens, by="neuron")
    mapped = jax.jit(jax.vmap(lambda i: ask(answers=i)))(ids)
    for name, part in plain.parts.items():
        theirs = np.moveaxis(np.asarray(mapped.parts[name])[..., 0], 0, -1)
        np.testing.assert_allclose(theirs, part, rtol=0, atol=3e-6, err_msg=name)  # measured: 5e-8
    beyond = jax.jit(lambda i: ask(answers=i).logits)(jnp.array([52, 53, -1]))
    np.testing.assert_array_equal(np.isnan(beyond), np.tile([False, True, True], (3, 1)))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"by": "layer"}, "by must be one of component, head, neuron, not 'layer'"),
        ({"answers": 53}, "answers must be whole numbers from 0 to 52, not 53"),
        ({"answers": 1.5}, "answers must be whole numbers"),
        ({"against": -1}, "against must be whole numbers from 0 to 52, not -1"),
        ({"positions": 17}, "positions must be whole numbers from -17 to 16, not 17"),
        ({"positions": -18}, "positions must be whole numbers from -17 to 16, not -18"),
        ({"edits": edits.replace("attn/z", 0.0, positions=17)}, "position 17.*17 tokens"),
        ({"edits": edits.replace("h0/attn/result", 0.0), "by": "head"}, "h0/attn/result is edited"),
        ({"positions": [1, 2], "answers": [1, 2, 3]}, r"must broadcast to \[B, P\], with B = 3"),
        ({"answers": np.ones((2, 1), int)}, r"answers \[2, 1\] must broadcast"),
        ({"answers": np.ones((2, 3, 1), int)}, r"answers \[2, 3, 1\] must broadcast"),
        ({"edits": edits.add("h1/resid_mid", 1.0)}, "the parts do not add up if h1/resid_mid is edited"),
        ({"edits": edits.add("ln_f/scale", 1.0)}, "if ln_f/scale is edited"),
        ({"edits": edits.add("h0/attn/out", 1.0), "by": "head"}, "if h0/attn/out is edited"),
        ({"edits": edits.add("h0/mlp/out", 1.0), "by": "neuron"}, "if h0/mlp/out is edited"),
    ],
)
def test_bad_arguments_are_refused(params, change, told):
    with pytest.raises(ValueError, match=told):
        logit_attribution(CONFIG, params, TOKENS, **({"answers": 1} | change))


def test_parts_of_a_layer_that_is_not_there_are_refused(params):
    with pytest.raises(ValueError, match="layer must be a whole number, from 0 to 3, not 4"):
        attribution.residual_parts(CONFIG, params, TOKENS, layer=4)
    with pytest.raises(ValueError, match="if h0/resid_post is edited"):
        attribution.residual_parts(CONFIG, params, TOKENS, edits=edits.add("h0/resid_post", 1.0))
