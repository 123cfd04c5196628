"""Forward passes with odd sizes, used by every model test."""

import dataclasses
import functools

import jax
import numpy as np

import gpt2_jax

CONFIG = gpt2_jax.GPT2Config(n_vocab=53, n_ctx=23, n_embd=21, n_head=3, n_layer=3)


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, tokens_BT, mask_BT=None):
    return gpt2_jax.GPT2(config).apply({"params": params}, tokens_BT, mask_BT=mask_BT).logits


def logits_of(config, params, tokens_BT, mask_BT=None):
    return np.asarray(run(config, params, tokens_BT, mask_BT))


@functools.partial(jax.jit, static_argnums=0)
def cached_step(config, params, tokens_BT, mask_BT, cache):
    out = gpt2_jax.GPT2(config).apply({"params": params}, tokens_BT, mask_BT=mask_BT, cache=cache)
    return out.logits, out.cache


def logits_in_chunks(config, params, tokens_BT, mask_BT, chunks, slots):
    """The joined logits of successive calls on chunks of the tokens."""
    cache, parts, start = gpt2_jax.init_cache(config, len(tokens_BT), slots), [], 0
    for chunk in chunks:
        span = slice(start, start + chunk)
        logits, cache = cached_step(
            config, params, tokens_BT[:, span], None if mask_BT is None else mask_BT[:, span], cache
        )
        parts.append(np.asarray(logits))
        start += chunk
    assert start == tokens_BT.shape[1]
    return np.concatenate(parts, axis=1)


def relative_error(ours, theirs):
    """The largest difference, relative to the largest absolute logit."""
    assert ours.shape == theirs.shape
    assert np.isfinite(theirs).all()
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def some_tokens(config, batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, config.n_vocab, (batch, length), dtype=np.int32)


def silence(params, *parts):
    """A copy in which the named parts, "attn" or "mlp", add nothing to the residual stream."""
    params = jax.tree.map(np.array, params)
    for block in (branch for name, branch in params.items() if name.startswith("h")):
        for part in parts:
            for leaf in block[part]["c_proj"].values():
                leaf[:] = 0
    return params


def padding_masks(length):
    """Named [3, length] masks: the first row keeps everything but one token, the last keeps a single one."""
    count = np.array([length - 1, length // 2, 1])[:, None]
    place = np.arange(length)
    holes = np.random.default_rng(5).permuted(np.tile(place, (3, 1)), axis=1) < count
    return {"left": place >= length - count, "right": place < count, "holes": holes}


def in_bfloat16(config):
    return dataclasses.replace(config, compute_dtype="bfloat16")
