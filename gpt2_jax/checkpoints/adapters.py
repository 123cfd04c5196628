"""Adapters: what LoRA has trained beside a base model. They are read from runs and from PEFT's folders."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np

from gpt2_jax.checkpoints import orbax, peft, run_weights, runs
from gpt2_jax.checkpoints.adapter import Adapter
from gpt2_jax.checkpoints.change import Change
from gpt2_jax.checkpoints.saving import save_with
from gpt2_jax.checkpoints.sources import find, locate
from gpt2_jax.config import GPT2Config
from gpt2_jax.lora import merge_lora
from gpt2_jax.params import flatten, unflatten
from gpt2_jax.tokenizer import Tokenizer


def load_adapter(source: str | os.PathLike) -> Adapter:
    """Load an adapter without its base model: a folder that PEFT wrote, or a run with LoRA, or one of its checkpoints.

    `load` takes the same sources, and gives the params of the base model with the adapter merged.

    Args:
      source: the folder. Of a run, the best model is taken, or the newest checkpoint if there is none.

    Raises:
      FileNotFoundError: there is no such folder, or a file of it is missing.
      ValueError: it holds no adapter, or one that cannot be read: DoRA, biases, another method than LoRA, pickles.
    """
    found = find(locate(source))
    if found.form == "peft":
        return peft.read_adapter(found.path)
    change = None
    if found.form == "checkpoint":
        change = run_weights.read_change(found.path)
    elif found.form == "orbax" and orbax.has_base(found.path):
        change = orbax.read_change(found.path)
    if change is None or not change.pairs:
        raise ValueError(f"{source} holds no adapter: name a run with LoRA, or a folder that PEFT wrote")
    return _of_change(change)


def save_adapter(
    directory: str | os.PathLike, config: GPT2Config, adapter: Adapter, tokenizer: Tokenizer | None = None
) -> None:
    """Save an adapter as PEFT does. `peft.PeftModel.from_pretrained(model, directory)` opens it, and so does `load`.

    Args:
      directory: the folder to write. It is replaced if it holds a saved model or adapter and nothing else.
      config: the config of the model with the adapter, which says whether the output head is tied.
      adapter: from `load_adapter`.
      tokenizer: written too, in Hugging Face's files. None writes none.

    Raises:
      FileExistsError: the directory holds other files.
      OSError: the directory cannot be written.
      ValueError: PEFT's files cannot hold the adapter: a pair of wte with a tied head, a part of a module, or a
        classifier that does not read the last token.
    """
    write = functools.partial(peft.write, config=config, adapter=adapter)
    save_with(directory, config, "peft", tokenizer, write)


def _of_change(change: Change) -> Adapter:
    own: dict[str, Any] = {}
    if change.base is not None:  # else all params are stored, and none but the pairs were trained
        own = {name: change.read_own(name) for name in change.own}
    new: Any = {name: change.pairs[name] for name in own if name in change.pairs}  # a new head
    own = flatten(merge_lora(unflatten(own), new, change.alpha))
    pairs = {name: pair for name, pair in change.pairs.items() if name not in new}
    return Adapter(
        pairs=pairs,
        alpha=dict.fromkeys(pairs, float(change.alpha)),
        own={name: np.asarray(leaf) for name, leaf in own.items()},
        base=_base_name(change),
        dropout=change.dropout,
    )


def _base_name(change: Change) -> str:
    """Return what `load` takes for the base model: a size in Hugging Face's word, a hub id, or an absolute path."""
    if change.base is None or change.base["source"] == "":
        return os.fspath(change.run_dir / runs.BASE) if change.run_dir and change.base else ""
    if change.base["path"]:
        return str(change.base["path"])
    source = str(change.base["source"])
    return peft.HUGGING_FACE_SIZES.get(source, source)
