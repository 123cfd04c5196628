"""What one optimizer step reads."""

from __future__ import annotations

import jax
import numpy as np
from flax import struct


@struct.dataclass
class Batch:
    """Windows of text, all [rows, T]; `train_step` takes them with one more leading axis, the parts of the step.

    Attributes:
      tokens: int32 ids that the model reads.
      targets: int32 ids that it shall say next: the tokens, one further.
      weights: float32, 1 where a target counts in the loss, and 0 where it is padding or masked.
    """

    tokens: np.ndarray | jax.Array
    targets: np.ndarray | jax.Array
    weights: np.ndarray | jax.Array
