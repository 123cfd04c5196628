"""A training run's folder: what is in it, and run.json, which says what is trained and how.

RUN/run.json              the config, the recipe and what the data were
RUN/encoder.json, RUN/vocab.bpe
RUN/data/                 the text as tokens, where the run prepared it
RUN/checkpoints/1600/     of `parts`: params, lora (if that is trained) and trainer
RUN/best/                 a model as `save` writes it

The weights in it are read by `run_weights`, and written by `save` and `gpt2_jax.training`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt2_jax.checkpoints import parts
from gpt2_jax.config import GPT2Config
from gpt2_jax.files import check_replaceable, expanded, read_json, replacing_file
from gpt2_jax.recipe import Recipe, from_dict, to_dict
from gpt2_jax.tokenizer import OPENAI_FILES, Tokenizer, fingerprint

RUN, CHECKPOINTS, BEST, DATA = "run.json", "checkpoints", "best", "data"
PARAMS, LORA, TRAINER = "params", "lora", "trainer"
MARK, VERSION = "gpt2_jax_run", 1

# What may be changed when a run is resumed: it decides what is still to come, what is watched, or how the same numbers
# are computed (on other devices, or in other parts, the same but for rounding). `data.path` may: the data's hash is
# compared.
FREE = re.compile(
    r"recipe\.(steps|accumulate|remat|mesh\..*|monitor\.(?!evaluate_windows).*|data\.(path|field))|config\.compute_dtype|data\.(name|path)"
)


@dataclasses.dataclass(frozen=True)
class Run:
    """What run.json says.

    Attributes:
      config: the model's.
      recipe: how it is trained.
      data: what it is trained on: whatever `write_run` was given, of the values that JSON has.
      tokenizer: sha256 of its tokenizer, None if there is none.
    """

    config: GPT2Config
    recipe: Recipe
    data: dict[str, Any]
    tokenizer: str | None


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


def read_run(run_dir: str | os.PathLike) -> Run:
    """Read a run's run.json.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is malformed, or of another version of this package.
    """
    directory = expanded(run_dir)
    told = read_fields(directory)
    try:
        recipe = from_dict(Recipe, told["recipe"])
    except ValueError as error:
        raise ValueError(f"{directory / RUN} holds no recipe: {error}") from error
    config = config_of(told, directory / RUN)
    return Run(config, recipe, told.get("data") or {}, told.get("tokenizer"))


def read_fields(run_dir: Path) -> dict[str, Any]:
    """Read run.json as it stands: {"gpt2_jax_run", "config", "recipe", "data", "tokenizer"}.

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
    """Return the config in what `read_fields` gave."""
    try:
        return GPT2Config(**told["config"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source} holds no config: {error}") from error


def write_run(
    run_dir: str | os.PathLike,
    config: GPT2Config,
    recipe: Recipe,
    data: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
) -> bool:
    """Begin a run, or resume the one that is there (True): write run.json and the vocabulary, and remove nothing.

    Args:
      run_dir: a folder that is not there, is empty (but for `data`, text that was prepared there), or is a run's.
      config: of the model.
      recipe: how it is trained.
      data: what it is trained on, with a hash; "name" and "path" in it may be others when the run is resumed.
      tokenizer: None trains without one.

    Raises:
      FileExistsError: the folder holds something else.
      ValueError: the run there was begun otherwise; the message lists what differs.
      OSError: it cannot be written.
    """
    directory = expanded(run_dir)
    run = Run(config, recipe, json.loads(json.dumps(dict(data))), tokenizer and fingerprint(tokenizer))
    check_free(directory)
    resumed = is_run(directory)
    if resumed:
        check_resumable(directory, read_run(directory), run)
    directory.mkdir(parents=True, exist_ok=True)
    with replacing_file(directory / RUN) as temporary:
        temporary.write_text(json.dumps(_to_json(run), indent=1) + "\n", encoding="utf-8")
    vocabulary = [directory / name for name in OPENAI_FILES]
    if tokenizer and not all(path.is_file() for path in vocabulary):
        with replacing_file(vocabulary[0]) as encoder, replacing_file(vocabulary[1]) as merges:
            tokenizer.to_files(encoder, merges)
    return resumed


def check_resumable(run_dir: Path, old: Run, new: Run) -> None:
    """Check that a run, gone on with as `new` says, is the run that it was.

    Raises:
      ValueError: it is not; the message lists the fields that decide what was computed so far and differ.
    """
    before, now = dict(_fields(_to_json(old))), dict(_fields(_to_json(new)))
    names = [name for name in before | now if before.get(name) != now.get(name) and not FREE.fullmatch(name)]
    if names:
        listed = ", ".join(f"{name} was {_shown(before.get(name))} and is {_shown(now.get(name))}" for name in names)
        raise ValueError(
            f"{run_dir} holds a run that was begun otherwise: {listed}; set it as it was, or choose another folder "
            "(a new run may start from this one: model.source)"
        )


def check_free(directory: Path) -> None:
    """Check that a run may be begun in a folder, or gone on with.

    Raises:
      FileExistsError: it holds something else.
    """
    # The second is what a run leaves that was killed as it began, or while it prepared its text.
    begun = re.compile(rf"{DATA}|\.({DATA}|{re.escape(RUN)})\.[0-9a-f]{{32}}")
    if not is_run(directory):
        check_replaceable(directory, "a run", lambda names: {name for name in names if not begun.fullmatch(name)})


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


def _to_json(run: Run) -> dict[str, Any]:
    config = {field.name: getattr(run.config, field.name) for field in dataclasses.fields(run.config)}
    dtypes = {name: config[name].name for name in ("param_dtype", "compute_dtype")}
    told = {"config": config | dtypes, "recipe": to_dict(run.recipe), "data": run.data, "tokenizer": run.tokenizer}
    return {MARK: VERSION} | told


def _fields(told: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("recipe.optimizer.name", "adamw"), ... of nested dicts."""
    if not isinstance(told, dict):
        yield name, told
        return
    for key, value in told.items():
        yield from _fields(value, f"{name}.{key}" if name else key)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_step(path: Path) -> bool:
    return re.fullmatch(r"0|[1-9][0-9]*", path.name) is not None and path.is_dir()
