"""OpenAI's TensorFlow checkpoints: `hparams.json` and the variables, with OpenAI's names.

A checkpoint is a prefix: `model-1000` for `model-1000.index` and `model-1000.data-00000-of-00001`. In the oldest
version, V1, it is one file of that name. A path is a folder, whose `checkpoint` file names the prefix, or a prefix.

TensorFlow is imported inside the functions that need it, and the accelerators are hidden from it. Only its checkpoint
reader and writer are used.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from gpt2_jax.checkpoints.integrity import DamagedError, Leaves, one_line, stored_dtype
from gpt2_jax.checkpoints.names import check_differences
from gpt2_jax.config import GPT2Config
from gpt2_jax.model import abstract_params
from gpt2_jax.params import flatten

PREFIX = "model/"
DATA_SUFFIX = ".data-*-of-*"
V1_END = bytes.fromhex("57fb808b247547db")  # the last bytes of a V1 checkpoint: the mark of its table format
# What optimizers and training loops store beside the model, under names that do not tell it otherwise (`_of_model`).
TRAINING = re.compile(
    r"(.+/)?(Adam(W|Optimizer|WeightDecay\w*)?(_\d+)?|adam_[mv]|Momentum(_\d+)?|RMSProp(_\d+)?|Adagrad|Adafactor\w*"
    r"|ExponentialMovingAverage|beta[12]_power(_\d+)?|global_step|learning_rate|loss_scale\w*|good_steps)"
)
# Settings of training that forks of the released code add to hparams.json.
OTHER_HPARAMS = re.compile(r"(\w+_)?(dropout|pdrop)|dtype|precision|scope|batch_size|n_gpu|learning_rate|lr")


def read(path: Path, dtype: np.dtype | None = None) -> tuple[GPT2Config, Leaves]:
    """Read the config and every variable of a checkpoint in OpenAI's layout. The graph (`.meta`) is not needed.

    Missing and unknown names, wrong shapes and wrong dtypes are errors. Variables of an optimizer are left out.
    TensorFlow verifies the checksum of each variable when it is read. Nothing is transposed: only the leading 1 of a
    convolution's `w` (1, in, out) is dropped.

    Args:
      path: a folder, or the prefix of one of its checkpoints.
      dtype: the dtype into which the caller casts. Then the variables may have any float dtypes.

    Returns:
      config, leaves. The config's param_dtype is the dtype of the variables, or `dtype`. Each leaf is read when it is
      requested, in its stored dtype.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: hparams.json is malformed, or the variables do not match it.
      DamagedError: the files are damaged. The call or the reading of a leaf raises it.
    """
    config = read_hparams(path)
    prefix = find_checkpoint(path)
    check_path(prefix)
    tf = import_tensorflow()
    with _clear_damage_errors(tf, prefix):
        reader = tf.train.load_checkpoint(str(prefix))
        shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    if config.n_layer > len(shapes):  # checked before a tree of that many layers is built
        raise ValueError(f"hparams.json says n_layer = {config.n_layer}, but {prefix} has {len(shapes)} variables")
    names = _of_model(shapes, {PREFIX + name for name in flatten(abstract_params(config))})
    found = {name: SimpleNamespace(shape=shapes[name], dtype=dtypes[name]) for name in names}
    config = config.replace(param_dtype=stored_dtype((variable.dtype for variable in found.values()), prefix, dtype))
    expected = flatten(abstract_params(config))
    check_differences(found, _variables(expected), prefix, "hparams.json", dtype)

    def leaves() -> Leaves:
        for name, leaf in expected.items():
            with _clear_damage_errors(tf, prefix):
                array = reader.get_tensor(PREFIX + name)
            array = array.reshape(leaf.shape)
            yield name, array
            del array  # before the next one is read

    return config, leaves()


def _of_model(shapes: Mapping[str, Sequence[int]], expected: Set[str]) -> list[str]:
    """Return the variables that are not those of an optimizer or a training loop.

    TensorFlow's optimizers put their variables under the name of the parameter, as in `model/wte/Adam`. Counters are
    scalars, which a GPT-2 does not have.
    """
    rest = [name for name in shapes if name.rpartition("/")[0] not in expected and not TRAINING.fullmatch(name)]
    return [name for name in rest if len(shapes[name]) > 0 or name.startswith(PREFIX)]


@contextlib.contextmanager
def _clear_damage_errors(tf: ModuleType, prefix: Path) -> Iterator[None]:
    """Turn the errors of TensorFlow's reader for a damaged file into one sentence. Use it only around the reader."""
    try:
        yield
    except (tf.errors.OpError, RuntimeError, IndexError) as error:
        raise DamagedError(f"{prefix} is damaged and must be fetched again: {one_line(error)}") from error


def write(directory: Path, config: GPT2Config, flat: Mapping[str, np.ndarray]) -> None:
    """Write `hparams.json` and the variables, with the original names and shapes, into an empty directory."""
    tf = import_tensorflow()
    variables = _variables(flat)
    tensors = [np.reshape(flat[name.removeprefix(PREFIX)], leaf.shape) for name, leaf in variables.items()]
    prefix = str(directory / "model.ckpt")
    try:
        with tf.device("CPU"):
            tf.raw_ops.SaveV2(
                prefix=prefix, tensor_names=list(variables), shape_and_slices=[""] * len(variables), tensors=tensors
            )
    except tf.errors.OpError as error:
        raise OSError(f"TensorFlow says: {one_line(error)}") from error
    pointer = 'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n'
    (directory / "checkpoint").write_text(pointer, encoding="utf-8")
    (directory / "hparams.json").write_text(json.dumps(config.to_hparams()), encoding="utf-8")


def check_path(path: Path) -> None:
    """Check that TensorFlow can read files at a path.

    Raises:
      ValueError: the path contains a `[`.
    """
    if "[" in str(path.resolve()):
        raise ValueError(f"{path}: TensorFlow treats [ in a path as a pattern; choose another folder")


def check_config(config: GPT2Config) -> None:
    """Check that OpenAI's files can describe a model. They have no place for labels, or other arithmetic than OpenAI's.

    `reorder_and_upcast_attn` is accepted and not stored, because it does not change the arithmetic here.

    Raises:
      ValueError: the model is a classifier, or has other arithmetic. The message names the fields.
    """
    if config.labels:
        raise ValueError(
            "the tensorflow format cannot hold a classifier's head, score/w: save it in the format huggingface or orbax"
        )
    lost = [f"{name} = {value!r}" for name, value in config.variants.items() if name != "reorder_and_upcast_attn"]
    if lost:
        raise ValueError(
            f"the tensorflow format cannot hold {', '.join(lost)}: save the model in the format huggingface or orbax"
        )


def read_hparams(path: Path) -> GPT2Config:
    """Read `hparams.json`. For a prefix, it is in the same folder or in the parent of that folder.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: the file is not JSON, or does not hold exactly GPT-2's hyperparameters and known settings of training.
        The message names the file.
    """
    folders = [path] if path.is_dir() else [path.parent, path.absolute().parent.parent]
    file = next((folder / "hparams.json" for folder in folders if (folder / "hparams.json").is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{folders[0]} holds no hparams.json: it is not a checkpoint in OpenAI's layout")
    try:
        fields = json.loads(file.read_text(encoding="utf-8-sig"))
        if isinstance(fields, dict):
            fields = {name: value for name, value in fields.items() if not OTHER_HPARAMS.fullmatch(name)}
        return GPT2Config.from_hparams(fields)
    except (ValueError, RecursionError) as error:  # json's and unicode's errors are ValueErrors too
        raise ValueError(f"{file}: {error}") from error


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint's prefix: the one in the `checkpoint` file, or else the only `*.index` in the directory.

    The folder in the `checkpoint` file is ignored, because it belongs to the machine that wrote it. A path that is not
    a folder is the prefix itself.

    Raises:
      FileNotFoundError: the index or the data file is missing.
      ValueError: the `checkpoint` file is unreadable, or there is none and the directory has several indexes.
    """
    prefix = _prefix_in(path) if path.is_dir() else path
    if is_v1(prefix):
        return prefix
    for suffix in (".index", DATA_SUFFIX):
        if not any(prefix.parent.glob(glob.escape(prefix.name) + suffix)):
            raise FileNotFoundError(f"{prefix.parent} holds no {prefix.name}{suffix}: the checkpoint is not complete")
    return prefix


def _prefix_in(directory: Path) -> Path:
    pointer = directory / "checkpoint"
    if pointer.is_file():
        match = re.search(r'^model_checkpoint_path: "(.+)"', pointer.read_text("utf-8", errors="replace"), re.MULTILINE)
        if match is None:
            raise ValueError(f'{pointer} names no checkpoint: its first line should be model_checkpoint_path: "…"')
        return directory / re.split(r"[/\\]", match[1])[-1]
    prefixes = sorted(path.with_suffix("") for path in directory.glob("*.index"))
    prefixes = prefixes or sorted(path for path in directory.iterdir() if is_v1(path))
    if len(prefixes) > 1:
        names = ", ".join(path.name for path in prefixes)
        raise ValueError(
            f"{directory} holds several checkpoints ({names}) and no `checkpoint` file that names one: load one by its "
            f"name, {prefixes[-1]}"
        )
    return prefixes[0] if prefixes else directory / "model.ckpt"


def prefix_of(path: Path) -> Path | None:
    """Return the prefix of the checkpoint that a path names: the prefix, or one of its files. None if there is none."""
    stem = re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", path.name)
    prefix = path.with_name(stem) if stem else path
    return prefix if prefix.with_name(f"{prefix.name}.index").is_file() or is_v1(prefix) else None


def is_v1(path: Path) -> bool:
    """Say whether a file is a checkpoint of TensorFlow's version V1, which is one file without an index."""
    if not path.is_file() or path.stat().st_size < 48:
        return False
    with path.open("rb") as file:
        if file.read(2) != b"\0\0":  # the first key of its table is empty
            return False
        file.seek(-len(V1_END), 2)
        return file.read() == V1_END


def data_files(path: Path) -> list[Path]:
    """Return the files with the variables of the checkpoint that a path names."""
    prefix = find_checkpoint(path)
    if is_v1(prefix):
        return [prefix]
    return sorted(prefix.parent.glob(glob.escape(prefix.name) + DATA_SUFFIX))


def _variables(flat: Mapping[str, Any]) -> dict[str, SimpleNamespace]:
    """Return the variables of a flat tree. A dense layer's `w` becomes a convolution of width 1, (1, in, out)."""

    def shape(name: str, leaf: Any) -> tuple[int, ...]:
        return (1, *leaf.shape) if name.endswith("/w") else leaf.shape

    return {PREFIX + name: SimpleNamespace(shape=shape(name, leaf), dtype=leaf.dtype) for name, leaf in flat.items()}


def import_tensorflow() -> ModuleType:
    """Import TensorFlow without its banner and with the accelerators hidden, if it is not imported yet."""
    if "tensorflow" in sys.modules:
        return sys.modules["tensorflow"]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # not needed here, and it prints a message to stderr
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    return tf
