"""llm.c's model files."""

import checkpoint_forms as forms
import foreign_models as foreign
import numpy as np
import pytest
from checkpoint_forms import assert_loads_as
from foreign_models import CONFIG

import gpt2_jax

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize(("version", "dtype"), [(3, "float32"), (5, "bfloat16")])
@pytest.mark.parametrize("as_file", [True, False])
def test_llmc(tmp_path, flat, version, dtype, as_file):
    """The rows that llm.c adds to the embedding are left out."""
    config = CONFIG.replace(param_dtype=dtype)
    flat = {name: array.astype(dtype) for name, array in flat.items()}
    path = foreign.write_llmc(tmp_path / "gpt2_124M.bin", config, flat, version)
    (tmp_path / "gpt2_tokenizer.bin").write_bytes(np.array([20240328, 2, 37], "<i4").tobytes())
    assert_loads_as(path if as_file else tmp_path, config, flat)
    assert gpt2_jax.load_config(path) == config


def test_two_models_of_llmc_are_named(tmp_path, flat):
    for name in ("model_00000100.bin", "model_00000200.bin"):
        foreign.write_llmc(tmp_path / name, CONFIG, flat)
    with pytest.raises(ValueError, match=r"model_00000100\.bin, model_00000200\.bin.*load one file by its path"):
        gpt2_jax.load(tmp_path)


BAD_LLMC = {
    "a byte short": lambda c: c[:-1],
    "a byte too many": lambda c: c + b"\0",
    "cut in the header": lambda c: c[:99],
    "an old version": lambda c: c[:4] + (1).to_bytes(4, "little") + c[8:],
    "no heads": lambda c: c[:20] + bytes(4) + c[24:],
    "fewer rows than ids": lambda c: c[:28] + (36).to_bytes(4, "little") + c[32:],
}


@pytest.mark.parametrize("damage", BAD_LLMC.values(), ids=BAD_LLMC)
def test_damaged_files_of_llmc(tmp_path, flat, damage):
    path = foreign.write_llmc(tmp_path / "model.bin", CONFIG, flat)
    path.write_bytes(damage(path.read_bytes()))
    for call in (gpt2_jax.load, gpt2_jax.load_config) if "byte" not in str(damage) else (gpt2_jax.load,):
        with pytest.raises(ValueError, match=r"model\.bin") as caught:
            gpt2_jax.load(path)
        assert forms.is_clear(caught.value), (call, caught.value)


def test_loaded_arrays_may_be_donated(tmp_path, flat):
    """A training step writes into donated buffers. No second load may see that."""
    import jax

    foreign.write_llmc(tmp_path / "llmc" / "model.bin", CONFIG, flat)
    fields = foreign.NANOGPT | {"activation_function": "gelu"}
    foreign.write(tmp_path / "nanogpt", fields, foreign.nanogpt())
    step = jax.jit(lambda params: jax.tree.map(lambda leaf: leaf + 1, params), donate_argnums=0)
    for name in ("llmc", "nanogpt"):
        before = forms.leaves(gpt2_jax.load(tmp_path / name)[1])
        step(gpt2_jax.load(tmp_path / name)[1])
        assert forms.difference(gpt2_jax.load(tmp_path / name)[1], before) == ""


def test_bfloat16_of_llmc_is_read_exactly(tmp_path):
    config = CONFIG.replace(param_dtype="bfloat16")
    flat = forms.random_bits(config, 3)
    assert_loads_as(foreign.write_llmc(tmp_path / "model.bin", config, flat, version=5), config, flat)
