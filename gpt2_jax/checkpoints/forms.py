"""The forms in which weights come: who writes each, and the files by which it is recognized."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

FormName = Literal["tensorflow", "huggingface", "flax", "llmc", "orbax", "orbax_tree", "checkpoint", "peft"]


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of weights.

    Attributes:
      title: its name in messages.
      writers: who writes it.
      files: its files, for messages.
      patterns: the files of its weights, as glob patterns. A folder with one of them has this form.
      rank: where a folder has several forms, the lowest rank is read. Two of the lowest rank are refused.
    """

    title: str
    writers: str
    files: str
    patterns: tuple[str, ...] = ()
    rank: int = 0


FORMS: dict[FormName, Form] = {
    "tensorflow": Form(
        "OpenAI's layout",
        "OpenAI, gpt-2-simple, nshepperd's fork, `save`",
        "hparams.json, checkpoint, model.ckpt.index, model.ckpt.data-00000-of-00001",
        ("*.data-*-of-*",),
    ),
    "huggingface": Form(
        "Hugging Face's format",
        "transformers, `save`; safetensors with the names of nanoGPT, Flax or the build-an-LLM book",
        "config.json, model.safetensors (or model.safetensors.index.json and its files)",
        ("model.safetensors", "model.safetensors.index.json"),
    ),
    "orbax": Form("Orbax, written by gpt2_jax.save", "`save`", "gpt2_jax.json, params", ("gpt2_jax.json",)),
    "checkpoint": Form("a training run of gpt2_jax", "`gpt2-train`", "run.json, and best or checkpoints"),
    "flax": Form(
        "Flax",
        "FlaxGPT2LMHeadModel of transformers 4",
        "config.json, flax_model.msgpack",
        ("flax_model.msgpack", "flax_model.msgpack.index.json"),
        rank=1,
    ),
    "llmc": Form("llm.c", "llm.c", "gpt2_124M.bin (one file with config and weights)", rank=1),
    "orbax_tree": Form(
        "Orbax, written by other programs",
        "Orbax's checkpointers and CheckpointManager",
        "config.json or hparams.json, and a folder that Orbax wrote",
        rank=1,
    ),
    "peft": Form(
        "an adapter of PEFT",
        "PEFT's LoRA, `save_adapter`",
        "adapter_config.json, which names the base model, and adapter_model.safetensors",
    ),
}
assert FORMS.keys() == set(get_args(FormName))

UNDERSTOOD = "supported formats:" + "".join(f"\n  {form.title}: {form.files}" for form in FORMS.values())
