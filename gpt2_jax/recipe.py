"""A recipe: all that decides how a model is trained, as a TOML file says it; checked before anything starts."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from gpt2_jax.checks import choice, real_number, whole_number

Rules = tuple[tuple[str, float], ...]
"""(regular expression, value) in order: a parameter gets the value of the first that is found in its name."""
KINDS = {int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Model:
    """What is trained.

    Attributes:
      source: what to start from, any model that `load` takes; "" starts from random weights of the shape below.
      n_ctx: longest sequence in tokens; this and the next three are read where `source` is "" alone.
      n_embd: width of the residual stream.
      n_head: attention heads a layer.
      n_layer: number of blocks.
      tokenizer: a model or folder whose vocabulary to use; "" is that of `source`.
      dropout: rate in [0, 1) after the embeddings, on the attention weights and on what a block adds.
    """

    source: str = "shakespeare"
    n_ctx: int = 1024
    n_embd: int = 768
    n_head: int = 12
    n_layer: int = 12
    tokenizer: str = ""
    dropout: float = 0.1

    def __post_init__(self):
        for name in ("n_ctx", "n_embd", "n_head", "n_layer"):
            _whole(self, name, 1)
        _real(self, "dropout", 0, 1, open_high=True)


@dataclasses.dataclass(frozen=True)
class Data:
    """What it is trained on.

    Attributes:
      path: a folder that prepare_data.py wrote; or text, which is prepared first: a .txt, .jsonl or .csv file or a
        folder of these.
      field: of each object of a .jsonl file, and the column of a .csv file, that holds the text.
      val_fraction: share of the tokens that is kept for validation, in [0, 1).
      split: which share: "documents" drawn by the seed, the "tail" of the tokens, or "auto": documents, or the tail
        where there are too few of them.
      n_tokens: tokens of one window; 0 is the model's n_ctx.
    """

    path: str = ""
    field: str = "text"
    val_fraction: float = 0.1
    split: Literal["auto", "documents", "tail"] = "auto"
    n_tokens: int = 0

    def __post_init__(self):
        _real(self, "val_fraction", 0, 1, open_high=True)
        _choice(self, "split")
        _whole(self, "n_tokens", 0)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How the weights are changed.

    Attributes:
      name: adamw, adafactor, sgd (with momentum) or lion.
      learning_rate: the peak.
      schedule: what follows the warm-up: cosine or linear down to `final_fraction` of the peak, or constant.
      warmup_steps: optimizer steps up to the peak, which the last of them has.
      final_fraction: of the peak, reached at the last step.
      betas: decay of the first and second moment (adamw, lion).
      epsilon: added to the root of the second moment (adamw).
      momentum: of sgd.
      weight_decay: a step takes learning rate times this off each weight, times its `decay` rule.
      clip: largest norm of all gradients together, to which larger ones are scaled; 0 does not clip.
      learning_rates: rules, factors of the learning rate by parameter name; 0 freezes a parameter.
      decay: rules, factors of the weight decay by parameter name.
    """

    name: Literal["adamw", "adafactor", "sgd", "lion"] = "adamw"
    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    momentum: float = 0.9
    weight_decay: float = 0.1
    clip: float = 1.0
    learning_rates: Rules = ((".*", 1.0),)
    decay: Rules = ((r"(^|/)(w|wte|wpe)$", 1.0), (".*", 0.0))

    def __post_init__(self):
        _choice(self, "name")
        _choice(self, "schedule")
        _real(self, "learning_rate", 0)
        _whole(self, "warmup_steps", 0)
        _real(self, "final_fraction", 0, 1)
        _check(len(self.betas) == 2, self, "betas", "two numbers")
        for beta in self.betas:
            real_number("each of betas", beta, 0, 1, open_high=True)
        _real(self, "epsilon", 0, open_low=True)  # 0 / 0 for what has no gradient
        _real(self, "momentum", 0, 1, open_high=True)
        _real(self, "weight_decay", 0)
        _real(self, "clip", 0)
        _rules(self, "learning_rates")
        _rules(self, "decay")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Training small matrices beside frozen weights: w + alpha / rank * a @ b, a (in, rank) and b (rank, out).

    The optimizer's rules are for their names then, h0/attn/c_attn/w/a and .../b, which by default do not decay.

    Attributes:
      rank: 0 trains the weights themselves.
      alpha: strength.
      targets: regular expression of the names of the matrices that get a pair.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: str = r"attn/(c_attn|c_proj)/w$"

    def __post_init__(self):
        _whole(self, "rank", 0)
        _real(self, "alpha", 0)
        _pattern(self, "targets", self.targets)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How many devices share the work; -1 takes all that are left.

    Attributes:
      data: over these the rows of a batch are divided, and parameters and optimizer state kept in parts.
      model: over these single matrix products are divided.
    """

    data: int = -1
    model: int = 1

    def __post_init__(self):
        for name in ("data", "model"):
            _whole(self, name, -1)
            _check(getattr(self, name) != 0, self, name, "a number of devices, or -1 for all")
        _check(not self.data == self.model == -1, self, "data", "a number where model is -1, not both -1")


@dataclasses.dataclass(frozen=True)
class Monitor:
    """What is looked at meanwhile, how often, and what it may lead to. Counts of steps; 0 is never.

    Attributes:
      evaluate_every: steps between two validation losses; the last step always has one.
      evaluate_windows: most windows of a validation loss, the first of the validation text; 0 is all.
      patience: evaluations in a row without a better loss after which training stops; 0 never stops it.
      save_every: steps between two checkpoints; the last step always has one.
      sample_every: steps between two rounds of samples.
      prompts: what the samples continue.
      sample_tokens: new tokens of a sample.
      on_nan: what to do where the loss or a gradient is not a number: "stop", or "skip" that step.
      on_spike: what to do where the loss is above `spike` times its running mean: "ignore", "skip" or "stop".
      spike: that factor.
      tensorboard: write TensorBoard's files too.
    """

    evaluate_every: int = 100
    evaluate_windows: int = 0
    patience: int = 0
    save_every: int = 500
    sample_every: int = 500
    prompts: tuple[str, ...] = ("",)
    sample_tokens: int = 64
    on_nan: Literal["stop", "skip"] = "stop"
    on_spike: Literal["ignore", "skip", "stop"] = "ignore"
    spike: float = 2.0
    tensorboard: bool = True

    def __post_init__(self):
        counts = ("evaluate_every", "evaluate_windows", "patience", "save_every", "sample_every", "sample_tokens")
        for name in counts:
            _whole(self, name, 0)
        if not isinstance(self.prompts, tuple):
            raise ValueError(f"prompts must be a tuple of texts, not {self.prompts!r}")
        _choice(self, "on_nan")
        _choice(self, "on_spike")
        _real(self, "spike", 1)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides how a model is trained.

    Attributes:
      steps: optimizer steps of the whole run, which the schedule spans. A run that goes on with more has the learning
        rates of one that had so many from the beginning.
      batch_size: windows of one optimizer step.
      accumulate: parts that these are computed in, one after the other, for want of memory; divides batch_size.
      seed: of the order of the data, dropout, samples and new weights.
      compute_dtype: of the matrix products' inputs; parameters, optimizer and loss are float32.
      remat: compute each block anew in the backward pass instead of keeping what it computed: a third more work, and
        memory that hardly grows with n_layer. Not on a CPU, where XLA undoes the saving.
    """

    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    lora: Lora = dataclasses.field(default_factory=Lora)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    monitor: Monitor = dataclasses.field(default_factory=Monitor)
    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    seed: int = 0
    compute_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    remat: bool = False

    def __post_init__(self):
        _whole(self, "steps", 1)
        _whole(self, "batch_size", 1)
        _whole(self, "accumulate", 1)
        _check(
            self.batch_size % self.accumulate == 0, self, "accumulate", f"a divisor of batch_size, {self.batch_size}"
        )
        _whole(self, "seed", 0, 2**32 - 1)
        _choice(self, "compute_dtype")

    @classmethod
    def from_toml(cls, path: str | os.PathLike) -> Recipe:
        """Read a recipe; what the file does not name has its default.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is not TOML, names what is no part of a recipe, or a value is of a wrong type or out of range.
        """
        try:
            return from_dict(cls, tomllib.loads(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no recipe {path}") from error
        except ValueError as error:  # also of TOML's own errors, and of bytes that are no text
            raise ValueError(f"{path}: {error}") from error


def from_dict(cls: type, values: Mapping[str, Any], place: str = "") -> Any:
    """Build a recipe, or the part of one that is called `place`, from nested dicts.

    Raises:
      ValueError: as `Recipe.from_toml`.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    types = typing.get_type_hints(cls)
    if unknown := [name for name in values if name not in fields]:
        raise ValueError(f"{place}{unknown[0]} is no part of a recipe; here are known: {', '.join(fields)}")
    made = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(types[name]):
            if not isinstance(value, Mapping):
                raise ValueError(f"{place}{name} must be a table, [{place}{name}], not {value!r}")
            made[name] = from_dict(types[name], value, f"{place}{name}.")
        else:
            made[name] = _typed(value, types[name], f"{place}{name}")
    try:
        return cls(**made)
    except ValueError as error:
        raise ValueError(f"{place}{error}") from None


def to_dict(recipe: Any) -> dict[str, Any]:
    """Return a recipe as nested dicts, lists, strings, numbers and booleans: what JSON holds, and `from_dict` takes."""
    return {
        field.name: to_dict(value) if dataclasses.is_dataclass(value) else _plain(value)
        for field in dataclasses.fields(recipe)
        for value in [getattr(recipe, field.name)]
    }


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _typed(value: Any, wanted: Any, name: str) -> Any:
    """Return a value of TOML or JSON as the type of a field: lists become tuples, and a whole number may be a float."""
    if typing.get_origin(wanted) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} must be a list, not {value!r}")
        parts = typing.get_args(wanted)
        parts = parts[:1] * len(value) if len(parts) == 2 and parts[1] is Ellipsis else parts
        if len(parts) != len(value):
            raise ValueError(f"{name} must be a list of {len(parts)}, not {value!r}")
        return tuple(_typed(one, part, name) for one, part in zip(value, parts, strict=True))
    kind = type(typing.get_args(wanted)[0]) if typing.get_origin(wanted) is Literal else wanted
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{name} must be {KINDS[kind]}, not {value!r}")
    return value


# ---- what fields may hold


def _check(holds: bool, part: Any, name: str, what: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {what}, not {getattr(part, name)!r}")


def _whole(part: Any, name: str, low: int, high: float = math.inf) -> None:
    object.__setattr__(part, name, whole_number(name, getattr(part, name), low, high))


def _real(part: Any, name: str, low: float, high: float = math.inf, **ends: bool) -> None:
    value = getattr(part, name)
    number = real_number(name, value, low, high, **ends)
    object.__setattr__(part, name, value if isinstance(value, int) else number)  # run.json says 1 where 1 is given


def _choice(part: Any, name: str) -> None:
    choice(name, getattr(part, name), typing.get_args(typing.get_type_hints(type(part))[name]))


def _pattern(part: Any, name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{name} holds {pattern!r}, which is no regular expression: {error}") from error


def _rules(part: Any, name: str) -> None:
    for rule in getattr(part, name):
        _check(isinstance(rule, tuple) and len(rule) == 2, part, name, "(regular expression, factor) pairs")
        _pattern(part, name, rule[0])
        real_number(f"a factor in {name}", rule[1], 0)
