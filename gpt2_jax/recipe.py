"""A recipe: every setting of a training run, read from a TOML file and checked before the run starts."""

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
"""(regular expression, value) pairs in order. A parameter gets the value of the first pair that matches its name."""
OWN = "own"  # the name of the text of data.val_path
Ranks = tuple[tuple[str, int], ...]
KINDS = {int: "a whole number", float: "a number", str: "a string in quotes", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Model:
    """The model to train. With a source, only `source`, `tokenizer` and `dropout` are used.

    All other fields, except tokenizer and dropout, describe a model with random weights.

    Attributes:
      source: the model to start from, any that `load` takes; "" starts from random weights of the shape below.
      n_ctx: longest sequence, in tokens.
      n_embd: width of the residual stream; a multiple of n_head.
      n_head: attention heads per layer.
      n_layer: number of layers.
      tokenizer: a model or folder whose vocabulary is used; "" means that of `source`.
      dropout: dropout rate after the embeddings, on the attention weights and on what each block adds to the residual
        stream; 0 or more, less than 1.
      activation_function: gelu_new (the tanh form of GELU, which GPT-2 has), gelu (exact), relu or silu.
      scale_attn_by_inverse_layer_idx: divide the attention scores of layer i also by i + 1.
      tie_word_embeddings: the output head is the token embedding; false gives it weights of its own.
    """

    source: str = "shakespeare"
    n_ctx: int = 1024
    n_embd: int = 768
    n_head: int = 12
    n_layer: int = 12
    tokenizer: str = ""
    dropout: float = 0.1
    activation_function: Literal["gelu_new", "gelu", "relu", "silu"] = "gelu_new"
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self):
        for name in ("n_ctx", "n_embd", "n_head", "n_layer"):
            _whole(self, name, 1)
        _real(self, "dropout", 0, 1, open_high=True)
        _choice(self, "activation_function")


@dataclasses.dataclass(frozen=True)
class Data:
    """The data to train on. How it is read and split does not apply to tokens that are already prepared.

    Attributes:
      path: text, which is tokenized first: a .txt, .md, .jsonl, .json, .csv, .tsv or .parquet file, a folder of these,
        or - for standard input. Or tokens: a folder that gpt2-prepare wrote, or a .bin file. Required by gpt2-train.
      field: name of the JSON field or table column that contains the text.
      encoding: encoding of the text, as Python names it, for example cp1252.
      end_of_text: what the characters `<|endoftext|>` in a text are: "text", ordinary text, or "split", the end of a
        document, as in corpora that separate documents so.
      skip_bad_rows: leave out and count malformed lines, records without the field, and rows with too few or too many
        columns; otherwise the first one is an error.
      val_fraction: fraction of the tokens that is kept for validation; 0 or more, less than 1.
      split: how the validation part is chosen: "documents" draws whole documents with the seed, "tail" takes the last
        tokens, "auto" uses documents, or the tail if there are too few documents.
      val_path: text or tokens for validation, in place of a part of the training text, which is then trained on in
        full. Text is used whole; so are prepared tokens, unless they have a validation part.
      validation: several such texts: pairs of a name and a path, in TOML a table [data.validation]. Each is measured.
        The first decides which model is the best one, and patience.
      n_tokens: tokens per window, which is one training sequence; 0 means the model's n_ctx. For examples (objectives
        classification and instruction) 0 means the longest example, if that is shorter.
      test_fraction: fraction of the examples that is kept for the test at the end; 0 or more, less than 1.
      label_field: name of the field or column that contains the label (objective classification).
      pack: put several documents or examples into a window, each as if it stood alone: its positions count from 0, and
        it attends only to itself. Not for classification.
      add_tokens: texts that become tokens of their own, such as `<|user|>`. Their rows in the embedding start as the
        means of the rows of their pieces. LoRA trains them only if `lora.full` matches wte.
    """

    path: str = ""
    field: str = "text"
    encoding: str = "utf-8"
    end_of_text: Literal["text", "split"] = "text"
    skip_bad_rows: bool = False
    val_fraction: float = 0.1
    split: Literal["auto", "documents", "tail"] = "auto"
    val_path: str = ""
    validation: tuple[tuple[str, str], ...] = ()
    n_tokens: int = 0
    test_fraction: float = 0.0
    label_field: str = "label"
    pack: bool = False
    add_tokens: tuple[str, ...] = ()

    def __post_init__(self):
        _real(self, "val_fraction", 0, 1, open_high=True)
        _real(self, "test_fraction", 0, 1, open_high=True)
        _check(self.val_fraction + self.test_fraction < 1, self, "test_fraction", "less than 1 - val_fraction")
        _choice(self, "split")
        _choice(self, "end_of_text")
        _whole(self, "n_tokens", 0)
        _check(not (self.val_path and self.validation), self, "val_path", "empty if validation is set")
        for name, _ in self.validation:
            _check(re.fullmatch(r"\w[\w-]*", name) is not None, self, "validation", "by names of letters and digits")
        _check(len(dict(self.validation)) == len(self.validation), self, "validation", "by different names")

    def own_validation(self) -> tuple[tuple[str, str], ...]:
        """Return (name, path) of each validation text of one's own."""
        return ((OWN, self.val_path),) if self.val_path else self.validation


@dataclasses.dataclass(frozen=True)
class Classification:
    """Training of a classifier, with objective = "classification". The model gets a linear head for the labels.

    Attributes:
      train: what is trained without LoRA: "last_block" (also ln_f and the head), or "all". The rules of
        `optimizer.learning_rates` apply as well.
      pooling: what the head reads: the hidden state of a text's "last" token or "first" token, or the "mean" over all.
      balance: "undersample" drops examples at random, so that each label has as many as the rarest one. "weights" keeps
        all, and weights each example's loss by the inverse of its label's frequency. "none" does neither.
    """

    train: Literal["last_block", "all"] = "last_block"
    pooling: Literal["last", "mean", "first"] = "last"
    balance: Literal["none", "undersample", "weights"] = "none"

    def __post_init__(self):
        for name in ("train", "pooling", "balance"):
            _choice(self, name)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Training on instructions and answers, with objective = "instruction".

    Attributes:
      template: the template that makes a prompt of an instruction: "alpaca", "phi3" or "plain".
      loss_on: the tokens that count in the loss: those of the "answers", each with the end-of-text id after it, or
        "all".
      prompt: a template of your own instead: the text before an answer, with the fields {instruction} and {input}. ""
        means `template`.
      prompt_without_input: the same for records without input, with the field {instruction}; "" means `prompt`.
    """

    template: Literal["alpaca", "phi3", "plain"] = "alpaca"
    loss_on: Literal["answers", "all"] = "answers"
    prompt: str = ""
    prompt_without_input: str = ""

    def __post_init__(self):
        _choice(self, "template")
        _choice(self, "loss_on")
        _check(bool(self.prompt) or not self.prompt_without_input, self, "prompt_without_input", '"" without a prompt')


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer. A rule is a pair (regular expression, factor); the first that matches a parameter's name applies.

    Attributes:
      name: adamw, adafactor, sgd (with momentum), lion, or muon. Muon changes the matrices of the blocks; all other
        parameters get AdamW. Its updates are scaled so that the learning rate and decay of AdamW fit both.
      learning_rate: peak learning rate, 0 or more.
      schedule: learning rate schedule after the warm-up: cosine or linear, down to `final_fraction` of the peak, or
        constant.
      warmup_steps: optimizer steps of linear warm-up; the last of them has the peak learning rate.
      final_fraction: learning rate of the last step, as a fraction of the peak, 0 to 1 (cosine, linear).
      betas: decay rates of the first and second moment; 0 or more, less than 1 (adamw, lion, and AdamW beside muon).
      epsilon: added to the root of the second moment; above 0 (adamw, and AdamW beside muon).
      momentum: decay rate of the momentum; 0 or more, less than 1 (sgd, muon).
      weight_decay: decoupled weight decay: a step subtracts learning rate * weight_decay * weight, times the factor
        of the weight's `decay` rule.
      clip: largest global norm of the gradients; larger gradients are scaled down to it. 0 turns clipping off.
      ema: decay of an exponential moving average (EMA) of the trained weights, such as 0.999; 0 or more, less than 1.
        Validation losses, samples, the best model and the loaded checkpoints then have the average. In the first steps
        the decay is smaller: (1 + step) / (10 + step). 0 keeps no average.
      learning_rates: rules for the factor of the learning rate; 0 freezes a parameter.
      decay: rules for the factor of the weight decay; 0 means no decay.
    """

    name: Literal["adamw", "adafactor", "sgd", "lion", "muon"] = "adamw"
    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    momentum: float = 0.9
    weight_decay: float = 0.1
    clip: float = 1.0
    ema: float = 0.0
    learning_rates: Rules = ((".*", 1.0),)
    decay: Rules = ((r"(^|/)(w|wte|wpe|lm_head)$", 1.0), (".*", 0.0))

    def __post_init__(self):
        _choice(self, "name")
        _choice(self, "schedule")
        _real(self, "learning_rate", 0)
        _whole(self, "warmup_steps", 0)
        _real(self, "final_fraction", 0, 1)
        _check(len(self.betas) == 2, self, "betas", "two numbers")
        for beta in self.betas:
            real_number("each of betas", beta, 0, 1, open_high=True)
        _real(self, "epsilon", 0, open_low=True)  # 0 would give 0 / 0 for a zero gradient
        _real(self, "momentum", 0, 1, open_high=True)
        _real(self, "weight_decay", 0)
        _real(self, "clip", 0)
        _real(self, "ema", 0, 1, open_high=True)
        _rules(self, "learning_rates")
        _rules(self, "decay")


@dataclasses.dataclass(frozen=True)
class Lora:
    """LoRA: freeze the weights and train low-rank matrices: w + alpha / rank * a @ b.

    a is (in, rank) and b is (rank, out). The optimizer's rules then match names such as h0/attn/c_attn/w/a and
    h0/attn/c_attn/w/b. By default these have no weight decay.

    Attributes:
      rank: rank of the matrices of `targets`; 0 gives them no pairs. Without any pairs, the weights themselves are
        trained. A rank above the shorter side of a matrix is allowed.
      alpha: scale of the change, which is alpha / rank * a @ b with the rank of each matrix.
      dropout: dropout rate on the input of the pairs, 0 or more, less than 1. A layer then gives
        x @ w + alpha / rank * dropout(x) @ a @ b. Pairs of wte and wpe have none, since their input is an id.
      targets: regular expression; every matrix whose name matches gets a pair a, b.
      ranks: rules (regular expression, rank). The first that matches a matrix's name decides its rank, and 0 means that
        it has no pair. A matrix that none matches has `rank`, if it is one of the `targets`.
      full: regular expression; params whose names match are trained themselves, besides the pairs. `targets` decide
        first. By default it is the head of a classifier, if the model has one. "" is none.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = r"attn/(c_attn|c_proj)/w$"
    ranks: Ranks = ()
    full: str = "^score/"

    def __post_init__(self):
        _whole(self, "rank", 0)
        _real(self, "alpha", 0)
        _real(self, "dropout", 0, 1, open_high=True)
        _pattern(self, "targets", self.targets)
        _pattern(self, "full", self.full)
        _rules(self, "ranks", "rank")
        for _, rank in self.ranks:
            whole_number("a rank in ranks", rank, 0)

    @property
    def is_used(self) -> bool:
        """Whether pairs are trained."""
        return self.rank > 0 or any(rank for _, rank in self.ranks)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How many devices share the work; -1 means all that are left. Params and optimizer state are divided over all.

    Attributes:
      data: devices that share the rows of a batch.
      model: devices that share each matrix product.
    """

    data: int = -1
    model: int = 1

    def __post_init__(self):
        for name in ("data", "model"):
            _whole(self, name, -1)
            _check(getattr(self, name) != 0, self, name, "a number of devices, or -1 for all")
        _check(not self.data == self.model == -1, self, "data", "a number of devices if model is -1")


@dataclasses.dataclass(frozen=True)
class Monitor:
    """What is measured and saved during training, and when training stops early.

    Attributes:
      evaluate_every: optimizer steps between two validation losses; the last step has one too. 0 means never.
      evaluate_windows: maximum number of windows of a validation loss, from the start of the validation text; 0 means
        all.
      patience: stop after this many evaluations in a row without a better loss; 0 means never.
      save_every: optimizer steps between two checkpoints; 0 means only at the end. The end always has one.
      keep: how many of the newest checkpoints are kept. If the newest is damaged, a run resumes from the one before.
      sample_every: optimizer steps between two rounds of samples; the last step has one too. 0 means never.
      prompts: texts that the samples continue; "" starts a new document.
      sample_tokens: maximum number of new tokens per sample.
      on_nan: what to do if the loss or a gradient is NaN or infinite: "stop" the run, or "skip" the step.
      on_spike: what to do if the loss is above `spike` times its running mean: "ignore", "skip" the step, or "stop" the
        run.
      spike: the factor of on_spike, 1 or more.
      tensorboard: also write TensorBoard files.
      wandb: also send the numbers and samples to this project of Weights & Biases, with the package wandb; "" does not.
    """

    evaluate_every: int = 100
    evaluate_windows: int = 0
    patience: int = 0
    save_every: int = 500
    keep: int = 2
    sample_every: int = 500
    prompts: tuple[str, ...] = ("",)
    sample_tokens: int = 64
    on_nan: Literal["stop", "skip"] = "stop"
    on_spike: Literal["ignore", "skip", "stop"] = "ignore"
    spike: float = 2.0
    tensorboard: bool = True
    wandb: str = ""

    def __post_init__(self):
        counts = ("evaluate_every", "evaluate_windows", "patience", "save_every", "sample_every", "sample_tokens")
        for name in counts:
            _whole(self, name, 0)
        _whole(self, "keep", 1)
        if not isinstance(self.prompts, tuple):
            raise ValueError(f"prompts must be a tuple of strings, not {self.prompts!r}")
        _choice(self, "on_nan")
        _choice(self, "on_spike")
        _real(self, "spike", 1)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Every setting of a training run.

    Attributes:
      objective: what is learned: "language_modeling", the next token of a text; "classification", the label of a text;
        or "instruction", the answers to instructions.
      steps: optimizer steps of the whole run, which the learning rate schedule spans. 0 means as many as `epochs` are,
        or 1000 if that is 0 too. If you resume a run with more steps, the learning rate follows the schedule of the
        longer run.
      epochs: how often the training data are read, in place of steps; fractions are possible. Steps are rounded up.
      batch_size: windows per optimizer step.
      accumulate: gradient accumulation: number of micro-batches that a step computes one after another, to save memory;
        must divide batch_size.
      seed: seed of the validation split, data order, dropout, samples and new weights.
      compute_dtype: dtype of the inputs of matrix products; parameters, optimizer and loss are at least float32. With
        float16 the loss is scaled, so that small gradients do not become 0: by 65,536 at first, by half of it after
        each overflow, whose step is skipped, and by twice as much after 2,000 steps without one.
      remat: rematerialization: compute each block again in the backward pass instead of storing its activations. It
        costs a third more computation, and memory hardly grows with n_layer. Without it, training on a CPU still
        computes elementwise operations again, which saves time too.
      attention: "auto" takes a fused kernel for attention on GPUs and TPUs, where it is known to fit: in bfloat16 and
        with model.dropout 0. "plain" never takes it. "fused" stops with an error if there is none.
    """

    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    lora: Lora = dataclasses.field(default_factory=Lora)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    monitor: Monitor = dataclasses.field(default_factory=Monitor)
    classification: Classification = dataclasses.field(default_factory=Classification)
    instruction: Instruction = dataclasses.field(default_factory=Instruction)
    objective: Literal["language_modeling", "classification", "instruction"] = "language_modeling"
    steps: int = 0
    epochs: float = 0.0
    batch_size: int = 8
    accumulate: int = 1
    seed: int = 0
    compute_dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    remat: bool = False
    attention: Literal["auto", "plain", "fused"] = "auto"

    def __post_init__(self):
        _whole(self, "steps", 0)
        _real(self, "epochs", 0)
        _check(not (self.steps and self.epochs), self, "epochs", "0 if steps is set (or set steps to 0)")
        _whole(self, "batch_size", 1)
        _whole(self, "accumulate", 1)
        _check(
            self.batch_size % self.accumulate == 0, self, "accumulate", f"a divisor of batch_size, {self.batch_size}"
        )
        _whole(self, "seed", 0, 2**32 - 1)
        for name in ("objective", "compute_dtype", "attention"):
            _choice(self, name)
        if self.objective == "classification" and self.data.pack:
            raise ValueError("data.pack must be false for classification: a row is one text")

    @classmethod
    def from_toml(cls, path: str | os.PathLike) -> Recipe:
        """Read a recipe. Fields that the file does not name have their defaults.

        Raises:
          FileNotFoundError: the file does not exist.
          ValueError: the file is not TOML, a name is not a recipe field, or a value has the wrong type or is out of
            range.
        """
        try:
            return from_dict(cls, tomllib.loads(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no such recipe: {path}") from error
        except ValueError as error:  # also errors of TOML, and bytes that are not UTF-8
            raise ValueError(f"{path}: {error}") from error


def from_dict(cls: type, values: Mapping[str, Any], place: str = "") -> Any:
    """Build a recipe, or the part of it that is named `place`, from nested dicts.

    Raises:
      ValueError: as `Recipe.from_toml`.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    types = typing.get_type_hints(cls)
    if unknown := [name for name in values if name not in fields]:
        raise ValueError(f"{place}{unknown[0]} is not a recipe field; the fields here are {', '.join(fields)}")
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
    """Return a recipe as nested dicts, lists, strings, numbers and booleans, which JSON can hold."""
    return {
        field.name: to_dict(value) if dataclasses.is_dataclass(value) else _plain(value)
        for field in dataclasses.fields(recipe)
        for value in [getattr(recipe, field.name)]
    }


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _typed(value: Any, wanted: Any, name: str) -> Any:
    """Return a TOML or JSON value as the type of a field. Lists become tuples; a float field accepts an int."""
    if typing.get_origin(wanted) is tuple:
        if isinstance(value, Mapping) and typing.get_args(wanted)[0] == tuple[str, str]:
            value = list(value.items())
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} must be a list, not {value!r}")
        parts = typing.get_args(wanted)
        parts = parts[:1] * len(value) if len(parts) == 2 and parts[1] is Ellipsis else parts
        if len(parts) != len(value):
            raise ValueError(f"{name} must be a list of {len(parts)} values, not {value!r}")
        return tuple(_typed(one, part, name) for one, part in zip(value, parts, strict=True))
    kind = type(typing.get_args(wanted)[0]) if typing.get_origin(wanted) is Literal else wanted
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{name} must be {KINDS[kind]}, not {value!r}")
    return value


# ---- checks of fields


def _check(holds: bool, part: Any, name: str, what: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {what}, not {getattr(part, name)!r}")


def _whole(part: Any, name: str, low: int, high: float = math.inf) -> None:
    object.__setattr__(part, name, whole_number(name, getattr(part, name), low, high))


def _real(part: Any, name: str, low: float, high: float = math.inf, **ends: bool) -> None:
    value = getattr(part, name)
    number = real_number(name, value, low, high, **ends)
    object.__setattr__(part, name, value if isinstance(value, int) else number)  # an int stays an int in run.json


def _choice(part: Any, name: str) -> None:
    choice(name, getattr(part, name), typing.get_args(typing.get_type_hints(type(part))[name]))


def _pattern(part: Any, name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{name} holds {pattern!r}, which is not a regular expression: {error}") from error


def _rules(part: Any, name: str, value: str = "factor") -> None:
    for rule in getattr(part, name):
        _check(isinstance(rule, tuple) and len(rule) == 2, part, name, f"(regular expression, {value}) pairs")
        _pattern(part, name, rule[0])
        real_number(f"a {value} in {name}", rule[1], 0)
