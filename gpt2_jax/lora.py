"""LoRA: low-rank matrices added to the weights, w + alpha / rank * a @ b (Hu et al. 2021, section 4.1).

The LoRA tree is {"h0/attn/c_attn/w": {"a": (in, rank), "b": (rank, out)}, ...}. Merged params are plain GPT-2 params.
wte, wpe and lm_head are tables (rows, n_embd), so their pairs are a (rows, rank) and b (rank, n_embd). A pair for wte
changes the output head too, if the head is tied to it.

With dropout on the input of the pairs, a step cannot merge them: `Branches` adds x @ a @ b to what the modules compute.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt2_jax.dropout import drop
from gpt2_jax.params import Params, flatten, unflatten
from gpt2_jax.products import product

TABLES = ("wte", "wpe")
OUTPUT_HEAD = "lm_head"  # (n_vocab, n_embd): the only matrix that is multiplied by its transpose
Lora = Mapping[str, Mapping[str, jax.Array]]


def init_lora(
    params: Params, rank: int, targets: str, key: jax.Array, ranks: Sequence[tuple[str, int]] = ()
) -> dict[str, dict[str, jax.Array]]:
    """Return a new LoRA tree, with a pair for every matrix whose name matches `targets`, or a rule of `ranks`.

    A rule is (regular expression, rank). The first that matches a name decides its rank; 0 means no pair.

    The factor at the matrix's input is normal with variance 1 / in, and the other one is 0, so merging the new tree
    changes nothing. The input is a's side, but for lm_head it is b's. The rank may be larger than a side of the matrix,
    as in a classifier of two classes; the pair then has more parameters than the matrix. A pair has
    rank * (in + out) of them.

    Raises:
      ValueError: no name matches, a match is not a matrix, or the rank is not positive.
    """
    flat = flatten(params)
    by_name = {name: _rank_of(name, rank, targets, ranks) for name in flat}
    by_name = {name: rank for name, rank in by_name.items() if rank is not None}
    if not by_name:
        raise ValueError(f"no parameter name matches the LoRA targets {targets!r}" + (" or ranks" if ranks else ""))
    lora = {}
    for i, (name, rank) in enumerate(by_name.items()):
        w = flat[name]
        if len(w.shape) != 2 or rank < 1:
            raise ValueError(
                f"LoRA needs a matrix and a rank of 1 or more, but {name} is {tuple(w.shape)}, rank {rank}"
            )
        key_i, (n_in, n_out) = jax.random.fold_in(key, i), w.shape
        if name == OUTPUT_HEAD:
            lora[name] = {"a": jnp.zeros((n_in, rank), w.dtype), "b": _normal(key_i, (rank, n_out), n_out, w.dtype)}
        else:
            lora[name] = {"a": _normal(key_i, (n_in, rank), n_in, w.dtype), "b": jnp.zeros((rank, n_out), w.dtype)}
    return lora


def _rank_of(name: str, rank: int, targets: str, ranks: Sequence[tuple[str, int]]) -> int | None:
    """Return the rank of a matrix; None if it gets no pair."""
    for pattern, own in ranks:
        if re.search(pattern, name):
            return own or None
    return rank if re.search(targets, name) and (rank or not ranks) else None


def _normal(key: jax.Array, shape: tuple[int, int], n_in: int, dtype: Any) -> jax.Array:
    return (jax.random.normal(key, shape, dtype) / jnp.sqrt(n_in)).astype(dtype)


def merge_lora(params: Params, lora: Lora, alpha: float | Mapping[str, float]) -> Params:
    """Return params with alpha / rank * a @ b added to each matrix with a pair, computed in at least float32.

    Args:
      params: the frozen weights.
      lora: the LoRA tree.
      alpha: one for all matrices, or {name: alpha}.
    """
    flat = flatten(params)
    for name, pair in lora.items():
        w, a, b = flat[name], pair["a"], pair["b"]
        wide = jnp.promote_types(w.dtype, jnp.float32)
        scale = (alpha if isinstance(alpha, int | float) else alpha[name]) / a.shape[1]
        change = jnp.matmul(a.astype(wide), b.astype(wide), precision="highest") * scale
        flat[name] = (w.astype(wide) + change).astype(w.dtype)
    return unflatten(flat)


def pairs_of(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return {"h0/attn/c_attn/w": {"a", "b"}} from {"h0/attn/c_attn/w/a", ...}."""
    pairs: dict[str, dict[str, Any]] = {}
    for name, leaf in flat.items():
        matrix, _, side = name.rpartition("/")
        pairs.setdefault(matrix, {})[side] = leaf
    return pairs


@dataclasses.dataclass(frozen=True)
class Branches:
    """LoRA beside the frozen weights: a module gives x @ w + alpha / rank * dropout(x) @ a @ b.

    The dropout of a matrix depends on the key and on the matrix's name alone.

    Attributes:
      pairs: the pairs, divided as the params of the model are (`gpt2_jax.tensor_parallel`).
      alpha: the scale.
      rate: the rate of dropout, in [0, 1).
      key: the key of this pass.
      n_in: {name: the length of the matrix's input}, without heads of zeros, which get no bits of their own.
    """

    pairs: Lora
    alpha: float
    rate: float
    key: jax.Array
    n_in: Mapping[str, int]

    def in_modules(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which the modules of a model, when they are applied, add the branches."""
        return nn.intercept_methods(self._intercept)

    def at_head(self, h_BTD: jax.Array, head_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return hidden states and a head whose product has the branch of lm_head: both get `rank` more columns."""
        if OUTPUT_HEAD not in self.pairs:
            return h_BTD, head_VD
        a_VR, b_RD = self.pairs[OUTPUT_HEAD]["a"], self.pairs[OUTPUT_HEAD]["b"].astype(h_BTD.dtype)
        low_BTR = product(self._dropped(OUTPUT_HEAD, h_BTD), b_RD.T) * self._scale(OUTPUT_HEAD)
        h = jnp.concatenate([h_BTD, low_BTR.astype(h_BTD.dtype)], axis=-1)
        return h, jnp.concatenate([head_VD, a_VR.astype(head_VD.dtype)], axis=-1)

    def _intercept(self, next_function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y = next_function(*args, **kwargs)
        name = "/".join([*context.module.path, "w"])
        if context.method_name != "__call__" or name not in self.pairs:
            return y
        dtype = context.module.config.compute_dtype
        a, b = (self.pairs[name][side].astype(dtype) for side in "ab")
        low = product(self._dropped(name, args[0].astype(dtype)), a)
        return y + (product(low, b) * self._scale(name)).astype(y.dtype)

    def _dropped(self, name: str, x: jax.Array) -> jax.Array:
        key = jax.random.fold_in(self.key, zlib.crc32(name.encode()))
        return drop(x, self.rate, key, (*x.shape[:-1], self.n_in[name]))

    def _scale(self, name: str) -> float:
        return self.alpha / self.pairs[name]["a"].shape[1]
