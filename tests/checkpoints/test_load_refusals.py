"""Hugging Face directories built by hand: what is accepted, and what is refused by name."""

import json
import re
import struct
import warnings

import checkpoint_forms as forms
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_forms import CONFIG, SAFETENSORS, assert_loads_as, hf_tensors, write_huggingface

import gpt2_jax


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GPT2_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def assert_refused(directory, *culprits, error=ValueError):
    """`load` refuses with one sentence that names each culprit. A list of differences may follow."""
    with pytest.raises(error) as caught:
        gpt2_jax.load(directory)
    assert forms.is_clear(caught.value), caught.value
    for culprit in culprits:
        assert re.search(culprit, str(caught.value)), (culprit, str(caught.value))
    return str(caught.value)


# ---- accepted


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_names_with_and_without_prefix(tmp_path, prefix, shards, dtype):
    config = CONFIG.replace(param_dtype=dtype)
    flat = forms.random_bits(config, 3)
    assert_loads_as(write_huggingface(tmp_path, config, hf_tensors(flat, prefix), shards=shards), config, flat)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "float32", "float16"])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_mask_buffers_are_skipped_by_name(tmp_path, flat, dtype, prefix):
    buffers = {}
    for i in range(CONFIG.n_layer):
        buffers[f"{prefix}h.{i}.attn.bias"] = np.tri(11).reshape(1, 1, 11, 11).astype(dtype)
        buffers[f"{prefix}h.{i}.attn.masked_bias"] = np.array(-1e4, "float16")
    assert_loads_as(write_huggingface(tmp_path, CONFIG, buffers | hf_tensors(flat, prefix)), CONFIG, flat)


@pytest.mark.filterwarnings("ignore:config.json says that the output head is tied")
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_an_equal_head_is_accepted_and_another_shape_refused(tmp_path, flat, prefix):
    tensors = hf_tensors(flat, prefix) | {"lm_head.weight": flat["wte"].copy()}
    assert_loads_as(write_huggingface(tmp_path, CONFIG, tensors), CONFIG, flat)
    tensors["lm_head.weight"] = flat["wte"][:-1].copy()
    write_huggingface(tmp_path, CONFIG, tensors)
    assert_refused(tmp_path, r"lm_head\.weight")


SAME_ARITHMETIC = [
    {"n_inner": None},
    {"n_inner": 4 * CONFIG.n_embd},
    {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True},
    {"add_cross_attention": False, "use_cache": False, "dtype": "float32"},
    {"n_ctx": ...},
    {"architectures": ["GPT2Model"], "transformers_version": "4.1.0", "torch_dtype": "float32"},
    {"quantization_config": None},
]


@pytest.mark.parametrize("changes", SAME_ARITHMETIC, ids=str)
def test_a_config_of_the_same_arithmetic(tmp_path, flat, changes):
    assert_loads_as(write_huggingface(tmp_path, CONFIG, hf_tensors(flat), **changes), CONFIG, flat)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_not_a_number_is_a_warning_that_names_the_tensor(tmp_path, dtype):
    """The arrays are loaded, with the exact bits of each NaN, quiet or signaling. There is no other warning."""
    config = CONFIG.replace(param_dtype=dtype)
    flat = forms.random_model(config)
    size = flat["wte"].itemsize
    payload = {"float32": 0x7F812345, "bfloat16": 0x7F83, "float16": 0x7C05}[dtype]
    flat["h1/attn/c_attn/w"].view(f"u{size}")[2, 3] = payload
    flat["ln_f/b"][0] = -np.inf
    write_huggingface(tmp_path, config, hf_tensors(flat))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for form in forms.FORMATS:
            gpt2_jax.save(tmp_path / form, config, forms.nested(flat), format=form)
    for directory in (tmp_path, *(tmp_path / form for form in (*forms.FORMATS, "tensorflow"))):  # last: the kept copy
        with pytest.warns(UserWarning, match="h1") as caught:
            assert_loads_as(directory, config, flat)
        said = " ".join(str(w.message) for w in caught)
        assert re.search(r"h1/attn/c_attn/w|h\.1\.attn\.c_attn\.weight", said)
        assert re.search(r"ln_f/b|ln_f\.bias", said)
        assert not re.search(r"h0/|h\.0\.|wte|wpe", said)
        assert {w.category for w in caught} == {UserWarning}


# ---- refused; the message names the field


OTHER_ARITHMETIC = [
    ("activation_function", "quick_gelu"), ("activation_function", "gelu_10"), ("activation_function", None),
    ("scale_attn_by_inverse_layer_idx", 1), ("scale_attn_by_inverse_layer_idx", None), ("scale_attn_weights", False),
    ("tie_word_embeddings", False), ("tie_word_embeddings", None), ("reorder_and_upcast_attn", "false"),
    ("n_inner", 59), ("n_inner", "60"), ("layer_norm_epsilon", 1e-6), ("layer_norm_epsilon", 1e-12),
    ("add_cross_attention", True), ("model_type", "llama"), ("model_type", "gpt_neo"), ("model_type", "gptj"),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), OTHER_ARITHMETIC, ids=str)
def test_other_arithmetic_is_refused_by_name(tmp_path, flat, field, value):
    write_huggingface(tmp_path, CONFIG, hf_tensors(flat), **{field: value})
    assert_refused(tmp_path, field, r"config\.json")
    with pytest.raises(ValueError, match=field):
        gpt2_jax.load_config(tmp_path)


BAD_CONFIGS = [
    ({"n_head": ...}, "n_head"), ({"n_head": 4}, "n_head"), ({"n_head": "3"}, "n_head"), ({"n_head": None}, "n_head"),
    ({"n_embd": 18}, r"18|h0|h\.0"), ({"n_layer": 1}, r"h1/|h\.1\."), ({"n_layer": 3}, r"h2/|h\.2\."),
    ({"n_layer": 10**9}, "n_layer"), ({"n_positions": 12}, "wpe"), ({"vocab_size": 38}, "wte"),
    ({"n_positions": 0}, "n_positions|n_ctx"), ({"vocab_size": 37.5}, "vocab_size|n_vocab"),
    ({"embd_pdrop": 2}, "embd_pdrop"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "culprit"), BAD_CONFIGS, ids=str)
def test_a_config_of_another_model(tmp_path, flat, changes, culprit):
    write_huggingface(tmp_path, CONFIG, hf_tensors(flat), **changes)
    assert_refused(tmp_path, culprit)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 99_999, "null", b"\xff{}", '"gpt2"'], ids=lambda t: repr(t)[:9])
def test_a_config_that_is_none(tmp_path, flat, text):
    write_huggingface(tmp_path, CONFIG, hf_tensors(flat))
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_refused(tmp_path, r"config\.json")


# ---- tensors


def rename(t):
    t["transformer.h.1.mlp.c_fc.kernel"] = t.pop("transformer.h.1.mlp.c_fc.weight")


BAD_TENSORS = {
    "renamed": (rename, [r"missing.*h1/mlp/c_fc/w|missing.*h\.1\.mlp\.c_fc\.weight", "c_fc.kernel"]),
    "missing": (lambda t: t.pop("transformer.ln_f.bias"), [r"ln_f[./]b"]),
    "extra": (lambda t: t.update({"transformer.h.2.ln_1.weight": np.ones(15, "f4")}), [r"h\.?2[./]ln_1"]),
    "extra head": (lambda t: t.update({"pooler.weight": np.ones((2, 15), "f4")}), [r"pooler\.weight"]),
    "transposed": (lambda t: put(t, "transformer.h.0.mlp.c_fc.weight", lambda a: a.T.copy()), [r"mlp[./]c_fc", "60"]),
    "one row short": (lambda t: put(t, "transformer.wte.weight", lambda a: a[:-1].copy()), ["wte", "36"]),
    "mixed dtypes": (
        lambda t: put(t, "transformer.h.1.ln_2.bias", lambda a: a.astype(np.float16)),
        [r"h\.?1[./]ln_2[./]b", "float16|F16", "float32|F32"],
    ),
    "one float64": (lambda t: put(t, "transformer.wpe.weight", lambda a: a.astype(np.float64)), ["wpe", "float64|F64"]),
    "one int8": (lambda t: put(t, "transformer.wpe.weight", lambda a: a.astype(np.int8)), ["wpe", "int8|I8"]),
    "all float64": (lambda t: [put(t, n, lambda a: a.astype(np.float64)) for n in t], ["float64|F64"]),
    "all int8": (lambda t: [put(t, n, lambda a: a.astype(np.int8)) for n in t], ["int8|I8"]),
    "all float8": (lambda t: [put(t, n, lambda a: a.astype(ml_dtypes.float8_e4m3fn)) for n in t], ["(?i)f(loat)?8"]),
    "both prefixes": (lambda t: t.update({"wpe.weight": t["transformer.wpe.weight"] + 1}), ["transformer|wpe"]),
    "none": (lambda t: t.clear(), ["wte|0 tensors"]),
}


def put(tensors, name, change):
    tensors[name] = change(tensors[name])


@pytest.mark.parametrize(("change", "culprits"), BAD_TENSORS.values(), ids=BAD_TENSORS)
@pytest.mark.parametrize("shards", [1, 2])
def test_wrong_tensors_are_named(tmp_path, flat, change, culprits, shards):
    tensors = hf_tensors(flat)
    change(tensors)
    assert_refused(write_huggingface(tmp_path, CONFIG, tensors, shards=shards), *culprits)


def reheader(change):
    """Rewrite the header of a safetensors file. The data does not change."""

    def damage(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return damage


def shift(header):
    header["transformer.wpe.weight"]["data_offsets"] = header["transformer.h.0.mlp.c_fc.weight"]["data_offsets"]


BAD_FILES = {
    "cut off": lambda c: c[:-1],
    "cut in half": lambda c: c[: len(c) // 2],
    "cut in the header": lambda c: c[:100],
    "seven bytes": lambda c: c[:7],
    "empty": lambda c: b"",
    "a byte too many": lambda c: c + b"\0",
    "header longer than the file": lambda c: struct.pack("<Q", len(c)) + c[8:],
    "a huge header": lambda c: b"\xff" * 8 + c[8:],
    "header not JSON": lambda c: c[:8] + b"}" + c[9:],
    "a page": lambda c: b"<!doctype html><html>Not found</html>",
    "a Git LFS pointer": lambda c: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
    "two tensors in one place": reheader(shift),
    "an offset below zero": reheader(lambda h: h["transformer.wpe.weight"].update(data_offsets=[-4, 656])),
    "a name without dtype": reheader(lambda h: h["transformer.wpe.weight"].pop("dtype")),
    "an unknown dtype": reheader(lambda h: h["transformer.wpe.weight"].update(dtype="F31")),
    "a list": reheader(lambda h: h.update({"transformer.wpe.weight": [1]})),
}


@pytest.mark.parametrize("damage", BAD_FILES.values(), ids=BAD_FILES)
def test_damaged_files_are_named(tmp_path, flat, damage):
    write_huggingface(tmp_path, CONFIG, hf_tensors(flat))
    content = (tmp_path / SAFETENSORS).read_bytes()
    (tmp_path / SAFETENSORS).write_bytes(damage(content))
    assert_refused(tmp_path, r"model\.safetensors")


def test_a_model_of_others_is_not_called_verified_but_checked(tmp_path, flat):
    """A file from another tool has no hashes. Any metadata, or none, is accepted."""
    write_huggingface(tmp_path, CONFIG, hf_tensors(flat))
    for metadata in (None, {}, {"format": "np"}, {"format": "pt", "sha256": "?", "note": "{"}):
        safetensors.numpy.save_file(hf_tensors(flat), tmp_path / SAFETENSORS, metadata)
        assert_loads_as(tmp_path, CONFIG, flat)
