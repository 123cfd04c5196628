"""Folders that other programs leave: TensorFlow's of training runs, Orbax's of all its interfaces, and pickles."""

import json
import shlex
import subprocess
import sys

import checkpoint_forms as forms
import foreign_models as foreign
import ml_dtypes
import numpy as np
import pytest
from checkpoint_forms import CONFIG, assert_loads_as, hf_config, variables_of, write_tensorflow

import gpt2_jax
from gpt2_jax.checkpoints import copies


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    forms.import_tensorflow()
    monkeypatch.setenv("GPT2_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def flat():
    return forms.random_model()


def refusal(source, error=(ValueError, FileNotFoundError)) -> str:
    with pytest.raises(error) as caught:
        gpt2_jax.load(source)
    assert forms.is_clear(caught.value), caught.value
    return str(caught.value)


# ---- TensorFlow


SLOTS = {  # of TensorFlow's optimizers, of BERT's, and of training loops
    "Adam": ["{}/Adam", "{}/Adam_1", "beta1_power", "beta2_power"],
    "under a scope": ["train/{}/Adam", "train/{}/Adam_1", "train/beta1_power"],
    "BERT's": ["{}/adam_m", "{}/adam_v"],
    "momentum": ["{}/Momentum"],
    "global_step": ["global_step"],
}


@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize("copy", [True, False])
def test_the_variables_of_an_optimizer_are_left_out(tmp_path, flat, slots, copy):
    """huggingface/transformers#16, #6467."""
    directory = write_tensorflow(tmp_path / "model", CONFIG, flat)
    variables = variables_of(flat)
    more = {slot.format(name): np.float32(3) * array for name, array in variables.items() for slot in slots}
    more |= {name: np.int64(7) for name in ("global_step",) if name in slots}
    forms.write_variables(directory / "model.ckpt", variables | more)
    for _ in range(2):
        assert_loads_as(directory, CONFIG, flat, keep_copy=copy)
        assert gpt2_jax.load_config(directory) == CONFIG


def test_an_optimizers_variables_alone_are_no_model(tmp_path, flat):
    directory = write_tensorflow(tmp_path / "model", CONFIG, flat)
    forms.write_variables(directory / "model.ckpt", {f"{k}/Adam": a for k, a in variables_of(flat).items()})
    assert "missing: model/wte" in refusal(directory)


@pytest.fixture
def run(tmp_path, flat):
    """(folder, {step: flat}): a folder of gpt-2-simple with three checkpoints, of which the newest is named."""
    models = {step: forms.random_model(seed=step) for step in (500, 1000, 1500)}
    for step, model in models.items():
        write_tensorflow(tmp_path / "checkpoint" / "run1", CONFIG, model, prefix=f"model-{step}")
    return tmp_path / "checkpoint" / "run1", models


@pytest.mark.parametrize("suffix", ["", ".index", ".data-00000-of-00001"])
def test_one_of_several_checkpoints_by_its_name(run, suffix, monkeypatch):
    """minimaxir/gpt-2-simple#217."""
    folder, models = run
    for step in (1000, 500, 1000):
        assert_loads_as(f"{folder}/model-{step}{suffix}", CONFIG, models[step])
        assert gpt2_jax.load_config(folder / f"model-{step}{suffix}") == CONFIG
    assert_loads_as(folder, CONFIG, models[1500])
    assert len(list(copies.copy_path(folder).parent.iterdir())) == 1  # one copy a folder
    monkeypatch.chdir(folder)
    assert_loads_as("model-500", CONFIG, models[500])


def test_its_vocabulary_is_in_the_folder(run, model_dir):
    folder, _ = run
    config = json.loads((folder / "hparams.json").read_text()) | {"n_vocab": 1281}
    (folder / "hparams.json").write_text(json.dumps(config))
    forms.copy_vocabulary(model_dir, folder)
    assert gpt2_jax.load_tokenizer(folder / "model-500").n_vocab == 1281


def test_the_hparams_may_be_in_the_parent_folder(run):
    folder, models = run
    (folder / "hparams.json").rename(folder.parent / "hparams.json")
    assert_loads_as(folder / "model-1000", CONFIG, models[1000])
    (folder.parent / "hparams.json").unlink()
    assert "hparams.json" in refusal(folder / "model-1000")


def test_several_checkpoints_and_none_named(run):
    folder, _ = run
    (folder / "checkpoint").unlink()
    assert "model-1000" in (said := refusal(folder))
    assert "load one by its name" in said


def test_a_checkpoint_without_its_data_file(run):
    folder, _ = run
    (folder / "model-500.data-00000-of-00001").unlink()
    assert "model-500.data" in refusal(folder / "model-500")
    assert "model-400" in refusal(folder / "model-400")


@pytest.mark.parametrize("name", ["model.ckpt", "model-1000"])
@pytest.mark.parametrize("pointer", [True, False])
def test_version_1_of_tensorflows_checkpoints(tmp_path, flat, name, pointer):
    """One file without an index. It is no pickle, although its name may end in .ckpt."""
    directory = tmp_path / "model"
    foreign.write_v1(directory / name, variables_of(flat))
    (directory / "hparams.json").write_text(json.dumps(CONFIG.to_hparams()))
    if pointer:
        (directory / "checkpoint").write_text(f'model_checkpoint_path: "/there/{name}"\n')
    for source in (directory, directory / name, directory):
        assert_loads_as(source, CONFIG, flat)
        assert gpt2_jax.load_config(source) == CONFIG


def test_settings_of_training_in_hparams(tmp_path, flat):
    """nshepperd/gpt-2's fork and others add dropout rates and the like."""
    directory = write_tensorflow(tmp_path / "model", CONFIG, flat)
    more = {"res_dropout": 0.1, "attn_dropout": 0.1, "embd_pdrop": 0.1, "dtype": "float32", "batch_size": 4}
    (directory / "hparams.json").write_text(json.dumps(CONFIG.to_hparams() | more))
    assert_loads_as(directory, CONFIG, flat)


# ---- Orbax


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
    assert "h1.mlp.c_fc.w" in refusal(tmp_path)


def test_a_damaged_tree(tmp_path, flat):
    save_tree(tmp_path / "tree", forms.nested(flat), "StandardCheckpointer")
    (tmp_path / "hparams.json").write_text(json.dumps(CONFIG.to_hparams()))
    (tmp_path / "tree" / "_METADATA").write_text("{")
    assert "damaged" in refusal(tmp_path)


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
for limit in (200, 2000, 20000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        gpt2_jax.save(sys.argv[1], forms.CONFIG, params, format="orbax")
    except OSError as error:
        print(error)
"""


def test_a_full_disk_leaves_one_sentence_and_no_folder(tmp_path):
    """Threads of Orbax go on after the error. They must neither print tracebacks nor make the folder again."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "model")], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert (
        done.stdout.splitlines() == [f"{tmp_path / 'model'} cannot be written, and was not changed: File too large"] * 3
    )
    assert list(tmp_path.iterdir()) == []


# ---- pickles, and other files that are not read


def convert(directory) -> None:
    """Run the command that the message about a pickle offers."""
    said = refusal(directory, ValueError)
    assert "pickled weights" in said
    line = said[said.index("python -c ") :]
    command = shlex.split(line.partition(" (and write")[0])
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True, text=True)


def torch_state(state):
    import torch

    found = {key: torch.from_numpy(np.array(array)) for key, array in state.items()}
    if "lm_head.weight" in found:  # tied, as in memory: one storage under two names
        found["lm_head.weight"] = found["transformer.wte.weight"]
    return found


@pytest.mark.parity
@pytest.mark.parametrize("wrapper", ["model", "state_dict", "module"])
def test_the_command_converts_nanogpts_checkpoint(tmp_path, wrapper):
    """With its settings and optimizer, as nanoGPT's train.py saves it; other loops have other words for the model."""
    import torch

    state = foreign.nanogpt()
    content = {
        wrapper: torch_state({f"_orig_mod.{key}": array for key, array in state.items()}),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "model_args": foreign.NANOGPT, "iter_num": 5, "best_val_loss": torch.tensor(1.0), "config": {"device": "cpu"},
    }  # fmt: skip
    torch.save(content, tmp_path / "ckpt.pt")
    convert(tmp_path)
    config, params = gpt2_jax.load(tmp_path)
    assert (config.activation_function, config.n_head) == ("gelu", 3)
    assert np.array_equal(params["h1"]["mlp"]["c_fc"]["w"], state["transformer.h.1.mlp.c_fc.weight"].T)


BUILD_NANOGPT = """
import dataclasses, sys, torch

@dataclasses.dataclass
class GPTConfig:
    block_size: int = 11
    vocab_size: int = 37
    n_layer: int = 2
    n_head: int = 3
    n_embd: int = 15

state = torch.load(sys.argv[1])
torch.save({"model": state, "config": GPTConfig(), "step": 5, "val_loss": 3.0}, sys.argv[2])
"""


@pytest.mark.parity
def test_the_command_converts_build_nanogpts_checkpoint(tmp_path):
    """karpathy/build-nanogpt saves its config as an object of a class in its script. Its GELU is the one of GPT-2."""
    import torch

    state = foreign.nanogpt()
    torch.save(torch_state(state), tmp_path / "state")
    path = tmp_path / "model" / "model_00005.pt"
    path.parent.mkdir()
    subprocess.run([sys.executable, "-c", BUILD_NANOGPT, str(tmp_path / "state"), str(path)], check=True)
    convert(path.parent)
    config, params = gpt2_jax.load(path.parent)
    assert (config.activation_function, config.n_head) == ("gelu_new", 3)
    assert np.array_equal(params["wte"], state["transformer.wte.weight"])


@pytest.mark.parity
@pytest.mark.parametrize("wrapper", [None, "model_state_dict"])
def test_the_command_converts_the_books_model(tmp_path, wrapper):
    """The user writes the book's settings beside it, as the message says."""
    import torch

    state = foreign.in_torch_names(foreign.book(tied=False))
    content = torch_state(state)
    torch.save({wrapper: content, "optimizer_state_dict": {}} if wrapper else content, tmp_path / "model.pth")
    assert "config.json" in refusal(tmp_path)
    assert "emb_dim" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(foreign.BOOK))
    convert(tmp_path)
    config, params = gpt2_jax.load(tmp_path)
    assert not config.tie_word_embeddings
    assert np.array_equal(params["lm_head"], state["out_head.weight"])


@pytest.mark.parity
@pytest.mark.parametrize(
    "names", [("pytorch_model.bin",), tuple(f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2))]
)
@pytest.mark.parametrize("folder", ["model", "it's [a] folder"])
def test_the_command_converts_hugging_faces_pickles(tmp_path, flat, names, folder):
    import torch

    directory = tmp_path / folder
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(hf_config(CONFIG)))
    tensors = list(torch_state(forms.hf_tensors(flat) | {"lm_head.weight": flat["wte"]}).items())
    for i, name in enumerate(names):
        torch.save(dict(tensors[i :: len(names)]), directory / name)
    convert(directory)
    assert_loads_as(directory, CONFIG, flat)


def test_a_pickle_by_its_path_is_refused_with_the_command(tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(b"\x80\x04.")
    assert "ckpt.pt holds pickled weights" in refusal(tmp_path / "ckpt.pt", ValueError)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tf_model.h5", "from_tf=True"),
        ("gpt2.Q8_0.gguf", "gguf_file="),
        ("model-00001-of-00002.safetensors", r"model.safetensors.index.json"),
        ("adapter_model.safetensors", "merge_and_unload"),
        ("gpt2_tokenizer.bin", "holds no model|no such file"),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_other_weights_are_named_with_what_to_do(tmp_path, name, said, config):
    content = np.array([20240328, 2, 37], "<i4").tobytes() if name.endswith("bin") else b"GGUF"
    (tmp_path / name).write_bytes(content)
    if config:
        (tmp_path / "config.json").write_text(json.dumps(hf_config(CONFIG)))
    import re

    assert re.search(said, refusal(tmp_path)), refusal(tmp_path)
    if not name.endswith("bin"):
        assert name in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("distilgpt2", "distilbert/distilgpt2"),
        ("DialoGPT-small", "microsoft/DialoGPT-small"),
        ("distillgpt2", "distilgpt2"),
    ],
)
def test_names_without_their_owner(tmp_path, monkeypatch, name, meant):
    monkeypatch.chdir(tmp_path)
    said = refusal(name)
    assert f"did you mean {meant}" in said or f"/{meant}?" in said


def test_loaded_arrays_may_be_donated(tmp_path, flat):
    """A training step writes into donated buffers. No second load may see that."""
    import jax

    foreign.write_llmc(tmp_path / "llmc" / "model.bin", CONFIG, flat)
    foreign.write(tmp_path / "nanogpt", foreign.NANOGPT, foreign.nanogpt())
    step = jax.jit(lambda params: jax.tree.map(lambda leaf: leaf + 1, params), donate_argnums=0)
    for name in ("llmc", "nanogpt"):
        before = forms.leaves(gpt2_jax.load(tmp_path / name)[1])
        step(gpt2_jax.load(tmp_path / name)[1])
        assert forms.difference(gpt2_jax.load(tmp_path / name)[1], before) == ""


def test_bfloat16_of_llmc_is_read_exactly(tmp_path):
    config = CONFIG.replace(param_dtype="bfloat16")
    flat = forms.random_bits(config, 3)
    assert flat["wte"].dtype == ml_dtypes.bfloat16
    assert_loads_as(foreign.write_llmc(tmp_path / "model.bin", config, flat, version=5), config, flat)
