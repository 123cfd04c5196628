"""Why logits are NaN or infinite. It is worked out on the host, after a compiled program has found such logits."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from gpt2_jax.config import GPT2Config
from gpt2_jax.edits import Edit
from gpt2_jax.params import Params, flatten

SHOWN = 3  # names in a message


class NoLogits(ValueError):
    """A row has logits that are NaN or infinite. The message says which row and where."""


def cause(config: GPT2Config, params: Params, edits: Sequence[Edit] = ()) -> str:
    """Return the cause of logits that are NaN or infinite, and what to do, as the second half of a message.

    The params come first, then the values of edits. If all of these are finite, a number was too large for its dtype.
    """
    names = [name for name, leaf in flatten(params).items() if not jnp.isfinite(leaf).all()]
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return f"NaN or infinite values in params[{'], params['.join(names[:SHOWN])}]{more}: load other weights"
    names = [edit.name for edit in edits if not jnp.isfinite(edit.value).all()]
    if names:
        return f"the value of the edit of {names[0]} is not finite: NaN or infinity cannot be used there"
    dtype = config.compute_dtype.name
    if dtype == "float16":
        return "overflow in float16, whose largest number is 65,504: set compute_dtype to float32 or bfloat16"
    larger = "the values of the edits are too large" if edits else "the params are too large"
    return f"overflow in {dtype}: all params are finite, but {larger}"
