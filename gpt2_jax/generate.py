"""Decoding: one compiled prefill, then one `lax.while_loop` on the device over a KV cache.

Shape letters: B batch, P padded prompt, M most new tokens, V vocab.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from gpt2_jax.config import GPT2Config
from gpt2_jax.kv_cache import KVCache, init_cache
from gpt2_jax.model import GPT2
from gpt2_jax.params import Params
from gpt2_jax.sampling import Sampling, pick

SMALLEST_BUCKET = 16


@struct.dataclass
class DecodeState:
    """The decoding loop's state.

    Attributes:
      step: int32 scalar, new tokens so far in every row.
      new_BM: int32, the new tokens; [:, step:] is not written yet.
      key_B: a key for each row; step t of row b draws with fold_in(key_B[b], t).
      cache: what the model has seen: the prompt and all new tokens but the last.

    """

    step: jax.Array
    new_BM: jax.Array
    key_B: jax.Array
    cache: KVCache


def generate(
    config: GPT2Config,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    tokens_BP, mask_BP = pad_left(prompts)
    n_slots = tokens_BP.shape[1] + bucket(max_new_tokens)
    sampling = Sampling(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))
    model = GPT2(config)
    state = prefill(model, params, tokens_BP, mask_BP, n_slots, sampling, seed)
    new_BM = decode(model, params, state, sampling, max_new_tokens)
    return np.asarray(new_BM)[:, :max_new_tokens].tolist()


@functools.partial(jax.jit, static_argnames=("model", "n_slots"))
def prefill(
    model: Any,
    params: Params,
    tokens_BP: jax.Array,
    mask_BP: jax.Array,
    n_slots: int,
    sampling: Sampling,
    seed: jax.Array,
) -> DecodeState:
    """Run the prompts through the model and pick each row's first new token."""
    n_rows, n_prompt = tokens_BP.shape
    key = jax.random.key(seed, impl="threefry2x32")
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n_rows))
    cache = init_cache(model.config, n_rows, n_slots)
    h_BTD, cache = model.apply({"params": params}, tokens_BP, mask_BP, cache, method="hidden")
    logits_BV = model.apply({"params": params}, h_BTD[:, -1], method="unembed")
    state = DecodeState(jnp.int32(0), jnp.zeros((n_rows, n_slots - n_prompt), jnp.int32), key_B, cache)
    return _append(state, logits_BV, sampling)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def decode(model: Any, params: Params, state: DecodeState, sampling: Sampling, n_new: jax.Array) -> jax.Array:
    """Take steps until every row has `n_new` new tokens; return new_BM."""

    def step(state: DecodeState) -> DecodeState:
        tokens_B1 = lax.dynamic_slice_in_dim(state.new_BM, state.step - 1, 1, axis=1)
        out = model.apply({"params": params}, tokens_B1, cache=state.cache)
        return _append(state.replace(cache=out.cache), out.logits[:, -1], sampling)

    return lax.while_loop(lambda state: state.step < n_new, step, state).new_BM


def _append(state: DecodeState, logits_BV: jax.Array, sampling: Sampling) -> DecodeState:
    key_B = jax.vmap(jax.random.fold_in, (0, None))(state.key_B, state.step)
    token_B1 = pick(logits_BV, key_B, sampling)[:, None]
    new_BM = lax.dynamic_update_slice_in_dim(state.new_BM, token_B1, state.step, axis=1)
    return state.replace(step=state.step + 1, new_BM=new_BM)


def pad_left(prompts):
    n_prompt = bucket(max(len(prompt) for prompt in prompts))
    tokens_BP = np.zeros((len(prompts), n_prompt), np.int32)
    mask_BP = np.zeros((len(prompts), n_prompt), bool)
    for row, prompt in enumerate(prompts):
        tokens_BP[row, n_prompt - len(prompt) :] = prompt
        mask_BP[row, n_prompt - len(prompt) :] = True
    return tokens_BP, mask_BP


def bucket(n: int) -> int:
    return max(SMALLEST_BUCKET, 1 << math.ceil(math.log2(max(n, 1))))
