"""Texts with labels, as examples for a classifier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gpt2_jax.data.examples import Example
from gpt2_jax.data.fields import check_has
from gpt2_jax.data.token_files import id_dtype
from gpt2_jax.tokenizer import Tokenizer


def labelled_examples(
    records: Iterable[tuple[dict[str, Any], str]], tokenizer: Tokenizer, field: str = "text", label_field: str = "label"
) -> Iterator[Example]:
    """Yield an example for each record: the ids of its text, without an end-of-text id, and its label as a string.

    Args:
      records: dicts, each with its place for messages.
      tokenizer: encodes the texts.
      field: the name of the text.
      label_field: the name of the label: a string, a number or a boolean.

    Raises:
      ValueError: a record lacks a field, its text is empty or not a string, or it has no label.
    """
    for record, place in records:
        for name in (field, label_field):
            check_has(record, name, place)
        text, label = record[field], record[label_field]
        if not isinstance(text, str) or not text:
            raise ValueError(f'{place}: the field "{field}" is not a text: {text!r:.60}')
        yield Example(np.asarray(tokenizer.encode(text), id_dtype(tokenizer.n_vocab)), label=label_name(label, place))


def label_name(label: Any, place: str) -> str:
    """Return the name of a record's label: a string without white space around it, or a number or boolean in words.

    Raises:
      ValueError: it is none of these, or is empty.
    """
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # as files with missing values hold whole numbers
    name = str(label).strip() if isinstance(label, str | int | float) and label == label else ""  # NaN is no label
    if not name:
        raise ValueError(f"{place} has no label: {label!r:.60}")
    return name
