"""Reading a training run: its best model, or the newest checkpoint with LoRA's small matrices merged in.

RUN/run.json              the config, the recipe and what the data were; `gpt2_jax.training` writes it all
RUN/encoder.json, RUN/vocab.bpe
RUN/checkpoints/1600/     of `parts`: params, lora (if that is trained) and trainer, which is not read here
RUN/best/                 a model as `save` writes it
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gpt2_jax.checkpoints import parts
from gpt2_jax.checkpoints.integrity import Leaves
from gpt2_jax.config import GPT2Config
from gpt2_jax.lora import merge_lora
from gpt2_jax.model import abstract_params
from gpt2_jax.params import differences, flatten, unflatten
from gpt2_jax.tokenizer import read_json

RUN, CHECKPOINTS, BEST = "run.json", "checkpoints", "best"
PARAMS, LORA, TRAINER = "params", "lora", "trainer"
MARK, VERSION = "gpt2_jax_run", 1


def is_run(directory: Path) -> bool:
    """Say whether a directory is a training run's: other programs have a run.json too."""
    path = directory / RUN
    return path.is_file() and f'"{MARK}"' in path.read_text(encoding="utf-8", errors="replace")


def is_checkpoint(directory: Path) -> bool:
    """Say whether a directory is a checkpoint of a run, whole or not."""
    directory = directory.resolve()
    return (directory / parts.MANIFEST).is_file() or (
        directory.parent.name == CHECKPOINTS and _is_step(directory) and is_run(directory.parents[1])
    )


def read_run(run_dir: Path) -> dict[str, Any]:
    """Read run.json: {"gpt2_jax_run", "config", "recipe", "data", "tokenizer"}.

    Raises:
      FileNotFoundError: there is none, of this package.
      ValueError: it is malformed, or of another version.

    """
    path = run_dir / RUN
    if not is_run(run_dir):
        raise FileNotFoundError(f"{run_dir} is no folder of a training run: it holds no {RUN} that this package wrote")
    told = read_json(path)
    if not isinstance(told, dict) or not all(isinstance(told.get(name), dict) for name in ("config", "recipe")):
        raise ValueError(f"{path} is not what was written there: it must hold a config and a recipe")
    if told.get(MARK) != VERSION:
        raise ValueError(f"{path} is of version {told.get(MARK)!r} of its format, and {VERSION} is what can be read")
    return told


def config_of(told: Mapping[str, Any], source: object) -> GPT2Config:
    """Return the config in what `read_run` gave."""
    try:
        return GPT2Config(**told["config"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source} holds no config: {error}") from error


def steps(run_dir: Path) -> list[int]:
    """Return the steps of which a run has a checkpoint, in order; one that is damaged counts."""
    folder = run_dir / CHECKPOINTS
    return sorted(int(path.name) for path in folder.iterdir() if _is_step(path)) if folder.is_dir() else []


def model_folder(run_dir: Path) -> Path:
    """Return the folder of the model that a run means: RUN/best, else the newest checkpoint.

    Raises:
      FileNotFoundError: there is none yet.

    """
    if (run_dir / BEST).is_dir():
        return run_dir / BEST
    if there := steps(run_dir):
        return run_dir / CHECKPOINTS / str(there[-1])
    raise FileNotFoundError(f"{run_dir} is a training run that has saved no model yet")


def run_of(directory: Path) -> Path:
    """Return the run that a folder is a checkpoint of, and any other folder itself: where a vocabulary is."""
    return directory.resolve().parents[1] if is_checkpoint(directory) else directory


def read_config(directory: Path) -> GPT2Config:
    """Read the config of a checkpoint or a run, as `read` gives it.

    Raises:
      as `read_run`, and DamagedError.

    """
    run_dir = run_of(directory)
    config = config_of(read_run(run_dir), run_dir / RUN).replace(compute_dtype="float32")  # a choice of each run
    if not is_checkpoint(directory):
        return config
    return config.replace(param_dtype=_dtype(parts.read_manifest(directory)))


def read(directory: Path) -> tuple[GPT2Config, Leaves]:
    """Read the params of a checkpoint of a run onto the host, LoRA merged, nothing of the optimizer.

    Raises:
      FileNotFoundError: it lies in no run, whose run.json has the config.
      ValueError: run.json is malformed, or of another model.
      DamagedError: a file of the checkpoint is missing, or not what was written.

    """
    told = read_run(run_of(directory))
    config = read_config(directory)
    manifest = parts.read_manifest(directory)
    abstract = {part: parts.abstract_part(manifest, part) for part in (PARAMS, LORA)}
    if wrong := differences(abstract[PARAMS], flatten(abstract_params(config)), dtypes=False):
        raise ValueError(f"{directory} is of another model than {run_of(directory) / RUN}: {wrong[0]}")
    parts.check_files(directory, manifest, (PARAMS, LORA))
    host = {
        part: {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in abstract[part].items()} for part in abstract
    }
    found = parts.read(directory.resolve(), host)
    return config, _merged(config, found[PARAMS], found[LORA], told["recipe"])


def _merged(
    config: GPT2Config, params: dict[str, np.ndarray], lora: Mapping[str, np.ndarray], recipe: Mapping[str, Any]
) -> Leaves:
    for name in sorted(params, key=lambda name: -params[name].nbytes):
        leaf = params.pop(name)
        if f"{name}/a" in lora:
            pair = {side: lora[f"{name}/{side}"] for side in "ab"}
            leaf = flatten(merge_lora(unflatten({name: leaf}), {name: pair}, recipe["lora"]["alpha"]))[name]
        yield name, np.asarray(leaf, config.param_dtype)


def _dtype(manifest: Mapping[str, Any]) -> np.dtype:
    """Return the dtype that params are given in: what is stored, but float32 of the float64 of exact training."""
    stored = jnp.dtype(next(iter(manifest["leaves"][PARAMS].values()))[0])
    return jnp.dtype("float32") if stored.name == "float64" else stored


def _is_step(path: Path) -> bool:
    return re.fullmatch(r"0|[1-9][0-9]*", path.name) is not None and path.is_dir()
