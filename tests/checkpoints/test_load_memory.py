"""Weights go from disk to their shards: beside these, the host holds little more than the largest tensor."""

import gc
import threading
import weakref

import checkpoint_forms as forms
import commands
import foreign_models as foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax.checkpoints import ahead, loading, names, placing
from gpt2_jax.checkpoints.runs import write_run
from gpt2_jax.recipe import Recipe
from gpt2_jax.training.checkpoints import Checkpoints
from gpt2_jax.training.step import TrainState

CONFIG = gpt2_jax.GPT2Config(
    n_vocab=8209, n_ctx=37, n_embd=256, n_head=2, n_layer=4
)  # wte is 8 times c_fc, as in 1558M
LARGEST = 4 * 8209 * 256
BOUND = 1.3

LOAD = """
    import json, sys
    import jax, numpy as np
    sys.path.append("support")
    from host_memory import beside_the_shards
    import gpt2_jax
    from gpt2_jax.checkpoints import safetensors
    from gpt2_jax.params import flatten, unflatten
    from gpt2_jax.sharding import make_mesh, param_shardings

    safetensors.LEAST_MAPPED = 2**60  # mapped memory is not traced: count it as if it were read
    found = {}
    for path in sys.argv[1:]:
        config, plain = gpt2_jax.load(path, keep_copy=path.endswith("copy"))
        plain = flatten(plain)
        for data, model in ((1, 8), (4, 2), (0, 0)):
            tree = None
            if data:
                tree = unflatten(param_shardings(flatten(gpt2_jax.abstract_params(config)), make_mesh(data, model)))
            for dtype in (None, "bfloat16"):
                with beside_the_shards() as peak:
                    params = gpt2_jax.load(path, dtype, tree, keep_copy=path.endswith("copy"))[1]
                params = flatten(params)
                wrong = [
                    name for name, leaf in plain.items()
                    if np.asarray(params[name]).tobytes() != np.asarray(leaf).astype(dtype or leaf.dtype).tobytes()
                    or tree is not None and params[name].sharding != flatten(tree)[name]
                ]
                found[f"{path.rpartition('/')[2]} {data}x{model} {dtype}"] = [peak[0], wrong]
    print(json.dumps(found))
"""


def write_book(directory, config, flat):
    tensors = {}
    for name, array in flat.items():
        keys = names.book_keys(name)
        parts = np.split(array, len(keys), axis=-1)
        parts = [part.T if name.endswith("/w") else part for part in parts]
        tensors |= {key: np.ascontiguousarray(part) for key, part in zip(keys, parts, strict=True)}
    return forms.write_huggingface(directory, config, tensors)


def write_checkpoint(directory, config, flat):
    write_run(directory, config, Recipe(), {}, None)
    params = jax.tree.map(jnp.asarray, forms.nested(flat))
    with Checkpoints(directory) as saved:
        saved.save(2, TrainState(jnp.int32(2), params, None, (), jnp.float32(0)))


WRITERS = {
    "huggingface": lambda to, config, flat: gpt2_jax.save(to, config, forms.nested(flat), "huggingface"),
    "orbax": lambda to, config, flat: gpt2_jax.save(to, config, forms.nested(flat), "orbax"),
    "parts": lambda to, config, flat: forms.write_huggingface(to, config, forms.hf_tensors(flat), shards=3),
    "head twice": lambda to, config, flat: forms.write_huggingface(
        to, config, forms.hf_tensors(flat) | {"lm_head.weight": flat["wte"]}
    ),
    "book": write_book,
    "tensorflow": forms.write_tensorflow,
    "copy": forms.write_tensorflow,
    "llm.c": lambda to, config, flat: foreign.write_llmc(to, config, flat, rows=8320),
    "run": write_checkpoint,
}


@pytest.fixture(scope="module")
def needed(tmp_path_factory):
    """{form, mesh and dtype: (bytes, wrong tensors)}."""
    forms.import_tensorflow()
    folder, flat = tmp_path_factory.mktemp("models"), forms.random_model(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2_JAX_CACHE", str(folder / "cache"))
        for name, write in WRITERS.items():
            write(folder / name, CONFIG, flat)
        return commands.on_eight_devices(LOAD, *(folder / name for name in WRITERS))


@pytest.mark.parametrize("form", WRITERS)
def test_the_host_holds_one_tensor_beside_the_shards(needed, form):
    """Measured: at most 1.17 of the largest tensor, and 0.1 for `tensorflow`, whose own memory is not traced."""
    of_form = {case: found for case, found in needed.items() if case.startswith(f"{form} ")}
    assert len(of_form) == 6
    for case, (n_bytes, wrong) in of_form.items():
        assert not wrong, case
        assert n_bytes < BOUND * LARGEST, f"{case}: {n_bytes / LARGEST:.2f} of the largest tensor"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("where", [None, "device", "sharding"])
def test_an_accelerator_gets_casts_in_blocks(monkeypatch, dtype, where):
    """A CPU stands for it. Beside the array, the host holds only a few blocks."""
    monkeypatch.setattr(placing, "_platform", lambda where: "gpu")
    monkeypatch.setattr(placing, "BLOCK", 1_000)
    put, sizes = jax.device_put, []

    def device_put(value, *to):
        sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(value)))
        return put(value, *to)

    monkeypatch.setattr(jax, "device_put", device_put)
    device = jax.devices()[0]
    mesh = jax.sharding.Mesh(np.array([device]), "x")
    to = {None: None, "device": device, "sharding": jax.NamedSharding(mesh, jax.P(None, "x"))}[where]
    array = np.random.default_rng(1).normal(0, 3e4, (97, 31)).astype(np.float32)
    array[11, 3], array[96, 30] = np.nan, np.inf
    with np.errstate(over="ignore"):
        expected = array.astype(dtype)
    for stored in (array, np.asfortranarray(array)):  # transposed in the file
        sizes.clear()
        placed, n_non_finite = placing.place(stored, np.dtype(dtype), to)
        assert np.asarray(placed).tobytes() == expected.tobytes()
        assert placed.dtype == dtype
        assert n_non_finite == np.count_nonzero(~np.isfinite(expected))
        assert placed.committed == (where is not None)
        whole = dtype == "float32" and stored is array  # as it is
        assert max(sizes) <= (array.nbytes if whole else 1_004)  # a block, and the row where it begins
        assert sum(sizes) >= expected.nbytes


def test_nothing_is_read_for_which_there_is_no_room():
    """The array that was yielded counts until the next one is requested."""
    sizes, reading, lock = {"a": 100, "b": 8, "c": 8, "d": 8, "e": 90}, [], threading.Lock()

    def read_one(name):
        with lock:
            reading.append(name)
        return np.zeros(sizes[name], np.uint8)

    tensors = {name: jax.ShapeDtypeStruct((size,), np.uint8) for name, size in sizes.items()}
    leaves = ahead.read_ahead(tensors, read_one)
    held = []
    for name, array in leaves:
        held.append(name)
        assert array.nbytes == sizes[name]
        with lock:
            there = {*reading} - {*held[:-1]}
        assert sum(sizes[other] for other in there) <= 115
    assert held == ["a", "e", "b", "c", "d"]


def test_a_load_that_fails_frees_what_it_placed(tmp_path, monkeypatch):
    """The traceback keeps the frames: without care, it would keep the weights too."""
    forms.write_huggingface(tmp_path, forms.CONFIG, forms.hf_tensors(forms.random_model()))
    place, placed, arrays = placing.place, [], []

    def place_some(array, dtype, where):
        if len(placed) == 20:
            raise OSError("the device is gone")
        leaf, n = place(array, dtype, where)
        placed.append(leaf)
        arrays.append(weakref.ref(array if array.base is None else array.base))
        return leaf, n

    monkeypatch.setattr(loading.placing, "place", place_some)
    with pytest.raises(OSError, match="the device is gone") as caught:
        gpt2_jax.load(tmp_path)
    assert caught.value.__traceback__ is not None
    assert all(leaf.is_deleted() for leaf in placed)
    gc.collect()  # or the next call of JAX
    assert not any(ref() is not None for ref in arrays)


def test_one_cpu_uses_the_arrays_that_were_read():
    """No copy is made: a load takes no longer than reading."""
    array = placing.aligned(400).view(np.float32)
    array[:] = 1
    for to in (None, jax.devices()[0]):
        placed, _ = placing.place(array, array.dtype, to)
        assert placed.unsafe_buffer_pointer() == array.ctypes.data
