"""LoRA: low-rank matrices added to the weights, w + alpha / rank * a @ b (Hu et al. 2021, section 4.1).

The LoRA tree is {"h0/attn/c_attn/w": {"a": (in, rank), "b": (rank, out)}, ...}. Merged params are plain GPT-2 params.
wte, wpe and lm_head are tables (rows, n_embd), so their pairs are a (rows, rank) and b (rank, n_embd). A pair for wte
changes the output head too, if the head is tied to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gpt2_jax.params import Params, flatten, unflatten

OUTPUT_HEAD = "lm_head"  # (n_vocab, n_embd): the only matrix that is multiplied by its transpose
Lora = Mapping[str, Mapping[str, jax.Array]]


def init_lora(params: Params, rank: int, targets: str, key: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """Return a new LoRA tree, with a pair for every matrix whose name matches `targets`.

    The factor at the matrix's input is normal with variance 1 / in, and the other one is 0, so merging the new tree
    changes nothing. The input is a's side, but for lm_head it is b's. The rank may be larger than a side of the matrix,
    as in a classifier of two classes; the pair then has more parameters than the matrix. A pair has
    rank * (in + out) of them.

    Raises:
      ValueError: no name matches, a match is not a matrix, or the rank is not positive.
    """
    flat = {name: leaf for name, leaf in flatten(params).items() if re.search(targets, name)}
    if not flat:
        raise ValueError(f"no parameter name matches the LoRA targets {targets!r}")
    lora = {}
    for i, (name, w) in enumerate(flat.items()):
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
