"""The weights of a training run's checkpoint, with LoRA's matrices merged in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gpt2_jax.checkpoints import orbax_arrays, parts, runs
from gpt2_jax.checkpoints.bases import Open
from gpt2_jax.checkpoints.change import Change
from gpt2_jax.checkpoints.integrity import Leaves
from gpt2_jax.checkpoints.runs import LORA, PARAMS, TRAINER
from gpt2_jax.config import GPT2Config
from gpt2_jax.lora import pairs_of
from gpt2_jax.model import abstract_params
from gpt2_jax.params import differences, flatten
from gpt2_jax.recipe import Lora

AVERAGE = "average/"  # what the names of a moving average begin with, in the part of the trainer


def read_config(directory: Path) -> GPT2Config:
    """Read the config of a checkpoint or a run, the same that `read` returns.

    Raises:
      FileNotFoundError, ValueError: as in `runs.read_fields`.
      DamagedError: checkpoint.json is missing, or not what was written.
    """
    run_dir = runs.run_of(directory)
    config = runs.config_of(runs.read_fields(run_dir), run_dir / runs.RUN)
    config = config.replace(compute_dtype="float32")  # each run chooses its own
    if not runs.is_checkpoint(directory):
        return config
    return config.replace(param_dtype=_dtype(parts.read_manifest(directory)))


def read(directory: Path, open_model: Open) -> tuple[GPT2Config, Leaves]:
    """Read the params of a run's checkpoint onto the host, with LoRA merged. The optimizer's state is not read.

    Args:
      directory: the checkpoint.
      open_model: opens the model that LoRA was trained on, if it is not in the run's folder.

    Returns:
      config, leaves. Each leaf is read when it is requested, or a little earlier, and has its dtype in the run.

    Raises:
      FileNotFoundError: the checkpoint is not in a run's folder, whose run.json holds the config; or the model that
        LoRA was trained on is gone.
      ValueError: run.json is malformed, or describes another model.
      DamagedError: a file of the checkpoint is missing, or not what was written; or the model that LoRA was trained on
        has changed.
    """
    config = read_config(directory)
    change = read_change(directory)
    if wrong := differences(change.shapes, flatten(abstract_params(config)), dtypes=False):
        raise ValueError(f"{directory} does not match the model in {runs.run_of(directory) / runs.RUN}: {wrong[0]}")
    return config, change.merged(open_model)


def read_change(directory: Path) -> Change:
    """Read what a run's checkpoint holds, apart from the optimizer's state. Errors: see `read`.

    If the run keeps a moving average of what it trains, the average is read.
    """
    run_dir = runs.run_of(directory)
    fields = runs.read_fields(run_dir)
    manifest = parts.read_manifest(directory)
    abstract = {part: parts.abstract_part(manifest, part) for part in (PARAMS, LORA, TRAINER)}
    lora = fields["recipe"].get("lora", {})
    averaged = any(name.startswith(AVERAGE) for name in abstract[TRAINER])
    parts.check_files(directory, manifest, (PARAMS, LORA, TRAINER) if averaged else (PARAMS, LORA))
    directory = directory.resolve()

    def read_one(name: str, part: str = PARAMS) -> np.ndarray:
        if AVERAGE + name in abstract[TRAINER]:  # the moving average, if the run keeps one
            part, name = TRAINER, AVERAGE + name
        leaf = abstract[part][name]
        return orbax_arrays.read(directory / part, name.replace("/", "."), leaf.dtype, leaf.shape)

    return Change(
        pairs=pairs_of({name: read_one(name, LORA) for name in abstract[LORA]}),
        alpha=lora.get("alpha", Lora().alpha),
        dropout=lora.get("dropout", 0.0),
        own=abstract[PARAMS],
        read_own=read_one,
        base=manifest.get("base"),
        run_dir=run_dir,
    )


def _dtype(manifest: Mapping[str, Any]) -> np.dtype:
    """Return the dtype of the loaded params: the stored one, but float32 for the float64 of exact training."""
    leaves = [*manifest["leaves"][PARAMS].values(), *manifest["leaves"].get(LORA, {}).values()]
    stored = jnp.dtype(leaves[0][0])
    return jnp.dtype("float32") if stored.name == "float64" else stored
