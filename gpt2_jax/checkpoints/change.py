"""What a run changes of a model: with LoRA its pairs, and the params that are trained themselves."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2_jax.checkpoints import bases
from gpt2_jax.checkpoints.ahead import read_ahead
from gpt2_jax.checkpoints.integrity import Leaves
from gpt2_jax.lora import merge_lora
from gpt2_jax.params import flatten, unflatten


@dataclasses.dataclass(frozen=True)
class Change:
    """What a run has stored of its model.

    Attributes:
      pairs: LoRA's pairs on the host, {"h0/attn/c_attn/w": {"a", "b"}}; empty without LoRA.
      alpha: LoRA's scale.
      dropout: LoRA's dropout rate.
      own: the shapes and dtypes of the stored params: those that are trained themselves, or all without a base.
      read_own: reads a stored param by its name.
      base: the frozen params, which are elsewhere; None if all params are stored.
      run_dir: the run's folder; None if it is unknown.
    """

    pairs: Mapping[str, Mapping[str, np.ndarray]]
    alpha: float
    dropout: float
    own: Mapping[str, jax.ShapeDtypeStruct]
    read_own: Callable[[str], np.ndarray]
    base: bases.Base | None
    run_dir: Path | None

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes and dtypes of all params."""
        return {**bases.abstract(self.base), **self.own}

    def merged(self, open_model: bases.Open) -> Leaves:
        """Yield all params with the pairs merged. Errors of `bases.read` are passed on."""
        frozen: Leaves = iter(()) if self.base is None else bases.read(self.base, self.run_dir, open_model)
        for name, leaf in itertools.chain(frozen, read_ahead(self.own, self.read_own)):
            if name in self.pairs:
                dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)  # float32 for float64, unless that is enabled
                pair: dict[str, Any] = {name: {side: np.asarray(x, dtype) for side, x in self.pairs[name].items()}}
                leaf = np.asarray(leaf, dtype)
                leaf = np.asarray(flatten(merge_lora(unflatten({name: leaf}), pair, self.alpha))[name])
            yield name, leaf
            del leaf  # before the next one is read
