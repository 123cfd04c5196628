"""Tokens that are added to a vocabulary, and their rows in the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.explicit_axes import whole_on_auto_axes
from gpt2_jax.jax_defaults import under_jax_defaults
from gpt2_jax.model import check_params
from gpt2_jax.params import Params, flatten, unflatten
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.tokenizer import description as describe
from gpt2_jax.tokenizer.huggingface import with_added

HEADS = ("wte", "lm_head")  # the params with a row for each id


def resize_vocabulary(
    config: GPT2Config, params: Params, tokenizer: Tokenizer, tokens: Sequence[str]
) -> tuple[GPT2Config, Params, Tokenizer]:
    """Return a model and its tokenizer with more tokens, such as `<|user|>`, which text then contains as one id.

    The row of a new token in `wte`, and in an untied `lm_head`, is the mean of the rows of the tokens that its text
    had before. Rows of padding, which the model has and no token uses, are used first.

    Args:
      config, params: the model. Nothing is changed in place; dtypes are kept.
      tokenizer: its tokenizer. It is not changed.
      tokens: the texts of the new tokens. They get the next free ids, in this order. `encode` always finds them as a
        whole. A token that the tokenizer has already, but the model has no row for, gets one.

    Raises:
      ValueError: tokens are not different texts, one of them has a row already, or the params do not match the config.
    """
    check_params(config, params, dtypes=False)
    pieces = pieces_of(config, tokenizer, tokens)
    larger = with_tokens(tokenizer, tokens)
    n_vocab = max([config.n_vocab, *(larger.tokens[token] + 1 for token in tokens)])
    flat = flatten(params)
    rows = {larger.tokens[token]: ids for token, ids in pieces.items()}
    flat |= {name: with_rows(flat[name], n_vocab, rows) for name in HEADS if name in flat}
    return config.replace(n_vocab=n_vocab), unflatten(flat), larger


def with_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    """Return the tokenizer with tokens added to it. Those that it has already keep their ids.

    Raises:
      ValueError: tokens are not different texts.
    """
    _check(tokens)
    new = [token for token in tokens if token not in tokenizer.added]
    if not new:
        return tokenizer
    fields = [describe.added_fields(token, 0, special=False) for token in new]
    if tokenizer.is_openai_form:
        ids = {token: tokenizer.n_vocab + i for i, token in enumerate(new)}
        special = {token: token in tokenizer.special for token in tokenizer.added}
        made = Tokenizer(tokenizer.tokens | ids, tokenizer.merges, added=special | dict.fromkeys(new, False))
    else:
        made = Tokenizer.from_description(with_added(tokenizer.description(), fields))
    for name in ("eot", "eot_of_files", "prefix", "suffix", "settings"):
        setattr(made, name, getattr(tokenizer, name))
    return made


def pieces_of(config: GPT2Config, tokenizer: Tokenizer, tokens: Sequence[str]) -> dict[str, list[int]]:
    """Return the ids of the text of each token, before it is a token.

    Raises:
      ValueError: as `resize_vocabulary`.
    """
    _check(tokens)
    found = {}
    for token in tokens:
        row = tokenizer.tokens.get(token)
        if row is not None and row < config.n_vocab:
            raise ValueError(f"{token!r} is a token of the vocabulary already, with the id {row}")
        # A token without a row is found in its own text: its characters are not.
        parts = [token] if row is None else list(token)
        ids = [i for part in parts for i in tokenizer.encode(part)]
        found[token] = [i for i in ids if i < config.n_vocab]
        if not found[token]:
            raise ValueError(f"{token!r} has no tokens in the vocabulary, whose rows could be averaged")
    return found


def _check(tokens: Sequence[str]) -> None:
    if isinstance(tokens, str) or not all(isinstance(token, str) and token for token in tokens):
        raise ValueError(f"tokens must be a list of texts that are not empty, not {tokens!r}")
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"tokens must be different: {', '.join(tokens)}")


@under_jax_defaults
@whole_on_auto_axes
def with_rows(table_VD: Any, n_vocab: int, rows: Mapping[int, Sequence[int]]) -> Any:
    """Return a table with `n_vocab` rows; `rows` says which old rows each new one is the mean of."""
    module = jnp if isinstance(table_VD, jax.Array) else np
    wide_VD = table_VD.astype(jnp.promote_types(table_VD.dtype, jnp.float32), copy=False)
    means = {row: wide_VD[module.asarray(ids)].mean(0) for row, ids in rows.items()}
    zeros = module.zeros((n_vocab - len(table_VD), table_VD.shape[1]), table_VD.dtype)
    larger_VD: Any = module.concatenate([table_VD, zeros])
    if not means:
        return larger_VD
    at = module.asarray(list(means))
    values = module.stack([mean.astype(table_VD.dtype) for mean in means.values()])
    if module is jnp:
        return larger_VD.at[at].set(values)
    larger_VD[at] = values
    return larger_VD
