"""The inspector's list of files: what is read, what is not, and how large each is."""

import pytest

from gpt2_jax.inspection import files

FOLDERS = {
    "the release's": (
        "tensorflow",
        ["checkpoint", "encoder.json", "hparams.json", "model.ckpt.data-00000-of-00001", "model.ckpt.index"],
        ["model.ckpt.meta", "README.md", "notes"],
    ),
    "gpt-2-simple's, an older checkpoint left in it": (
        "tensorflow",
        ["checkpoint", "hparams.json", "model-1000.data-00000-of-00001", "model-1000.index", "vocab.bpe"],
        ["model-500.data-00000-of-00001", "model-500.index", "model-1000.meta", "counter", "events.out.tfevents.1"],
    ),
    "the hub's": (
        "huggingface",
        ["config.json", "model.safetensors", "tokenizer.json"],
        [
            "pytorch_model.bin",
            "tf_model.h5",
            "generation_config.json",
            "vocab.json",
            "merges.txt",
            ".gitattributes",
            "onnx/",
        ],
    ),
    "the hub's, in parts": (
        "huggingface",
        [
            "config.json",
            "model.safetensors.index.json",
            "model-00001-of-00002.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ],
        ["adapter.safetensors"],
    ),
    "the hub's, with two files of a vocabulary": (
        "huggingface",
        ["config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json"],
        ["tf_model.h5"],
    ),
    "the hub's, whole and in parts": (
        "huggingface",
        ["config.json", "model.safetensors"],
        ["model.safetensors.index.json", "model-00001-of-00002.safetensors"],
    ),
    "FlaxGPT2LMHeadModel's": (
        "flax",
        ["config.json", "flax_model.msgpack", "vocab.json", "merges.txt"],
        ["pytorch_model.bin", "tf_model.h5"],
    ),
    "Orbax's": ("orbax_tree", ["hparams.json", "state/"], ["notes.txt"]),
    "ours": ("orbax", ["gpt2_jax.json", "params/", "encoder.json", "vocab.bpe"], ["vocab.json", "other/"]),
}


@pytest.mark.parametrize(("form", "used", "unused"), FOLDERS.values(), ids=FOLDERS)
def test_what_each_file_is_for(tmp_path, form, used, unused):
    """Files that are read come first, each with its purpose. A folder's size is that of all files in it."""
    for size, name in enumerate([*used, *unused], start=7):
        path = tmp_path / name
        if name.endswith("/"):
            (path / "inner").mkdir(parents=True)
            (path / "inner" / "0").write_bytes(b"x" * (size - 2))
            (path / "1").write_bytes(b"xx")
        else:
            path.write_bytes(b"x" * size)
    prefix = "model-1000" if "model-1000.index" in used else "model.ckpt"
    if "checkpoint" in used:
        (tmp_path / "checkpoint").write_text(f'model_checkpoint_path: "C:\\runs\\{prefix}"\n')
    found = files.list_files(tmp_path, form)
    assert [file["name"] for file in found if file["used"]] == sorted(used)
    assert [file["name"] for file in found] == sorted(used) + sorted(unused)
    assert all(file["purpose"] for file in found if file["used"])
    sizes = {file["name"]: file["bytes"] for file in found} | {"checkpoint": 7}
    assert sizes == {name: size for size, name in enumerate([*used, *unused], start=7)} | {"checkpoint": 7}


@pytest.mark.parametrize(
    ("form", "name", "used"),
    [
        ("llmc", "model_00000200.bin", ["model_00000200.bin"]),
        ("tensorflow", "model-500", ["hparams.json", "model-500.data-00000-of-00001", "model-500.index"]),
    ],
)
def test_a_file_or_a_checkpoint_by_its_name(tmp_path, form, name, used):
    """The other files of the folder are listed too, as files that are not read."""
    others = ["gpt2_tokenizer.bin", "model-1000.index", "model-1000.data-00000-of-00001", "model_00000100.bin"]
    for file in (*used, *others):
        (tmp_path / file).write_bytes(b"x")
    found = files.list_files(tmp_path / name, form)
    assert [file["name"] for file in found if file["used"]] == used
    assert {file["name"] for file in found} == {*used, *others}
