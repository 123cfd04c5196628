"""Texts with labels, as examples for a classifier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gpt2_jax.data.examples import Example
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
      ValueError: a record lacks a field, or its text is empty or not a string.
    """
    for record, place in records:
        for name in (field, label_field):
            if record.get(name) is None:
                has = ", ".join(map(str, record)) or "none"
                raise ValueError(f'{place} has no field "{name}"; it has: {has}')
        text, label = record[field], record[label_field]
        if not isinstance(text, str) or not text:
            raise ValueError(f'{place}: the field "{field}" is not a text: {text!r:.60}')
        if not isinstance(label, str | int | float):
            raise ValueError(f'{place}: the field "{label_field}" is not a label: {label!r:.60}')
        yield Example(np.asarray(tokenizer.encode(text), id_dtype(tokenizer.n_vocab)), label=str(label))
