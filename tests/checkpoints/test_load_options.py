"""load(dtype=, sharding=): casts equal numpy's, arrays are on the requested devices, errors list the options."""

import itertools

import checkpoint_forms as forms
import commands
import jax
import numpy as np
import pytest
from checkpoint_forms import CONFIG, FORMATS, assert_loads_as
from strength import campaign

import gpt2_jax

DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    forms.import_tensorflow()
    monkeypatch.setenv("GPT2_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=FORMATS)
def save_as(request, tmp_path):
    """save_as(config, flat) -> a directory; each format in turn."""

    def save(config, flat):
        gpt2_jax.save(tmp_path / "model", config, forms.nested(flat), format=request.param)
        return tmp_path / "model"

    return save


@pytest.mark.parametrize(
    ("stored", "wanted"),
    campaign([*itertools.pairwise(DTYPES), (DTYPES[-1], DTYPES[0])], [*itertools.product(DTYPES, DTYPES)]),
)
def test_casts_are_numpys(save_as, stored, wanted):
    """Casts round to nearest even, denormals too. param_dtype is the dtype of the params."""
    config = CONFIG.replace(param_dtype=stored)
    flat = forms.random_bits(config, 11)
    rng = np.random.default_rng(5)
    for array in flat.values():  # within float16's range; the next test goes beyond it
        array *= np.where(np.abs(array.astype(np.float64)) < 60_000, 1, 0).astype(array.dtype)
        small = rng.normal(0, 1e-5, array.shape)  # float16's denormals, and ties when cast from bfloat16
        array += np.where(rng.random(array.shape) < 0.5, small, 0).astype(array.dtype)
    directory = save_as(config, flat)
    cast = {name: array.astype(wanted) for name, array in flat.items()}
    for _ in range(2):  # the second time, a TensorFlow checkpoint is read from its copy
        loaded, _ = assert_loads_as(directory, CONFIG.replace(param_dtype=wanted), cast, dtype=wanted)
        assert loaded.compute_dtype == np.float32
    assert_loads_as(directory, config, flat)  # a cast does not change what is stored


def test_a_cast_that_overflows_is_not_silent(save_as):
    flat = forms.random_model()
    flat["h1/mlp/c_fc/w"][3, 5] = 70_000.0
    directory = save_as(CONFIG, flat)
    assert_loads_as(directory, CONFIG, flat)
    with pytest.warns(UserWarning, match=r"h1/mlp/c_fc/w"):
        params = gpt2_jax.load(directory, dtype="float16")[1]
    assert np.isinf(np.asarray(params["h1"]["mlp"]["c_fc"]["w"])).sum() == 1


@pytest.mark.parametrize("wrong", ["int8", "float31", "complex64", "float64", 3, "auto", object()])
def test_other_dtypes_are_refused(save_as, wrong):
    directory = save_as(CONFIG, forms.random_model())
    with pytest.raises(ValueError, match=r"float32.*bfloat16.*float16") as error:
        gpt2_jax.load(directory, dtype=wrong)
    assert "\n" not in str(error.value)


def test_dtypes_are_taken_as_jax_takes_them(save_as):
    flat = forms.random_model()
    directory = save_as(CONFIG, flat)
    for same in ("bfloat16", jax.numpy.bfloat16, np.dtype("bfloat16")):
        assert gpt2_jax.load(directory, dtype=same)[0].param_dtype == np.dtype("bfloat16")


def test_one_device(save_as):
    flat = forms.random_model()
    directory = save_as(CONFIG, flat)
    device = jax.devices("cpu")[0]
    for sharding in (device, jax.sharding.SingleDeviceSharding(device)):
        _, params = assert_loads_as(directory, CONFIG, flat, sharding=sharding)
        assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(params))


def test_loaded_arrays_may_be_donated(save_as):
    """A training step writes into donated buffers. The mapped files behind them must not change."""
    flat = forms.random_model()
    directory = save_as(CONFIG, flat)
    step = jax.jit(lambda params: jax.tree.map(lambda leaf: leaf + 1, params), donate_argnums=0)
    for _ in range(2):
        params = step(gpt2_jax.load(directory)[1])
        assert forms.difference(params, {name: array + 1 for name, array in flat.items()}) == ""
    assert_loads_as(directory, CONFIG, flat)


@pytest.mark.parametrize("wrong", ["cpu", 3, {"wte": None}, {}], ids=repr)
def test_wrong_shardings_are_refused(save_as, wrong):
    directory = save_as(CONFIG, forms.random_model())
    with pytest.raises(ValueError, match="sharding"):
        gpt2_jax.load(directory, sharding=wrong)


EIGHT_DEVICES = """
    import json, sys
    import jax, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    import gpt2_jax

    mesh = Mesh(np.array(jax.devices()), ("x",))
    one = NamedSharding(mesh, P())

    def spec(leaf):
        axes = [i for i, n in enumerate(leaf.shape) if n % 8 == 0]
        return NamedSharding(mesh, P(*[None] * axes[-1], "x") if axes else P())

    wrong = []
    for directory in sys.argv[1:]:
        config, plain = gpt2_jax.load(directory)
        tree = jax.tree.map(spec, gpt2_jax.abstract_params(config))
        assert sum(not s.is_fully_replicated for s in jax.tree.leaves(tree)) > 20
        for name, asked in (("tree", tree), ("replicated", one), ("device 5", jax.devices()[5])):
            for dtype in (None, "bfloat16"):
                config, params = gpt2_jax.load(directory, dtype=dtype, sharding=asked)
                assert jax.tree.structure(params) == jax.tree.structure(plain)
                for i, (x, y) in enumerate(zip(jax.tree.leaves(params), jax.tree.leaves(plain))):
                    if np.asarray(x).tobytes() != np.asarray(y).astype(dtype or y.dtype).tobytes():
                        wrong.append([directory, name, dtype, i, "bits"])
                    if name == "device 5":
                        right = x.devices() == {asked}
                    else:
                        want = asked if name == "replicated" else jax.tree.leaves(tree)[i]
                        right = x.sharding.is_equivalent_to(want, x.ndim) and len(x.addressable_shards) == 8
                    if not right:
                        wrong.append([directory, name, dtype, i, str(x.sharding)])
        for form in ("tensorflow", "huggingface", "orbax"):  # save again, from all the devices
            gpt2_jax.save(f"{directory}-{form}", config.replace(param_dtype="float32"),
                          gpt2_jax.load(directory, sharding=tree)[1], format=form)
            again = gpt2_jax.load(f"{directory}-{form}")[1]
            for i, (x, y) in enumerate(zip(jax.tree.leaves(again), jax.tree.leaves(plain))):
                if np.asarray(x).tobytes() != np.asarray(y).tobytes():
                    wrong.append([directory, form, i, "saved"])
        try:  # 23 rows cannot be split into 8 equal parts
            gpt2_jax.load(directory, sharding=NamedSharding(mesh, P("x")))
            wrong.append([directory, "uneven sharding accepted"])
        except ValueError as error:
            if "\\n" in str(error).strip() and len(str(error)) > 2000:
                wrong.append([directory, str(error)])
    print(json.dumps(wrong))
"""


def test_eight_devices(tmp_path):
    """Each format, with a tree of shardings, one sharding for all, and a device that is not the default."""
    config = gpt2_jax.GPT2Config(n_vocab=64, n_ctx=23, n_embd=16, n_head=2, n_layer=2)
    flat = forms.random_model(config)
    directories = [tmp_path / form for form in FORMATS]
    for directory in directories:
        gpt2_jax.save(directory, config, forms.nested(flat), format=directory.name)
    directories.append(forms.write_huggingface(tmp_path / "shards", config, forms.hf_tensors(flat), shards=3))
    assert commands.on_eight_devices(EIGHT_DEVICES, *directories) == []
