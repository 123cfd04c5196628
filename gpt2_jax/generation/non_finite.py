"""Why logits are NaN or infinite. It is worked out on the host, after a compiled program has found such logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.edits import Edit
from gpt2_jax.params import Params, flatten

SHOWN = 3  # names in a message


class NoLogits(ValueError):
    """A row has logits that are NaN or infinite. The message says which row and where."""


def cause(config: GPT2Config, params: Params, edits: Sequence[Edit] = (), taps: Sequence[str] = ()) -> str:
    """Return the cause of logits that are NaN or infinite, and what to do, as the second half of a message.

    Params and values of edits that are not finite are named. If all of these are finite, a tap made such a number, or a
    number was too large for its dtype. `taps` has the names of the taps.
    """
    found = []
    if names := [name for name, leaf in flatten(params).items() if not _is_finite(leaf)]:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        found.append(f"NaN or infinite values in params[{'], params['.join(names[:SHOWN])}]{more}: load other weights")
    if names := [edit.name for edit in edits if not _is_usable(edit)]:
        found.append(f"the value of the edit of {names[0]} is not finite: NaN or infinity cannot be used there")
    if found:
        return "; ".join(found)
    if taps:
        return f"all params and values of edits are finite, so the tap of {' or '.join(taps)} may have made them"
    dtype = config.compute_dtype.name
    if dtype == "float16":
        return "overflow in float16, whose largest number is 65,504: set compute_dtype to float32 or bfloat16"
    if edits:
        return f"overflow in {dtype}, or a division by 0: all params are finite, but the values of the edits do not fit"
    return f"overflow in {dtype}: all params are finite, but the params are too large"


def _is_usable(edit: Edit) -> bool:
    """Return whether an edit's values are finite. A score of -inf is no error: it blocks attention."""
    value = edit.value
    if edit.name.endswith("attn/scores") and edit.kind != "scale":
        value = jax.tree.map(lambda leaf: jnp.where(jnp.isneginf(leaf), 0, leaf), value)
    return _is_finite(value)


def _is_finite(tree: Any) -> bool:
    """Return whether all numbers of an array, or of a tree of arrays, are finite. Float64 may not fit float32."""
    with np.errstate(over="ignore"):
        return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))
