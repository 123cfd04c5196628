"""LoRA: low-rank matrices added to the weights, w + alpha / rank * a @ b (Hu et al. 2021, section 4.1).

The LoRA tree is {"h0/attn/c_attn/w": {"a": (in, rank), "b": (rank, out)}, ...}. Merged params are plain GPT-2 params.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gpt2_jax.params import Params, flatten, unflatten

Lora = Mapping[str, Mapping[str, jax.Array]]


def init_lora(params: Params, rank: int, targets: str, key: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """Return a new LoRA tree, with a pair for every matrix whose name matches `targets`.

    a is normal with variance 1 / in. b is 0, so merging the new tree changes nothing.

    Raises:
      ValueError: no name matches, a match is not a matrix, or the rank is not less than both sides of the matrix.
    """
    flat = {name: leaf for name, leaf in flatten(params).items() if re.search(targets, name)}
    if not flat:
        raise ValueError(f"no parameter name matches the LoRA targets {targets!r}")
    lora = {}
    for i, (name, w) in enumerate(flat.items()):
        if len(w.shape) != 2 or not 1 <= rank < min(w.shape):
            raise ValueError(f"LoRA of rank {rank} needs a matrix with longer sides, but {name} is {tuple(w.shape)}")
        a = jax.random.normal(jax.random.fold_in(key, i), (w.shape[0], rank), w.dtype) / jnp.sqrt(w.shape[0])
        lora[name] = {"a": a.astype(w.dtype), "b": jnp.zeros((rank, w.shape[1]), w.dtype)}
    return lora


def merge_lora(params: Params, lora: Lora, alpha: float) -> Params:
    """Return params with alpha / rank * a @ b added to each matrix with a pair, computed in at least float32."""
    flat = flatten(params)
    for name, pair in lora.items():
        w, a, b = flat[name], pair["a"], pair["b"]
        wide = jnp.promote_types(w.dtype, jnp.float32)
        change = jnp.matmul(a.astype(wide), b.astype(wide), precision="highest") * (alpha / a.shape[1])
        flat[name] = (w.astype(wide) + change).astype(w.dtype)
    return unflatten(flat)
