"""config.py: accepted values, rejected values, and exact counts."""

import dataclasses

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpt2_jax
from gpt2_jax import SIZES, GPT2Config

HPARAMS = {"n_vocab": 11, "n_ctx": 7, "n_embd": 15, "n_head": 5, "n_layer": 3}


@pytest.mark.parametrize(
    ("size", "count"), [("124M", 124_439_808), ("355M", 354_823_168), ("774M", 774_030_080), ("1558M", 1_557_611_200)]
)
def test_released_sizes_have_the_release_s_parameter_counts(size, count):
    config = SIZES[size]
    assert config.n_params == count
    assert config.param_bytes == 4 * count
    assert config.replace(param_dtype="bfloat16").param_bytes == 2 * count
    assert config.adam_bytes == 16 * count
    assert sum(leaf.size for leaf in jax.tree.leaves(gpt2_jax.abstract_params(config))) == count


def test_the_presets_cannot_be_changed():
    assert list(SIZES) == ["124M", "355M", "774M", "1558M"]
    with pytest.raises(TypeError):
        SIZES["124M"] = None


@given(st.integers(1, 97), st.integers(1, 31), st.integers(1, 5), st.integers(1, 7), st.integers(1, 3))
def test_counts_equal_those_of_the_tree(n_vocab, n_ctx, n_head, head_dim, n_layer):
    config = GPT2Config(n_vocab=n_vocab, n_ctx=n_ctx, n_embd=n_head * head_dim, n_head=n_head, n_layer=n_layer)
    flat = gpt2_jax.params.flatten(gpt2_jax.abstract_params(config))
    counts = dict.fromkeys(config.param_counts, 0)
    for name, leaf in flat.items():
        parts = name.split("/")
        counts[next(part for part in counts if part in parts or any(p.startswith(part + "_") for p in parts))] += (
            leaf.size
        )
    assert counts == config.param_counts


def test_cache_bytes_are_those_of_the_cache():
    for dtype in ("float32", "bfloat16"):
        config = GPT2Config(**HPARAMS, compute_dtype=dtype)
        cache = gpt2_jax.init_cache(config, batch_size=3, length=13)
        assert sum(a.nbytes for a in (*cache.k_BNHS, *cache.v_BNSH)) == config.cache_bytes(batch_size=3, length=13)


def test_from_hparams_and_back():
    config = GPT2Config.from_hparams(HPARAMS)
    assert config.to_hparams() == HPARAMS
    assert config.head_dim == 3
    assert dataclasses.is_dataclass(config)
    assert (config.param_dtype.name, config.compute_dtype.name) == ("float32", "float32")


def test_frozen_and_hashable_whatever_way_the_dtype_is_written():
    a, b = GPT2Config(**HPARAMS, compute_dtype="bfloat16"), GPT2Config(**HPARAMS, compute_dtype=jax.numpy.bfloat16)
    assert a == b
    assert hash(a) == hash(b)
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.n_layer = 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_embed": 15}, "unknown hyperparameters n_embed"),
        ({"n_ctx": None}, "n_ctx must be a whole number, from 1 to 2147483647, not None"),
        ({"n_layer": 0}, "n_layer must be a whole number, from 1 to 2147483647, not 0"),
        ({"n_layer": True}, "n_layer must be a whole number, from 1 to 2147483647, not True"),
        ({"n_vocab": 11.0}, "n_vocab must be a whole number, from 1 to 2147483647, not 11.0"),
        ({"n_vocab": "11"}, "n_vocab must be a whole number, from 1 to 2147483647, not '11'"),
        ({"n_embd": 2**70}, "n_embd must be a whole number, from 1 to 2147483647, not 1180591620717411303424"),
        ({3: 1}, "unknown hyperparameters 3"),
        ({"n_head": 4}, r"n_embd \(15\) must be a multiple of n_head \(4\)"),
    ],
)
def test_bad_hparams_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        GPT2Config.from_hparams(HPARAMS | change)


def test_missing_hparams_are_named():
    with pytest.raises(ValueError, match="missing hyperparameters n_head, n_layer"):
        GPT2Config.from_hparams({k: v for k, v in HPARAMS.items() if k not in ("n_head", "n_layer")})
    with pytest.raises(ValueError, match="list"):
        GPT2Config.from_hparams([1, 2])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attn_pdrop", 1.0),
        ("embd_pdrop", -0.1),
        ("resid_pdrop", "0.1"),
        ("param_dtype", "int8"),
        ("compute_dtype", "x"),
        ("attention", "flash"),
        ("attention", None),
    ],
)
def test_bad_rates_and_dtypes_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .* not {value!r}"):
        GPT2Config(**HPARAMS, **{field: value})
