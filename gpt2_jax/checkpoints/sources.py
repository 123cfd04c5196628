"""Sources of models: a directory or a file, a released size, or an id on the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from pathlib import Path
from typing import Literal

from gpt2_jax.checkpoints import foreign_orbax, hub, llmc, peft, pickles, runs, tensorflow
from gpt2_jax.checkpoints.forms import FORMS, UNDERSTOOD, FormName
from gpt2_jax.config import SIZES
from gpt2_jax.files import expanded
from gpt2_jax.release import download
from gpt2_jax.tokenizer import OPENAI_FILES

Part = Literal["model", "tokenizer"]

EMBEDDED = "shakespeare"
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
CONFIGS: dict[str, FormName] = {"hparams.json": "tensorflow", "config.json": "huggingface"}


@dataclasses.dataclass(frozen=True)
class Found:
    """A model on this machine.

    Attributes:
      form: its form.
      path: what the form's reader opens: a directory, a file, or the prefix of a TensorFlow checkpoint.
    """

    form: FormName
    path: Path


def locate(source: str | os.PathLike, part: Part = "model") -> Path:
    """Return the path of a source. For a size or a hub id, the files that `part` needs are fetched first.

    Args:
      source: a directory; a model file of llm.c; a TensorFlow checkpoint by its name ("run1/model-1000"); a size
        ("124M", also "117M", "gpt2", "gpt2-xl", ...); a hub id ("distilbert/distilgpt2", "owner/name@revision"); or
        "shakespeare", the model in this package. A local folder with that name takes precedence (for a size, only if
        it holds a model). The model of a training run's folder is RUN/best, or the newest checkpoint if RUN/best does
        not exist.
      part: "model" for all files, "tokenizer" for the files that the tokenizer needs. The path is then a directory.

    Raises:
      FileNotFoundError: there is no such source.
      ValueError: the source is not a path or a name, or is a file that cannot be read.
      OSError: the files cannot be fetched.
    """
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"a model must be named by a path, a size or a hub id, not {source!r}")
    if size := size_meant(source):
        return download.fetch(size, files=_PARTS[part])
    path = expanded(source)
    if path.is_dir():
        return runs.model_folder(path) if part == "model" and runs.is_run(path) else path
    if (file := _file(path)) is not None:
        return file if part == "model" else file.absolute().parent
    name = os.fspath(source)
    if name == EMBEDDED:
        return embedded_model()
    if match := HUB_ID.fullmatch(name):
        return hub.fetch(match[1], tokenizer_only=part == "tokenizer", revision=match[2])
    raise FileNotFoundError(
        f"no such model: {name!r} is not a directory, a released size ({', '.join(SIZES)}), {EMBEDDED!r} "
        f"or an id on the Hugging Face hub (owner/name){_hint(name)}"
    )


def _file(path: Path) -> Path | None:
    """Return the model file or the prefix that a path names. None if there is nothing.

    Raises:
      ValueError, FileNotFoundError: the file holds pickles, or is only a part of a model.
    """
    prefix = tensorflow.prefix_of(path)
    if prefix is not None or llmc.is_model(path):
        return prefix or path
    if not path.exists():
        return None
    if pickles.is_pickle(path):
        raise ValueError(pickles.refusal(path))
    if llmc.is_of_llmc(path):
        raise ValueError(f"{path} is a file of llm.c, but not a model: name its model file")
    raise FileNotFoundError(f"{path} is a file: name the directory that holds the model")


def _hint(name: str) -> str:
    """Return "; did you mean ..." for a name that lacks the owner on the hub. Without a guess, return ""."""
    if name in hub.OWNERS:
        return f"; did you mean {hub.OWNERS[name]}/{name}?"
    near = difflib.get_close_matches(name, hub.OWNERS, n=1, cutoff=0.85)
    return f"; did you mean {hub.OWNERS[near[0]]}/{near[0]}?" if near else ""


def size_meant(source: object) -> str | None:
    """Return the released size that a source names. Return None if it names none, or if it is a folder with a model."""
    if not isinstance(source, str | os.PathLike):
        return None
    size = download.size_of(os.fspath(source))
    return None if size and Path(source).is_dir() and _holds_model(Path(source)) else size


_PARTS = {"model": download.FILES, "tokenizer": ("hparams.json", *OPENAI_FILES)}


def form_of(path: Path) -> FormName:
    """Return the form of the model at a path that `locate` returned, as `find` does."""
    return find(path).form


def folder_of(path: Path) -> Path:
    """Return the folder of a path that `locate` returned: the path, or the folder of the file."""
    return path if path.is_dir() else path.absolute().parent


def find(path: Path) -> Found:
    """Find the model at a path that `locate` returned. Its form is recognized by its files.

    Raises:
      FileNotFoundError: the directory holds no model. The message lists its files and the supported formats.
      ValueError: the directory holds several models, or only weights that are not read.
    """
    if not path.is_dir():
        return Found("llmc" if llmc.is_model(path) else "tensorflow", path)
    if runs.is_checkpoint(path):
        return Found("checkpoint", path)
    weights = _weights(path, rank=0) or _other_weights(path)
    if len(weights) > 1:
        listed = ", ".join(weights)
        raise ValueError(f"{path} holds several models ({listed}): keep each in its own folder{_or_name(weights)}")
    if weights:
        return next(iter(weights.values()))
    if peft.is_adapter(path):
        return Found("peft", path)
    if found := pickles.found_in(path):
        raise ValueError(pickles.refusal(path / found[0]))
    if advice := pickles.other_weights(path):
        raise ValueError(advice)
    configs: list[FormName] = [form for name, form in CONFIGS.items() if (path / name).is_file()]
    if len(configs) == 1:
        return Found(configs[0], path)  # its reader names the file that is missing
    names = sorted(entry.name for entry in path.iterdir())
    listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    raise FileNotFoundError(f"{path} holds no model; found: {listed or 'nothing'}; {UNDERSTOOD}")


def _weights(directory: Path, rank: int) -> dict[str, Found]:
    """Return the models of a rank that file names identify, by the pattern of the files."""
    found: dict[str, Found] = {}
    for name, form in FORMS.items():
        pattern = next((p for p in form.patterns if form.rank == rank and any(directory.glob(p))), None)
        if pattern is not None:
            found[pattern] = Found(name, directory)
    return found


def _other_weights(directory: Path) -> dict[str, Found]:
    """Return the models of rank 1, by file name. Some are recognized only by a file's content."""
    found = _weights(directory, rank=1)
    found |= {file.name: Found("llmc", file) for file in sorted(directory.glob("*.bin")) if llmc.is_model(file)}
    if any((directory / name).is_file() for name in CONFIGS) and foreign_orbax.find(directory) is not None:
        found["a folder of Orbax"] = Found("orbax_tree", directory)
    return found


def _or_name(weights: dict[str, Found]) -> str:
    return ", or load one file by its path" if all(found.form == "llmc" for found in weights.values()) else ""


def _holds_model(directory: Path) -> bool:
    ours = runs.is_run(directory) or runs.is_checkpoint(directory)
    configs = any((directory / name).is_file() for name in CONFIGS)
    return (
        ours or configs or peft.is_adapter(directory) or bool(_weights(directory, rank=0) or _other_weights(directory))
    )


def embedded_model() -> Path:
    """Return the directory of the model in this package: 3.55 M parameters, trained on Shakespeare's plays."""
    package = Path(__file__).resolve().parents[1]
    packed, checkout = package / "models" / "shakespeare", package.parent / "models" / "shakespeare"
    return packed if packed.is_dir() else checkout
