"""Pickled weights, which are never opened, and other files that cannot be read: what to do with each.

The commands for pickles need only torch and safetensors. They keep the names in the file, which `load` knows, and write
nanoGPT's settings to config.json.
"""

from __future__ import annotations

import glob
import re
import shlex
from pathlib import Path

from gpt2_jax.checkpoints import llmc, tensorflow

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_BOOK = '{"vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12, "drop_rate": 0.1}'
_CONVERT = (  # GPTConfig is the class in the checkpoints of build-nanogpt; only its values are read
    "import glob, json, os, torch, safetensors.torch as s; "
    "torch.serialization.add_safe_globals([type('GPTConfig', (), {{}})]); "
    "d = {{}}; [d.update(torch.load(f, map_location='cpu', weights_only=True)) for f in sorted(glob.glob({files!r}))]; "
    "w = next((d[k] for k in ('model', 'model_state_dict', 'state_dict', 'module') if k in d), d); "
    "s.save_file({{k: v.clone().contiguous() for k, v in w.items() if torch.is_tensor(v)}}, {to!r}); "
    "a = d.get('model_args') or getattr(d.get('config'), '__dict__', None); c = {config!r}; "
    "a and not os.path.exists(c) and json.dump(a, open(c, 'w'))"
)


# What training programs store beside the weights: a training state.
_BESIDE = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state\w*|\w*optim_states)\.\w+")
# PEFT's names of weights that are added to those of a model: its own, and an old one.
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
PICKLED_ADAPTER = (
    "this is an adapter of PEFT in a pickle, which is not read, because opening it can run code: open it with peft, "
    "and save it with model.save_pretrained, which writes adapter_model.safetensors"
)


def found_in(directory: Path) -> list[str]:
    """Return the names of the files in a directory that are pickled weights, or may be; Hugging Face's come first."""
    paths = (path for path in directory.iterdir() if path.suffix in SUFFIXES and path.is_file())
    names = (path.name for path in paths if is_pickle(path))
    weights = (name for name in names if name not in _ADVICE and not _BESIDE.fullmatch(name))
    return sorted(weights, key=lambda name: (not name.startswith("pytorch_model"), name))


def is_pickle(path: Path) -> bool:
    """Say whether a file is a pickle, or may be: its name ends like one, and it is not a known file of another kind."""
    return path.suffix in SUFFIXES and not (llmc.is_of_llmc(path) or tensorflow.is_v1(path))


def refusal(path: Path) -> str:
    """Return the sentences that refuse a pickle: why, and the command that converts it if it may be weights."""
    if _BESIDE.fullmatch(path.name):
        return f"{path} is a training state and not weights: name the directory or the file that holds the weights"
    if path.name in _ADVICE:
        return f"{path} cannot be read: {_ADVICE[path.name]}"
    directory = path.parent
    files = path.with_name("pytorch_model*.bin") if path.name.startswith("pytorch_model") else path
    config = directory / "config.json"
    code = _CONVERT.format(files=_pattern(files), to=str(directory / "model.safetensors"), config=str(config))
    message = (
        f"{path} holds pickled weights, which are not read, because opening them can run code; convert them to "
        f"model.safetensors with: python -c {shlex.quote(code)}"
    )
    if config.is_file():
        return message
    return (
        f"{message} (and write the model's config to {config}: the file that belongs to the weights, or the settings "
        f"of the program that wrote them, such as {_BOOK}; the command does this for nanoGPT's ckpt.pt)"
    )


def _pattern(path: Path) -> str:
    return glob.escape(str(path.parent)) + "/" + path.name if "*" in path.name else glob.escape(str(path))


def other_weights(directory: Path) -> str | None:
    """Return what to do with the weights of other kinds in a directory, one sentence. None if there are none."""
    paths = [path for path in sorted(directory.iterdir()) if path.is_file()]
    for suffix, advice in _ADVICE.items():
        if names := [path.name for path in paths if path.name.endswith(suffix)]:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            if suffix in _CODE:
                code = _CODE[suffix].format(d=str(directory), file=str(directory / names[0]))
                advice = f"{advice}: python -c {shlex.quote(code)}"
            return f"{directory} holds {listed}, but no weights that can be read: {advice}"
    return None


_COMPILED = "this is a compiled program; use the model from which it was exported"
_ADVICE = {  # by the name of a file, or its end; what `_CODE` has is appended as a command
    ADAPTERS[0]: "this is an adapter of PEFT: adapter_config.json, which belongs to it, is missing",
    ADAPTERS[1]: PICKLED_ADAPTER,
    ".safetensors": (
        "rename the file to model.safetensors, or, if it is one of several parts, add model.safetensors.index.json, "
        "which lists the parts"
    ),
    ".h5": "these are the weights for Keras; convert them with transformers 4 and TensorFlow",
    ".npz": "these are arrays of NumPy; write them as safetensors",
    ".distcp": "this is a sharded checkpoint of PyTorch; put it into one file",
    ".msgpack": "if these are the weights of Flax, rename it to flax_model.msgpack",
    "pytorch_model.bin.index.json": "the files that it lists are missing; fetch or copy them too",
    "rust_model.ot": "these are weights for another program; use the model from which they were converted",
    "saved_model.pb": _COMPILED,
    ".tflite": _COMPILED,
    ".onnx": _COMPILED,
    ".gguf": "this is a file of llama.cpp; convert it with transformers and gguf",
}
_GPT2 = "from transformers import GPT2LMHeadModel as M; "
_CODE = {
    ".h5": _GPT2 + "M.from_pretrained({d!r}, from_tf=True).save_pretrained({d!r})",
    ".npz": (
        "import numpy, safetensors.numpy as s; s.save_file(dict(numpy.load({file!r})), {d!r} + '/model.safetensors')"
    ),
    ".distcp": (
        "from torch.distributed.checkpoint import format_utils as f; f.dcp_to_torch_save({d!r}, {d!r} + '/model.pt')"
    ),
    ".gguf": _GPT2 + "M.from_pretrained({d!r}, gguf_file={file!r}).save_pretrained({d!r})",
}
