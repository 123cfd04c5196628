"""Edits and taps as the research functions take them: checked for the rows of a run, and joined with others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from gpt2_jax.activations import InTurn, Tap
from gpt2_jax.changes import Changes, Edits, check_changes
from gpt2_jax.config import GPT2Config
from gpt2_jax.research._rows import check_padding, known_lengths


def changes_of(
    config: GPT2Config,
    edits: Edits,
    taps: Mapping[str, Tap] | None,
    tokens_BT: jax.Array,
    mask_BT: Any,
    whole_rows: bool = True,
) -> Changes:
    """Return the edits and taps of a run, checked for its rows. With a cache these are not whole.

    Raises:
      ValueError: an edit or a tap does not fit the model or the rows.
    """
    longest_B = known_lengths(mask_BT, tokens_BT.shape) if edits and whole_rows else None
    changes = check_changes(config, edits, taps, n_rows=tokens_BT.shape[0], longest_B=longest_B)
    check_padding(changes.edits, mask_BT)
    return changes


def after(first: Mapping[str, Tap], second: Mapping[str, Tap]) -> dict[str, Tap]:
    """Return the taps of both, by activation. Those of the same activation apply in this order."""
    both = {name: InTurn(name, first[name], tap) for name, tap in second.items() if name in first}
    return {**first, **second, **both}
