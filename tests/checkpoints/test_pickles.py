"""Pickles and other weights that are not read: what the message says, and that its command works."""

import ast
import json
import re
import shlex
import subprocess
import sys

import checkpoint_forms as forms
import foreign_models as foreign
import numpy as np
import pytest
from checkpoint_forms import CONFIG, assert_loads_as, hf_config

import gpt2_jax
from gpt2_jax.checkpoints import pickles

pytestmark = pytest.mark.usefixtures("own_cache")


def convert(directory) -> None:
    """Run the command that the message about weights that are not read offers."""
    said = forms.refusal(directory, ValueError)
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
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "model_args": foreign.NANOGPT, "iter_num": 5, "best_val_loss": torch.tensor(1.0), "config": {"device": "cpu"},
    }  # fmt: skip
    torch.save(content, tmp_path / "ckpt.pt")
    convert(tmp_path)
    with pytest.warns(UserWarning, match="gelu is assumed"):
        config, params = gpt2_jax.load(tmp_path)
    assert (config.activation_function, config.n_head) == ("gelu", 3)
    assert np.array_equal(params["h1"]["mlp"]["c_fc"]["w"], state["transformer.h.1.mlp.c_fc.weight"].T)


@pytest.mark.parity
def test_the_command_converts_lightnings_checkpoint(tmp_path):
    """The model is an attribute of the LightningModule, so its names begin with the attribute's."""
    import torch

    flat = forms.random_model()
    content = {
        "epoch": 1, "global_step": 20, "pytorch-lightning_version": "2.5.0", "loops": {"fit_loop": {"state_dict": {}}},
        "state_dict": torch_state({f"model.{key}": array for key, array in forms.hf_tensors(flat).items()}),
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(1.5)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}],
        "hyper_parameters": {"lr": 0.1, "name": "gpt2"},
    }  # fmt: skip
    torch.save(content, tmp_path / "epoch=1-step=20.ckpt")
    (tmp_path / "config.json").write_text(json.dumps(hf_config(CONFIG)))
    convert(tmp_path)
    assert_loads_as(tmp_path, CONFIG, flat)


@pytest.mark.parity
def test_the_command_converts_the_weights_and_not_the_optimizer_beside_them(tmp_path):
    """Trainer of transformers 4 saved them together."""
    import torch

    flat = forms.random_model()
    torch.save(torch_state(forms.hf_tensors(flat)), tmp_path / "pytorch_model.bin")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt"):
        torch.save({"state": {0: {"exp_avg": torch.ones(3)}}}, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(CONFIG)))
    convert(tmp_path)
    assert_loads_as(tmp_path, CONFIG, flat)


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
    assert "config.json" in forms.refusal(tmp_path)
    assert "emb_dim" in forms.refusal(tmp_path)
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
    assert "ckpt.pt holds pickled weights" in forms.refusal(tmp_path / "ckpt.pt", ValueError)


STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin", "scaler.pt")


@pytest.mark.parametrize("name", STATES)
def test_a_training_state_by_its_path_is_not_called_weights(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    said = forms.refusal(tmp_path / name, ValueError)
    assert f"{name} is a training state and not weights" in said
    assert "python -c" not in said


def test_a_trainers_checkpoint_of_an_adapter_gets_the_adapters_advice(tmp_path):
    """PEFT's Trainer saves the adapter beside its training state, and no weights of the model."""
    for name in ("adapter_model.bin", *STATES):
        (tmp_path / name).write_bytes(b"\x80\x04.")
    (tmp_path / "adapter_config.json").write_text("{}")
    said = forms.refusal(tmp_path, ValueError)
    assert "holds adapter_model.bin, but no weights that can be read: this is an adapter of PEFT in a pickle" in said
    assert "save_pretrained, which writes adapter_model.safetensors" in said
    assert "pickled weights" not in said


def test_a_pickled_adapter_is_not_converted(tmp_path):
    """Nobody would read the result. Pickled weights of a model beside it are."""
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    said = forms.refusal(tmp_path / "adapter_model.bin", ValueError)
    assert re.search(r"adapter_model\.bin .*adapter of PEFT.*save_pretrained", said)
    assert "python -c" not in said
    (tmp_path / "model.pt").write_bytes(b"\x80\x04.")
    assert "model.pt holds pickled weights" in forms.refusal(tmp_path, ValueError)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tf_model.h5", "from_tf=True"),
        ("gpt2.Q8_0.gguf", "gguf_file="),
        ("model-00001-of-00002.safetensors", r"model.safetensors.index.json"),
        ("adapter_model.safetensors", r"adapter_config\.json, which belongs to it, is missing"),
        ("adapter_model.bin", "save_pretrained"),
        ("weights.npz", r"save_file\(dict\(numpy.load"),
        ("rust_model.ot", "another program"),
        ("saved_model.pb", "compiled program"),
        ("__0_0.distcp", "dcp_to_torch"),
        ("model.msgpack", "rename it to flax_model.msgpack"),
        ("pytorch_model.bin.index.json", "the files that it lists"),
        ("gpt2_tokenizer.bin", "holds no model|no such file"),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_other_weights_are_named_with_what_to_do(tmp_path, name, said, config):
    content = np.array([20240328, 2, 37], "<i4").tobytes() if name == "gpt2_tokenizer.bin" else b"GGUF"
    (tmp_path / name).write_bytes(content)
    if config:
        (tmp_path / "config.json").write_text(json.dumps(hf_config(CONFIG)))
    assert re.search(said, forms.refusal(tmp_path)), forms.refusal(tmp_path)
    if name != "gpt2_tokenizer.bin":
        assert name in forms.refusal(tmp_path)
        assert "pickled" not in forms.refusal(tmp_path)


@pytest.mark.parametrize("name", ["plain", "it's $HOME `a`"])
def test_the_command_converts_numpys_arrays(tmp_path, flat, name):
    """MLX's examples write them."""
    folder = tmp_path / name
    folder.mkdir()
    np.savez(folder / "weights.npz", **forms.hf_tensors(flat))
    (folder / "config.json").write_text(json.dumps(hf_config(CONFIG)))
    convert(folder)
    assert_loads_as(folder, CONFIG, flat)


@pytest.mark.parametrize("suffix", [".h5", ".gguf", ".npz", ".distcp"])
def test_a_command_names_the_folder_whatever_its_name(tmp_path, suffix):
    folder = tmp_path / "it's $HOME `a`"
    folder.mkdir()
    (folder / f"model{suffix}").write_bytes(b"GGUF")
    command = forms.refusal(folder)
    command = shlex.split(command[command.index("python -c ") :])
    found = [node.value for node in ast.walk(ast.parse(command[2])) if isinstance(node, ast.Constant)]
    assert any(str(value).startswith(str(folder)) for value in found)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_the_command_converts_a_sharded_checkpoint_of_pytorch(tmp_path, flat):
    """Its result is a pickle, whose own command is offered next."""
    import torch
    from torch.distributed import checkpoint

    state = {key: torch.from_numpy(np.array(array)) for key, array in forms.hf_tensors(flat).items()}
    checkpoint.save({"model": state}, checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(CONFIG)))
    convert(tmp_path)
    convert(tmp_path)
    assert_loads_as(tmp_path, CONFIG, flat)


@pytest.mark.parametrize("name", pickles.ADAPTERS)
def test_an_adapter_beside_a_whole_model_is_left_out_with_a_warning(tmp_path, flat, name):
    """transformers opens the base model of such a folder with the adapter."""
    forms.write_huggingface(tmp_path, CONFIG, forms.hf_tensors(flat))
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.warns(UserWarning, match=rf"{name} is left out, because its folder holds a model too") as caught:
        gpt2_jax.load(tmp_path)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_an_adapter_by_its_path(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert "save_pretrained" in forms.refusal(tmp_path / "adapter_model.bin", ValueError)


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
    said = forms.refusal(name)
    assert f"did you mean {meant}" in said or f"/{meant}?" in said
