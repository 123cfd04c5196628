"""Where each command starts: the handlers of Ctrl-C and SIGTERM are installed before anything large is imported.

The installed commands and scripts/*.py call these functions. `main` of a command's own module does the same work
without handlers, for callers in Python.
"""

from __future__ import annotations

import importlib

from gpt2_jax.commands import _interrupts, _streams

MAINS = {
    "activations": "activations.main",
    "classify": "classify.main",
    "convert": "convert.main",
    "doctor": "doctor.main",
    "download": "download.main",
    "evaluate": "evaluate.main",
    "finetune": "train.finetune",
    "generate": "generate.main",
    "inspect": "inspect.main",
    "prepare": "prepare.main",
    "train": "train.main",
    "train_tokenizer": "train_tokenizer.main",
}
"""{function of this module: "module.function" that it runs}."""


def _run(name: str) -> None:
    """Run a command in this process. After a signal, the process ends with status 128 + its number."""
    try:
        try:
            _interrupts.install()
            _streams.prepare()
            from gpt2_jax.commands import _processes  # imports more than the two above

            _processes.prepare()
            module, function = MAINS[name].split(".")
            getattr(importlib.import_module(f"gpt2_jax.commands.{module}"), function)()
        finally:
            _interrupts.remove()
    except BaseException:
        if (number := _interrupts.received()) is not None:
            _interrupts.leave(128 + number)
        raise


def activations() -> None:
    """Run `gpt2-activations`."""
    _run("activations")


def convert() -> None:
    """Run `gpt2-convert`."""
    _run("convert")


def classify() -> None:
    """Run `gpt2-classify`."""
    _run("classify")


def doctor() -> None:
    """Run `gpt2-doctor`."""
    _run("doctor")


def download() -> None:
    """Run `gpt2-download`."""
    _run("download")


def evaluate() -> None:
    """Run `gpt2-evaluate`."""
    _run("evaluate")


def finetune() -> None:
    """Run `gpt2-finetune`, the older name of `gpt2-train`."""
    _run("finetune")


def generate() -> None:
    """Run `gpt2-generate`."""
    _run("generate")


def inspect() -> None:
    """Run `gpt2-inspect`."""
    _run("inspect")


def prepare() -> None:
    """Run `gpt2-prepare`."""
    _run("prepare")


def train() -> None:
    """Run `gpt2-train`."""
    _run("train")


def train_tokenizer() -> None:
    """Run `gpt2-train-tokenizer`."""
    _run("train_tokenizer")
