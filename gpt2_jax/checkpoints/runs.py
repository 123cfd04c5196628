"""A training run's folder, and run.json, which describes what is trained and how.

RUN/run.json              the config, the recipe and a description of the data
RUN/encoder.json, RUN/vocab.bpe, or Hugging Face's tokenizer files
RUN/data/                 the text as tokens, if the run prepared it
RUN/data-NAME/            a validation text of one's own as tokens, likewise
RUN/checkpoints/1600/     written by `parts`: params and trainer; with LoRA lora, trainer and the trained params
RUN/base/                 with LoRA, the model before it, written by `bases`, unless it is that of model.source
RUN/best/                 a model written by `save`, or with LoRA by `save_change`

`run_weights` reads the weights. `save` and `gpt2_jax.training` write them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from gpt2_jax.checkpoints import parts
from gpt2_jax.checkpoints.vocabulary_files import own_files
from gpt2_jax.config import GPT2Config
from gpt2_jax.files import check_replaceable, expanded, lock, read_json, replacing_file
from gpt2_jax.recipe import Optimizer, Recipe, from_dict, to_dict
from gpt2_jax.tokenizer import HUGGING_FACE_FILES, OPENAI_FILES, TOKENIZER_CONFIG, Tokenizer, fingerprint

RUN, CHECKPOINTS, BASE, BEST, DATA = "run.json", "checkpoints", "base", "best", "data"
RATES = "learning_rate.png"  # of a learning rate range test, before the run
LOCK = ".lock"  # in the folder of checkpoints
PARAMS, LORA, TRAINER = "params", "lora", "trainer"
MARK, VERSION = "gpt2_jax_run", 1
MOST_READS = 50  # a model is read so often, if it is replaced during each of them
T = TypeVar("T")

# The settings that may change when a run is resumed. They affect the steps still to come, the monitoring, or how the
# same numbers are computed (on other devices or in other parts, equal up to rounding). `data.path` may change, because
# the hash of the data is compared.
EARLIER_DECAY = [[r"(^|/)(w|wte|wpe)$", 1.0], [".*", 0.0]]  # the default before a head could have weights of its own
# Fields of a recipe that earlier versions do not know: they are written only if they are set.
LATER = ("attention", "objective", "classification", "instruction", "optimizer.ema", "epochs")
LATER += ("monitor.keep", "monitor.wandb", "lora.dropout", "lora.ranks", "lora.full")
LATER += ("data.test_fraction", "data.label_field", "data.pack", "data.add_tokens", "data.encoding")
LATER += ("data.end_of_text", "data.skip_bad_rows", "data.val_path", "data.validation")
FREE = re.compile(
    r"recipe\.(steps|epochs|accumulate|remat|attention|mesh\..*|monitor\.(?!evaluate_windows).*|data\.(path|field|val_path|validation))|config\.compute_dtype|data\.(name|path)"
)


@dataclasses.dataclass(frozen=True)
class Run:
    """The contents of run.json.

    Attributes:
      config: the model's config.
      recipe: how the model is trained.
      data: what the model is trained on: the `data` passed to `write_run`, as JSON values.
      tokenizer: the sha256 of the tokenizer, None if there is no tokenizer.
    """

    config: GPT2Config
    recipe: Recipe
    data: dict[str, Any]
    tokenizer: str | None


def is_run(directory: Path) -> bool:
    """Return whether a directory is a training run's folder. Other programs write files named run.json too."""
    path = directory / RUN
    return path.is_file() and f'"{MARK}"' in path.read_text(encoding="utf-8", errors="replace")


def is_checkpoint(directory: Path) -> bool:
    """Return whether a directory is a checkpoint of a run, complete or incomplete."""
    directory = directory.resolve()
    return (directory / parts.MANIFEST).is_file() or (
        directory.parent.name == CHECKPOINTS and _is_step(directory) and is_run(directory.parents[1])
    )


def read_run(run_dir: str | os.PathLike) -> Run:
    """Read a run's run.json.

    Raises:
      FileNotFoundError: the folder has no run.json of this package.
      ValueError: run.json is malformed, or its format version is not supported.
    """
    directory = expanded(run_dir)
    fields = read_fields(directory)
    try:
        recipe = from_dict(Recipe, fields["recipe"])
    except ValueError as error:
        raise ValueError(f"{directory / RUN} holds no valid recipe: {error}") from error
    config = config_of(fields, directory / RUN)
    return Run(config, recipe, fields.get("data") or {}, fields.get("tokenizer"))


def read_fields(run_dir: Path) -> dict[str, Any]:
    """Read run.json as a dict: `{"gpt2_jax_run", "config", "recipe", "data", "tokenizer"}`.

    Raises:
      FileNotFoundError: the folder has no run.json of this package.
      ValueError: run.json is malformed, or its format version is not supported.
    """
    path = run_dir / RUN
    if not is_run(run_dir):
        raise FileNotFoundError(f"{run_dir} is not a training run's folder: it holds no {RUN} of this package")
    fields = read_json(path)
    if not isinstance(fields, dict) or not all(isinstance(fields.get(name), dict) for name in ("config", "recipe")):
        raise ValueError(f"{path} is malformed: it must hold a config and a recipe")
    if fields.get(MARK) != VERSION:
        raise ValueError(f"{path} has format version {fields.get(MARK)!r}, but only version {VERSION} can be read")
    return fields


def config_of(fields: Mapping[str, Any], source: object) -> GPT2Config:
    """Return the config from the dict that `read_fields` returned."""
    try:
        return GPT2Config(**fields["config"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source} holds no valid config: {error}") from error


def write_run(
    run_dir: str | os.PathLike,
    config: GPT2Config,
    recipe: Recipe,
    data: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
    anew: bool = False,
) -> bool:
    """Start a run, or resume an existing one: write run.json and the vocabulary, and remove nothing.

    Args:
      run_dir: a folder that does not exist, is empty except for prepared text in `data`, or holds a run.
      config: the model's config.
      recipe: how the model is trained.
      data: what the model is trained on, with a hash. "name" and "path" in it may change when the run is resumed.
      tokenizer: the tokenizer, or None to train without one.
      anew: an existing run in the folder took no step: its settings and its vocabulary are replaced.

    Returns:
      True if an existing run is resumed.

    Raises:
      FileExistsError: the folder holds something else.
      ValueError: the existing run has other settings. The message lists them.
      OSError: a file cannot be written.
    """
    directory = expanded(run_dir)
    run = Run(config, recipe, json.loads(json.dumps(dict(data))), tokenizer and fingerprint(tokenizer))
    check_free(directory)
    resumed = is_run(directory) and not anew
    if resumed:
        check_resumable(directory, read_run(directory), run)
    directory.mkdir(parents=True, exist_ok=True)
    if anew and is_run(directory):
        for name in (*OPENAI_FILES, *HUGGING_FACE_FILES, TOKENIZER_CONFIG):
            (directory / name).unlink(missing_ok=True)
    with replacing_file(directory / RUN) as temporary:
        temporary.write_text(json.dumps(_to_json(run), indent=1) + "\n", encoding="utf-8")
    vocabulary = own_files(tokenizer) if tokenizer else {}
    for name, text in vocabulary.items():
        if not (directory / name).is_file():
            with replacing_file(directory / name) as temporary:
                temporary.write_text(text, encoding="utf-8", newline="\n")
    return resumed


def check_resumable(run_dir: Path, old: Run, new: Run) -> None:
    """Check that an old run may be resumed with the settings of a new one.

    Raises:
      ValueError: the runs differ in fields that determine what was computed so far. The message lists them.
    """
    before, now = dict(_fields(_comparable(old))), dict(_fields(_comparable(new)))
    names = [name for name in before | now if before.get(name) != now.get(name) and not FREE.fullmatch(name)]
    if old.recipe.lora.is_used and steps(run_dir):  # its checkpoints name the model by the hash of its tensors
        names = [name for name in names if name != "recipe.model.source"]
    if names:
        listed = ", ".join(f"{name} was {_shown(before.get(name))} and is {_shown(now.get(name))}" for name in names)
        raise ValueError(
            f"{run_dir} holds a run with other settings: {listed}; set the old values, or choose another folder "
            "(a new run can start from this one: set model.source to it)"
        )


def check_free(directory: Path) -> None:
    """Check that a run may be started or resumed in a folder.

    Raises:
      FileExistsError: the folder holds something else.
    """
    # The second alternative matches temporary files of a run that was killed while it started or prepared its text.
    before = rf"{DATA}(-[\w-]+)?|{re.escape(RATES)}"
    begun = re.compile(rf"{before}|\.({before}|{re.escape(RUN)})\.[0-9a-f]{{32}}")

    def others(names: set[str]) -> set[str]:
        found = {name for name in names if not begun.fullmatch(name)}
        folder = directory / CHECKPOINTS
        if folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOCK}:  # killed before run.json was written
            found.discard(CHECKPOINTS)
        return found

    if not is_run(directory):
        check_replaceable(directory, "a run", others)


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training a run, and from changing its folder, while the block runs.

    Raises:
      OSError: the folder cannot be created, or another process has the run open.
    """
    folder = run_dir / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / LOCK, OSError(f"{folder} is open in another process, which is training this run")):
        yield


@contextlib.contextmanager
def replacing_data(run_dir: Path) -> Iterator[None]:
    """Replace RUN/data in the block. No other process may be training the run: it would read a mixture.

    Raises:
      OSError: another process has the run open.
    """
    with locked(run_dir) if is_run(run_dir) else contextlib.nullcontext():
        yield


def clear_leftovers(run_dir: Path) -> None:
    """Remove what killed processes left in a run's folder, a whole model each. The caller has the lock of the run.

    Only names that are written by the process with the lock are removed.
    """
    ours = re.compile(rf"\.({BEST}|{re.escape(RUN)}|metrics\.jsonl|samples\.jsonl)\.[0-9a-f]{{32}}")
    for path in run_dir.iterdir():
        if ours.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def steps(run_dir: Path) -> list[int]:
    """Return the steps of a run's checkpoints in ascending order, damaged ones included."""
    folder = run_dir / CHECKPOINTS
    return sorted(int(path.name) for path in folder.iterdir() if _is_step(path)) if folder.is_dir() else []


def model_folder(run_dir: Path) -> Path:
    """Return the folder of a run's model: RUN/best, or the newest checkpoint if that does not exist.

    Raises:
      FileNotFoundError: the run has neither yet.
    """
    if (run_dir / BEST).is_dir():
        return run_dir / BEST
    if there := steps(run_dir):
        return run_dir / CHECKPOINTS / str(there[-1])
    raise FileNotFoundError(f"{run_dir} is a training run that has saved no model yet")


def read_steadily(source: object, read: Callable[[], T]) -> T:
    """Return read(), which reads the model of a source. Call it again if it failed because a run replaced the model.

    A run that trains replaces RUN/best, and removes old checkpoints. What is read is checked against sha256 sums, so a
    mixture of two models is an error, and not a result.
    """
    for _ in range(MOST_READS - 1):
        before = _version(source)
        try:
            return read()
        except (OSError, ValueError):
            if before is None or _version(source) == before:
                raise
    return read()


def _version(source: object) -> tuple | None:
    """Return what changes if a run replaces the model of a source. None if the source is not in the folder of a run."""
    if not isinstance(source, str | os.PathLike):
        return None
    path = expanded(source).absolute()
    if not any(is_run(folder) for folder in (path, *path.parents[:2])):
        return None
    try:
        path = model_folder(path) if is_run(path) else path
        status = path.stat()
    except FileNotFoundError:
        return ()
    return str(path), status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def run_of(directory: Path) -> Path:
    """Return the folder that holds the vocabulary: the run of a checkpoint or RUN/base, or any other folder itself."""
    if not is_checkpoint(directory):
        return directory
    directory = directory.resolve()
    return directory.parent if directory.name == BASE else directory.parents[1]


def _to_json(run: Run) -> dict[str, Any]:
    config = {field.name: getattr(run.config, field.name) for field in dataclasses.fields(run.config)}
    dtypes = {name: config[name].name for name in ("param_dtype", "compute_dtype")}
    del config["attention"]  # it is the recipe's
    if not config["labels"]:  # earlier versions do not know these fields
        del config["labels"], config["pooling"]
    recipe, defaults = to_dict(run.recipe), to_dict(Recipe())
    for name in LATER:
        *part, field = name.split(".")
        fields, default = (functools.reduce(dict.__getitem__, part, whole) for whole in (recipe, defaults))
        if fields[field] == default[field]:
            del fields[field]
    fields = {"config": config | dtypes, "recipe": recipe, "data": run.data, "tokenizer": run.tokenizer}
    return {MARK: VERSION} | fields


def _comparable(run: Run) -> dict[str, Any]:
    """Return a run as JSON values in which equal settings are equal: two decay rules mean the same for a tied head.

    The hashes of the files of a validation text are one value.
    """
    fields = _to_json(run)
    if texts := run.data.get("validation"):
        texts = {name: " ".join(digests.values()) for name, digests in texts.items()}
        fields["data"] = {**run.data, "validation": texts}
    optimizer = fields["recipe"]["optimizer"]
    if run.config.tie_word_embeddings and optimizer["decay"] == EARLIER_DECAY:
        optimizer["decay"] = to_dict(Optimizer())["decay"]
    return fields


def _fields(fields: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield pairs like ("recipe.optimizer.name", "adamw") from nested dicts."""
    if not isinstance(fields, dict):
        yield name, fields
        return
    for key, value in fields.items():
        yield from _fields(value, f"{name}.{key}" if name else key)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_step(path: Path) -> bool:
    return re.fullmatch(r"0|[1-9][0-9]*", path.name) is not None and path.is_dir()
