"""Prefixes of wrappers, heads for other tasks, buffers, other dtypes, leaves that are not arrays."""

import re

import checkpoint_forms as forms
import numpy as np
import pytest
from checkpoint_forms import assert_loads_as, hf_tensors, write_huggingface
from foreign_models import CONFIG
from hypothesis import given
from hypothesis import strategies as st

import gpt2_jax
from gpt2_jax.checkpoints.names import short

pytestmark = pytest.mark.usefixtures("own_cache")


# ---- prefixes, extra heads, buffers, dtypes


WRAPPERS = [
    "module.", "_orig_mod.", "model.", "base_model.model.", "transformer.", "module._orig_mod.", "_orig_mod.module.",
    "pretrained_model.", "_fsdp_wrapped_module.", "model.base_model.model.",
]  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_prefixes_of_wrappers(tmp_path, flat, wrapper, prefix):
    tensors = hf_tensors(flat, wrapper + prefix) | {f"{wrapper}lm_head.weight": flat["wte"]}
    assert_loads_as(write_huggingface(tmp_path, CONFIG, tensors), CONFIG, flat)


@given(st.lists(st.sampled_from([*WRAPPERS, "transformer.", ""]), max_size=5), st.sampled_from([*forms.shapes(CONFIG)]))
def test_prefixes_in_any_order(wrappers, name):
    """Whatever wraps a model, the short name is the same, and stays the same."""
    key = forms.hf_name(name)
    assert short("".join(wrappers) + key) == key == short(key)


@pytest.mark.parametrize("wrapper", ["gpt2.", "net.", "policy.0.", "module.language_model.", "encoder.model."])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_the_name_of_a_users_own_module(tmp_path, flat, wrapper, prefix):
    """As in `self.gpt2 = GPT2LMHeadModel(...)`: any prefix that the whole model shares."""
    tensors = hf_tensors(flat, wrapper + prefix) | {f"{wrapper}lm_head.weight": flat["wte"]}
    assert_loads_as(write_huggingface(tmp_path, CONFIG, tensors), CONFIG, flat)


@pytest.mark.parametrize("other", ["decoder.", "", "transformer."])
def test_two_models_under_two_prefixes_are_refused(tmp_path, flat, other):
    """An encoder and a decoder, or a policy and its reference: neither is meant more than the other."""
    changed = {name: array + 1 for name, array in flat.items()}
    write_huggingface(tmp_path, CONFIG, hf_tensors(flat, "encoder.") | hf_tensors(changed, other))
    with pytest.raises(ValueError, match=r"encoder\."):
        gpt2_jax.load(tmp_path)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module."])
def test_layers_that_were_wrapped_one_by_one(tmp_path, flat, wrapper):
    tensors = {re.sub(r"\bh\.(\d+)\.", rf"h.\1.{wrapper}", key): array for key, array in hf_tensors(flat).items()}
    assert_loads_as(write_huggingface(tmp_path, CONFIG, tensors), CONFIG, flat)


def test_both_names_of_a_tensor(tmp_path, flat):
    """Equal ones are one tensor; others are refused."""
    tensors = hf_tensors(flat) | {"wpe.weight": flat["wpe"].copy()}
    assert_loads_as(write_huggingface(tmp_path, CONFIG, tensors), CONFIG, flat)
    tensors["wpe.weight"][3, 4] += 1
    with pytest.raises(ValueError, match=r"holds wpe\.weight twice"):
        gpt2_jax.load(write_huggingface(tmp_path, CONFIG, tensors))


SILENT = {
    "position_ids": np.arange(11)[None],
    "transformer.position_ids": np.arange(11)[None],
    "h.0.attn.rotary_emb.inv_freq": np.ones(2, "f4"),
    "transformer.h.1.attn.masked_bias": np.float32(-1e4),
    "transformer.h.1.ln_3.bias": np.ones(0, "f4"),
    "transformer.h.0.attn.mask": np.tri(11, dtype=bool),
    "transformer.h.1.attn.causal_mask": np.tri(11, dtype=np.uint8)[None, None],
}
HEADS = ["v_head.summary.weight", "score.weight", "classifier.bias", "multiple_choice_head.summary.weight",
         "qa_outputs.weight", "module.v_head.summary.bias", "reward_head.weight", "regression_head.0.bias",
         "ilql_heads.q_heads.0.0.weight"]  # fmt: skip


def test_buffers_and_empty_tensors_are_left_out(tmp_path, flat):
    extras = {key: np.asarray(array) for key, array in SILENT.items()}
    assert_loads_as(write_huggingface(tmp_path, CONFIG, hf_tensors(flat) | extras), CONFIG, flat)


@pytest.mark.parametrize("head", HEADS)
def test_heads_for_other_tasks_are_left_out_with_a_warning(tmp_path, flat, head):
    """huggingface/trl#86."""
    write_huggingface(tmp_path, CONFIG, hf_tensors(flat) | {head: np.ones((1, 15), np.float32)})
    with pytest.warns(UserWarning, match=head.removeprefix("module.")) as caught:
        assert_loads_as(tmp_path, CONFIG, flat)
    assert {warning.filename for warning in caught} == {forms.__file__}  # the caller of load


@pytest.mark.parity
@pytest.mark.parametrize(
    "name",
    ["GPT2DoubleHeadsModel", "GPT2ForTokenClassification", "GPT2ForQuestionAnswering"],
)
def test_transformers_models_for_other_tasks(tmp_path, flat, name):
    """Saved by transformers itself."""
    import torch
    import transformers

    config = transformers.GPT2Config(
        vocab_size=37, n_positions=11, n_embd=15, n_layer=2, n_head=3, num_labels=2, pad_token_id=0
    )
    model = getattr(transformers, name)(config)
    ours = {key: torch.from_numpy(array) for key, array in hf_tensors(flat).items()}
    assert not model.load_state_dict(ours, strict=False).unexpected_keys
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="these are for another task, and were left out"):
        assert_loads_as(tmp_path, CONFIG, flat)


@pytest.mark.parametrize("extra", ["h.0.attn.c_attn.lora_A.weight", "h.0.ln_3.weight", "lm_head.bias", "wte.bias"])
def test_unknown_tensors_are_refused(tmp_path, flat, extra):
    write_huggingface(tmp_path, CONFIG, hf_tensors(flat) | {f"transformer.{extra}": np.ones(15, np.float32)})
    with pytest.raises(ValueError, match=f"extra: {extra}"):
        gpt2_jax.load(tmp_path)


def cast_some(flat, dtype, chosen):
    return {name: array.astype(dtype) if chosen(name) else array for name, array in flat.items()}


MIXTURES = {
    "float64": (lambda f: cast_some(f, "f8", lambda name: True), "float64"),
    "float16, norms float32": (lambda f: cast_some(f, "f2", lambda name: "ln_" not in name), "float16, float32"),
    "bfloat16, norms float32": (
        lambda f: cast_some(f, "bfloat16", lambda name: "ln_" not in name),
        "bfloat16, float32",
    ),
    "one float64": (lambda f: cast_some(f, "f8", lambda name: name == "wpe"), "float32, float64"),
}


@pytest.mark.parametrize(("change", "named"), MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("form", ["tensorflow", "huggingface"])
def test_other_and_mixed_dtypes_load_where_a_dtype_is_given(tmp_path, flat, change, named, form):
    mixed = change(flat)
    if form == "tensorflow":
        forms.write_tensorflow(tmp_path, CONFIG, mixed)
    else:
        write_huggingface(tmp_path, CONFIG, hf_tensors(mixed))
    with pytest.raises(ValueError, match=rf'(?s){named}.*pass the .* load.*dtype="float32"') as caught:
        gpt2_jax.load(tmp_path)
    assert forms.is_clear(caught.value)
    assert gpt2_jax.load_config(tmp_path) == CONFIG
    for dtype in ("float32", "bfloat16"):
        expected = {name: array.astype(dtype) for name, array in mixed.items()}
        assert_loads_as(tmp_path, CONFIG.replace(param_dtype=dtype), expected, dtype=dtype)


def test_a_float64_value_beyond_float32_is_not_silent(tmp_path, flat):
    mixed = cast_some(flat, "f8", lambda name: True)
    mixed["h1/mlp/c_fc/b"][3] = 1e300
    write_huggingface(tmp_path, CONFIG, hf_tensors(mixed))
    with pytest.warns(UserWarning, match=r"too large for float32 have become infinite: h1/mlp/c_fc/b \(1\)"):
        gpt2_jax.load(tmp_path, dtype="float32")


# ---- leaves that are not arrays


@pytest.mark.parity
def test_torch_tensors_as_leaves_are_refused_in_one_sentence(tmp_path, flat):
    import torch

    params = forms.nested({name: torch.from_numpy(array) for name, array in flat.items()})
    with pytest.raises(ValueError, match=r"params must hold an array of floats at .*torch tensors with .*numpy"):
        gpt2_jax.save(tmp_path / "model", CONFIG, params)
