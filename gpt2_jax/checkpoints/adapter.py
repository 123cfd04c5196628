"""What LoRA has trained, as one object, and how it is merged into its base model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gpt2_jax.checkpoints.integrity import Leaves
from gpt2_jax.config import GPT2Config
from gpt2_jax.lora import OUTPUT_HEAD, merge_lora
from gpt2_jax.model import abstract_params
from gpt2_jax.params import Params, flatten, unflatten

TABLE, SCORE = "wte", "score/w"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What LoRA has trained, without the base model.

    Attributes:
      pairs: {"h0/attn/c_attn/w": {"a": (in, rank), "b": (rank, out)}, ...}, as in `gpt2_jax.lora`.
      alpha: {"h0/attn/c_attn/w": alpha, ...}: the change of a matrix is alpha / rank * a @ b.
      own: {name: array} of params that were trained themselves, or are not in the base model.
      base: the name of the base model; "" if it is unknown.
      dropout: the rate with which the pairs were trained.
    """

    pairs: Mapping[str, Mapping[str, Any]]
    alpha: Mapping[str, float]
    own: Mapping[str, Any]
    base: str = ""
    dropout: float = 0.0

    @property
    def n_params(self) -> int:
        """The number of parameters of the adapter."""
        return sum(leaf.size for leaf in jax.tree.leaves((dict(self.pairs), dict(self.own))))

    def merge(self, config: GPT2Config, params: Params) -> tuple[GPT2Config, Params]:
        """Return the config and the params of the base model with the adapter merged.

        If the adapter changes only one of the token embedding and the output head, and they are tied in the base model,
        the head gets weights of its own, `lm_head`. If it has a new head for labels, the config gets labels.

        Args:
          config: the config of the base model.
          params: its params.

        Raises:
          ValueError: the adapter does not fit the model.
        """
        config, leaves = self.merged(config, iter(flatten(params).items()))
        return config, unflatten(dict(leaves))

    def merged(self, config: GPT2Config, leaves: Leaves) -> tuple[GPT2Config, Leaves]:
        """Return the config of the merged model, and its params one after the other. Errors: see `merge`."""
        changed = self.pairs.keys() | self.own.keys()
        merged = config
        if config.tie_word_embeddings and changed & {TABLE, OUTPUT_HEAD}:
            merged = merged.replace(tie_word_embeddings=False)
        if SCORE in self.own and len(config.labels) != (n := self.own[SCORE].shape[1]):
            merged = merged.replace(labels=tuple(f"LABEL_{i}" for i in range(n)))
        self._check(merged)
        untied = config.tie_word_embeddings != merged.tie_word_embeddings
        return merged, self._merged(leaves, untied, flatten(abstract_params(merged)))

    def _merged(self, leaves: Leaves, untied: bool, shapes: Mapping[str, Any]) -> Leaves:
        missing = set(self.own)
        for name, leaf in leaves:
            for to in (TABLE, OUTPUT_HEAD) if untied and name == TABLE else (name,):
                missing.discard(to)
                if to in shapes:
                    yield to, self._changed(to, leaf)
        for name in sorted(missing & shapes.keys()):
            yield name, np.asarray(self.own[name])

    def _changed(self, name: str, leaf: Any) -> Any:
        if name in self.own:
            return np.asarray(self.own[name]).astype(leaf.dtype)
        if name not in self.pairs:
            return leaf
        pair: Any = {name: self.pairs[name]}
        merged = flatten(merge_lora(unflatten({name: leaf}), pair, self.alpha[name]))[name]
        return np.asarray(merged) if isinstance(leaf, np.ndarray) else merged

    def _check(self, config: GPT2Config) -> None:
        shapes = {name: leaf.shape for name, leaf in flatten(abstract_params(config)).items()}
        found = {name: (*pair["a"].shape[:1], *pair["b"].shape[1:]) for name, pair in self.pairs.items()}
        found |= {name: leaf.shape for name, leaf in self.own.items()}
        for name, shape in found.items():
            if name not in shapes:
                raise ValueError(f"the adapter changes {name}, which the base model does not have")
            if tuple(shape) != shapes[name]:
                raise ValueError(
                    f"the adapter changes {name} {tuple(shape)}, which is {shapes[name]} in the base model"
                )
