"""The labels of a classifier in Hugging Face's config.json, as GPT2ForSequenceClassification has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2_jax.checkpoints import names
from gpt2_jax.config import GPT2Config
from gpt2_jax.files import read_object

PROBLEM = "single_label_classification"


def check_config(config: GPT2Config, format: str) -> None:
    """Check that GPT2ForSequenceClassification can be this model, which a format of Hugging Face shall hold.

    Raises:
      ValueError: the classifier reads something else than the last token.
    """
    if config.labels and config.pooling != "last":
        raise ValueError(
            f"the {format} format cannot hold a classifier with pooling {config.pooling!r}, since transformers "
            "reads the last token: save it in the format orbax"
        )


def with_labels(config: GPT2Config, path: Path, tensors: Mapping[str, Any], saved: GPT2Config | None) -> GPT2Config:
    """Return the config with labels, if the tensors have a head for two or more of them.

    The labels are those of id2label, or those of the manifest, or LABEL_0, LABEL_1, ..., as in transformers. A head for
    numbers (regression), or for several labels of one text, gives the config as it is.

    Args:
      config: what config.json says of the language model.
      path: config.json.
      tensors: {name: object with a shape}.
      saved: the config in the manifest of this package; None if there is none.

    Raises:
      ValueError: id2label does not name each row of the head once.
    """
    fields = read_object(path)
    heads = [tensor.shape for name, tensor in tensors.items() if names.short(name) == names.SCORE]
    if not heads or fields.get("problem_type") not in (None, PROBLEM):
        return config
    n_labels, *width = heads[0]
    if n_labels < 2 or width != [config.n_embd]:
        return config
    by_number = fields.get("id2label")
    if by_number is None:
        return config.replace(labels=saved.labels if saved else [f"LABEL_{i}" for i in range(n_labels)])
    numbers = [str(i) for i in range(n_labels)]
    if not isinstance(by_number, dict) or sorted(by_number) != sorted(numbers):
        raise ValueError(
            f"{path}: id2label must name each of the {n_labels} rows of {names.SCORE}, not {by_number!r:.80}"
        )
    try:
        return config.replace(labels=[by_number[number] for number in numbers])
    except ValueError as error:
        raise ValueError(f"{path}: id2label: {error}") from error


def fields_of(config: GPT2Config, end_of_text: int) -> dict[str, Any]:
    """Return the fields of config.json that make a model a classifier."""
    return {
        "architectures": ["GPT2ForSequenceClassification"],
        "id2label": {str(i): label for i, label in enumerate(config.labels)},
        "label2id": {label: i for i, label in enumerate(config.labels)},
        "pad_token_id": end_of_text,  # without it, transformers takes only one text at a time
        "problem_type": PROBLEM,
    }
