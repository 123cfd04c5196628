"""Trees of Orbax's other interfaces; Orbax's usual readers on ours; a full disk."""

import contextlib
import json
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import checkpoint_forms as forms
import foreign_models as foreign
import numpy as np
import pytest
from checkpoint_forms import CONFIG, assert_loads_as, hf_config

import gpt2_jax
from gpt2_jax.checkpoints import flax_msgpack, foreign_orbax, parts

pytestmark = pytest.mark.usefixtures("own_cache")


def train_state(params):
    import optax
    from flax.training import train_state

    return train_state.TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-3))


def save_tree(path, tree, writer):
    import orbax.checkpoint as ocp
    from orbax.checkpoint import v1

    path.parent.mkdir(parents=True, exist_ok=True)
    if writer == "PyTreeCheckpointer":
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
    elif writer == "StandardCheckpointer":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
    elif writer == "v1":
        v1.save(str(path), tree)
    elif writer == "CheckpointManager":
        with ocp.CheckpointManager(path) as manager:
            for step in (5, 10):
                manager.save(step, args=ocp.args.StandardSave(tree))
    else:
        items = ocp.args.Composite(params=ocp.args.StandardSave(tree), extra=ocp.args.JsonSave({"a": 1}))
        with ocp.CheckpointManager(path, item_names=("params", "extra")) as manager:
            manager.save(10, args=items)


WRITERS = ("PyTreeCheckpointer", "StandardCheckpointer", "v1", "CheckpointManager", "CheckpointManager with items")


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "wrap", [lambda p: p, train_state, lambda p: {"params": {"params": p}}], ids=["", "state", "2"]
)
@pytest.mark.parametrize("beside", ["hparams.json", "config.json"])
def test_trees_of_orbaxs_interfaces(tmp_path, flat, writer, wrap, beside):
    import jax

    params = jax.tree.map(jax.numpy.asarray, forms.nested(flat))
    save_tree(tmp_path / "model" / "tree", wrap(params), writer)
    fields = CONFIG.to_hparams() if beside == "hparams.json" else hf_config(CONFIG)
    (tmp_path / "model" / beside).write_text(json.dumps(fields))
    assert_loads_as(tmp_path / "model", CONFIG, flat)
    assert gpt2_jax.load_config(tmp_path / "model") == CONFIG


def test_the_config_may_be_in_the_tree_itself(tmp_path, flat):
    save_tree(tmp_path / "tree", forms.nested(flat), "StandardCheckpointer")
    (tmp_path / "tree" / "hparams.json").write_text(json.dumps(CONFIG.to_hparams()))
    assert_loads_as(tmp_path / "tree", CONFIG, flat)


def test_a_tree_under_the_names_of_flax(tmp_path):
    """What a user of FlaxGPT2LMHeadModel saves with Orbax."""
    tree = foreign.flax()
    save_tree(tmp_path / "tree", tree, "StandardCheckpointer")
    (tmp_path / "config.json").write_text(json.dumps(hf_config(CONFIG)))
    _, params = gpt2_jax.load(tmp_path)
    kernel = tree["transformer"]["h"]["1"]["mlp"]["c_fc"]["kernel"]
    assert np.array_equal(params["h1"]["mlp"]["c_fc"]["w"], kernel.T)


def test_a_tree_of_another_model(tmp_path, flat):
    del flat["h1/mlp/c_fc/w"]
    save_tree(tmp_path / "tree", forms.nested(flat), "StandardCheckpointer")
    (tmp_path / "hparams.json").write_text(json.dumps(CONFIG.to_hparams()))
    assert "h1.mlp.c_fc.w" in forms.refusal(tmp_path)


def test_a_damaged_tree(tmp_path, flat, monkeypatch):
    """It is read once, and nothing waits: only a save has threads that go on."""
    read, n_reads, slept = foreign_orbax._find_arrays, [], []
    monkeypatch.setattr(foreign_orbax, "_find_arrays", lambda path: n_reads.append(path) or read(path))
    monkeypatch.setattr(parts, "time", SimpleNamespace(monotonic=time.monotonic, sleep=slept.append))
    save_tree(tmp_path / "tree", forms.nested(flat), "StandardCheckpointer")
    (tmp_path / "hparams.json").write_text(json.dumps(CONFIG.to_hparams()))
    (tmp_path / "tree" / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        gpt2_jax.load_config(tmp_path)
    assert len(n_reads) == 1
    assert "damaged" in forms.refusal(tmp_path)
    assert slept == []


def test_only_a_file_that_needs_a_dtype_is_read_twice(tmp_path, monkeypatch):
    """`load_config` then gives the config that dtype="float32" gives. Damage is not such a need."""
    read, n_reads = flax_msgpack._restore, []
    monkeypatch.setattr(flax_msgpack, "_restore", lambda path: n_reads.append(path) or read(path))
    double = {name: array.astype(np.float64) for name, array in forms.random_model().items()}
    foreign.write_flax(tmp_path, CONFIG, double)
    assert gpt2_jax.load_config(tmp_path) == CONFIG
    assert len(n_reads) == 2
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        gpt2_jax.load_config(tmp_path)
    assert len(n_reads) == 3


@pytest.mark.parametrize(
    ("reader", "write"),
    [(flax_msgpack, foreign.write_flax), (foreign_orbax, foreign.write_orbax)],
    ids=["flax", "orbax"],
)
def test_each_array_is_freed_after_it_was_yielded(tmp_path, reader, write):
    """Otherwise the host holds all weights twice while they are put on a CPU."""
    write(tmp_path, CONFIG, forms.random_model())
    _, leaves = reader.read(tmp_path)
    yielded = []
    for _name, array in leaves:
        yielded.append(weakref.ref(array))
        assert sum(ref() is not None for ref in yielded) <= 2  # this one, and the loop's last one
    assert len(yielded) == len(forms.shapes(CONFIG))


def test_blocks_that_overlap_put_the_hook_back(monkeypatch):
    """`finish` runs in any thread, so a block can end while one that began later is open."""
    seen = []
    before = seen.append
    monkeypatch.setattr(sys, "unraisablehook", before)
    monkeypatch.setattr(parts, "_late_errors", parts._LateErrors())
    closed, other = (SimpleNamespace(exc_value=RuntimeError(text)) for text in ("Event loop is closed", "another"))
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(parts.clear_errors())
        second.enter_context(parts.clear_errors())
        first.close()
        sys.unraisablehook(closed)
        sys.unraisablehook(other)
    assert seen == [other]
    assert sys.unraisablehook is before


@pytest.mark.parametrize("folder", ["model", "odd [1]"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_orbaxs_usual_readers_open_ours(tmp_path, flat, folder, dtype):
    import orbax.checkpoint as ocp
    from orbax.checkpoint import v1

    half = {name: array.astype(dtype) for name, array in flat.items()}
    gpt2_jax.save(tmp_path / folder, CONFIG.replace(param_dtype=dtype), forms.nested(half), format="orbax")
    path = tmp_path / folder / "params"
    with ocp.StandardCheckpointer() as standard, ocp.PyTreeCheckpointer() as pytree:
        for tree in (standard.restore(path), pytree.restore(path), v1.load(str(path))):
            assert forms.difference(tree, half) == ""


def test_a_tree_of_the_layout_of_earlier_versions(tmp_path, flat):
    """Orbax's v1 interface wrote it."""
    from orbax.checkpoint import v1

    from gpt2_jax.checkpoints.integrity import sha256, write_manifest
    from gpt2_jax.files import hash_files

    v1.save(str(tmp_path / "params"), forms.nested(flat))
    hashes = {name: sha256(array) for name, array in flat.items()}
    text = write_manifest(CONFIG, hashes, files=hash_files(tmp_path / "params"))
    (tmp_path / "gpt2_jax.json").write_text(text)
    assert_loads_as(tmp_path, CONFIG, flat)


FULL_DISK = """
import resource, sys
import checkpoint_forms as forms
import gpt2_jax
params = forms.nested(forms.random_model())
for limit in (200, 2000, 6000):  # _METADATA is larger
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        gpt2_jax.save(sys.argv[1], forms.CONFIG, params, format="orbax")
    except OSError as error:
        print(error)
"""


def test_a_full_disk_leaves_one_sentence_and_no_folder(tmp_path):
    """Threads of Orbax go on after the error. They must neither print tracebacks nor make the folder again."""
    paths = [str(Path(__file__).parents[1] / "support"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "model")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert (
        done.stdout.splitlines() == [f"{tmp_path / 'model'} cannot be written, and was not changed: File too large"] * 3
    )
    assert list(tmp_path.iterdir()) == []
