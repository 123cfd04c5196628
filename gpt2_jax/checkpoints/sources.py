"""Sources of models: a directory, a released size, or an id on the Hugging Face hub."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Literal

from gpt2_jax.checkpoints import hub, runs
from gpt2_jax.config import SIZES
from gpt2_jax.files import expanded
from gpt2_jax.release import download
from gpt2_jax.tokenizer import OPENAI_FILES

Form = Literal["tensorflow", "huggingface", "orbax", "checkpoint"]
Part = Literal["model", "tokenizer"]

EMBEDDED = "shakespeare"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CONFIGS: dict[str, Form] = {"hparams.json": "tensorflow", "config.json": "huggingface"}
WEIGHTS: dict[str, Form] = {
    "*.data-*-of-*": "tensorflow",
    "model.safetensors": "huggingface",
    "model.safetensors.index.json": "huggingface",
    "gpt2_jax.json": "orbax",
}
UNDERSTOOD = """supported formats:
  OpenAI's layout: hparams.json, checkpoint, model.ckpt.index, model.ckpt.data-00000-of-00001
  Hugging Face's format: config.json, model.safetensors (or model.safetensors.index.json and its files)
  Orbax, written by gpt2_jax.save: gpt2_jax.json, params
  a training run of gpt2_jax: run.json, and best or checkpoints"""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def locate(source: str | os.PathLike, part: Part = "model") -> Path:
    """Return the directory of a source. For a size or a hub id, the files that `part` needs are fetched first.

    Args:
      source: a directory; a size ("124M", also "117M", "gpt2", "gpt2-xl", ...); a hub id ("distilbert/distilgpt2"); or
        "shakespeare", the model in this package. A local folder with that name takes precedence (for a size, only if
        it holds a model). The model of a training run's folder is RUN/best, or the newest checkpoint if RUN/best does
        not exist.
      part: "model" for all files, "tokenizer" for the files that the tokenizer needs.

    Raises:
      FileNotFoundError: there is no such source.
      ValueError: the source is not a path or a name.
      OSError: the files cannot be fetched.
    """
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"a model must be named by a path, a size or a hub id, not {source!r}")
    if size := size_meant(source):
        return download.fetch(size, files=_PARTS[part])
    directory = expanded(source)
    if directory.is_dir():
        return runs.model_folder(directory) if part == "model" and runs.is_run(directory) else directory
    if directory.exists():
        raise FileNotFoundError(f"{directory} is a file: name the directory that holds the model")
    name = os.fspath(source)
    if name == EMBEDDED:
        return embedded_model()
    if HUB_ID.fullmatch(name):
        return hub.fetch(name, tokenizer_only=part == "tokenizer")
    raise FileNotFoundError(
        f"no such model: {name!r} is not a directory, a released size ({', '.join(SIZES)}), {EMBEDDED!r} "
        "or an id on the Hugging Face hub (owner/name)"
    )


def size_meant(source: object) -> str | None:
    """Return the released size that a source names. Return None if it names none, or if it is a folder with a model."""
    if not isinstance(source, str | os.PathLike):
        return None
    size = download.size_of(os.fspath(source))
    return None if size and Path(source).is_dir() and _holds_model(Path(source)) else size


_PARTS = {"model": download.FILES, "tokenizer": ("hparams.json", *OPENAI_FILES)}


def form_of(directory: Path) -> Form:
    """Return the format of the model in a directory, recognized by its files.

    Raises:
      FileNotFoundError: the directory holds no model. The message lists its files and the supported formats.
      ValueError: the directory holds several models, or only pickled weights.
    """
    if runs.is_checkpoint(directory):
        return "checkpoint"
    for patterns in (WEIGHTS, CONFIGS):
        forms: dict[Form, str] = {form: pattern for pattern, form in patterns.items() if any(directory.glob(pattern))}
        if len(forms) > 1:
            raise ValueError(
                f"{directory} holds several models ({', '.join(forms.values())}): keep each in its own folder"
            )
        if forms and not (patterns is CONFIGS and _pickles(directory)):
            return next(iter(forms))
    found = sorted(path.name for path in directory.iterdir())
    if pickles := _pickles(directory):
        raise ValueError(
            f"{directory} holds {', '.join(pickles)}; pickled weights are not read, because opening them can run code; "
            f"convert them to model.safetensors with: {_conversion(directory, pickles[0])}"
        )
    listed = ", ".join(found[:20]) + (f" and {len(found) - 20} more" if len(found) > 20 else "")
    raise FileNotFoundError(f"{directory} holds no model; found: {listed or 'nothing'}; {UNDERSTOOD}")


def _conversion(directory: Path, pickle: str) -> str:
    """Return the shell command that converts pickled weights to safetensors."""
    if (directory / "config.json").is_file():
        read = f"d = {str(directory)!r}; M.from_pretrained(d).save_pretrained(d)"
        return f"python -c {shlex.quote(f'from transformers import GPT2LMHeadModel as M; {read}')}"
    tensors = f"{{k: v.clone() for k, v in torch.load({str(directory / pickle)!r}, weights_only=True).items()}}"
    code = f"import torch, safetensors.torch as s; s.save_file({tensors}, {str(directory / 'model.safetensors')!r})"
    return f"python -c {shlex.quote(code)} (and put the model's config.json there too)"


def _pickles(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)


def _holds_model(directory: Path) -> bool:
    ours = runs.is_run(directory) or runs.is_checkpoint(directory)
    return ours or any(any(directory.glob(pattern)) for pattern in (*WEIGHTS, *CONFIGS))


def embedded_model() -> Path:
    """Return the directory of the model in this package: 3.55 M parameters, trained on Shakespeare's plays."""
    package = Path(__file__).resolve().parents[1]
    packed, checkout = package / "models" / "shakespeare", package.parent / "models" / "shakespeare"
    return packed if packed.is_dir() else checkout
