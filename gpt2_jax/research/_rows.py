"""Rows of token ids as arguments: their check, their padding to a few lengths, and results cut to each row's length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gpt2_jax.activations import axes, shape
from gpt2_jax.checks import choice
from gpt2_jax.config import GPT2Config
from gpt2_jax.edit_checks import check_value
from gpt2_jax.edits import Edit
from gpt2_jax.generation.prompts import check_prompt
from gpt2_jax.model import Output

SHORTEST = 32  # tokens; with powers of two from here on, all rows of up to 1,024 tokens share six lengths


def as_tokens(config: GPT2Config, tokens_BT: Any) -> jax.Array:
    """Return token ids as an array [B, T]. Ids in lists and NumPy arrays are checked; ids in a JAX array are not.

    Raises:
      ValueError: not rows of ids of the vocabulary, no rows, or rows of different lengths.
    """
    if isinstance(tokens_BT, jax.Array):
        if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
            raise ValueError(f"tokens must be whole numbers of shape [B, T], not {tokens_BT.dtype}{tokens_BT.shape}")
        if not tokens_BT.size:
            raise ValueError(f"tokens must have one row and one token or more, not the shape {tokens_BT.shape}")
        return tokens_BT
    rows = as_rows(config, tokens_BT)
    if len({len(row) for row in rows}) > 1:
        lengths = ", ".join(str(len(row)) for row in rows)
        raise ValueError(
            f"the rows of tokens have {lengths} ids: pad them to one length with research.padded, which also returns "
            "mask_BT"
        )
    return cast(jax.Array, np.stack(rows).astype(np.int32))  # jit takes NumPy arrays


def as_rows(config: GPT2Config, tokens: Any) -> list[np.ndarray]:
    """Return rows of token ids, checked, as arrays.

    Raises:
      ValueError: not rows of ids of the vocabulary, or no rows.
    """
    if not hasattr(tokens, "__len__") or len(tokens) == 0:
        raise ValueError(f"tokens must be rows of ids, [B, T], not {tokens!r}")
    if np.ndim(tokens[0]) == 0:
        raise ValueError("tokens must be rows of ids, [B, T], not one row: put it into a list, [ids]")
    return [check_prompt(config, f"tokens[{b}]", row) for b, row in enumerate(tokens)]


def padded(
    config: GPT2Config, tokens: Sequence[Sequence[int]], side: Literal["left", "right"] = "right"
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of any lengths as one array, int32 [B, T], and its mask, bool [B, T], True for real tokens.

    Args:
      config: the model's config.
      tokens: the rows of ids.
      side: where the padding is. Results do not depend on it.

    Raises:
      ValueError: not rows of ids of the vocabulary, or another side.
    """
    rows = as_rows(config, tokens)
    return _padded(rows, max(map(len, rows)), choice("side", side, ("left", "right")))


def _padded(rows: Sequence[np.ndarray], length: int, side: str = "right") -> tuple[np.ndarray, np.ndarray]:
    tokens_BT, mask_BT = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for b, row in enumerate(rows):
        real = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        tokens_BT[b, real], mask_BT[b, real] = row, True
    return tokens_BT, mask_BT


def are_lists(tokens: Any) -> bool:
    """Return whether tokens are a list of rows, and not one array."""
    return not isinstance(tokens, jax.Array | np.ndarray)


def bucketed(config: GPT2Config, rows: Sequence[np.ndarray]) -> tuple[Any, Any]:
    """Return rows padded on the right to one of a few lengths, and their mask.

    Raises:
      ValueError: a row has more than n_ctx tokens.
    """
    longest = max(map(len, rows))
    if longest > config.n_ctx:
        raise ValueError(f"{longest} tokens do not fit the model's n_ctx of {config.n_ctx}")
    return _padded(rows, min(max(SHORTEST, 1 << (longest - 1).bit_length()), config.n_ctx))


def bucketed_edit(config: GPT2Config, edit: Edit, n_rows: int, n_tokens: int, n_padded: int) -> Edit:
    """Return an edit whose value has zeros for the tokens that padding adds, if it has one value for each token.

    Raises:
      ValueError: the value does not fit the tokens without padding.
    """
    letters, target = axes(edit.name), shape(config, edit.name, n_rows, n_tokens)

    def pad(value: Any) -> Any:
        found = jnp.shape(value)
        check_value(edit, edit.name, found, target)
        of = _axes_of_value(edit, letters, len(found))
        whole = edit.kind == "patch"  # it has all axes, also of one token
        ends = [
            (0, n_padded - n_tokens if axis in "TS" and (whole or size > 1) else 0)
            for axis, size in zip(of, found, strict=False)
        ]
        return jnp.pad(value, ends) if any(after for _, after in ends) else value

    return edit.replace(value=jax.tree.map(pad, edit.value))  # pyright: ignore[reportAttributeAccessIssue]


def _axes_of_value(edit: Edit, letters: str, n_axes: int) -> str:
    """Return the axes of an edit's value, of the activation's axes `letters`. P is one entry for each position."""
    lead = ("B" if edit.each_row else "") + ("P" if edit.each_position else "")
    rest = letters.replace("B", "").replace("T", "") if edit.each_position else letters
    n_rest = n_axes - len(lead)
    return lead + rest[len(rest) - n_rest :]


def known_lengths(mask_BT: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return the number of tokens of each row, or of its slots if the mask is traced."""
    if mask_BT is None or isinstance(mask_BT, Tracer) or np.shape(mask_BT) != shape:
        return np.full(shape[0], shape[1])
    return np.asarray(mask_BT).astype(bool).sum(-1)


def check_padding(edits: Sequence[Edit], mask_BT: Any) -> None:
    """Check that a patch from a list of rows of several lengths, which begin in slot 0, is for such rows.

    Raises:
      ValueError: a row begins with padding.
    """
    if mask_BT is None or isinstance(mask_BT, Tracer):
        return
    left = (np.diff(np.asarray(mask_BT).astype(np.int8), axis=-1) > 0).any()
    for edit in edits:
        if left and edit.lengths is not None:
            raise ValueError(
                f"the patch of {edit.name} is from a list of rows: pad the rows on the right, or give a list"
            )


def of_rows(
    config: GPT2Config, found: tuple[Output, dict[str, jax.Array]], lengths: Sequence[int]
) -> tuple[Any, dict[str, Any]]:
    """Return the results of padded rows cut to their lengths: arrays if all are equal, else a list of arrays each."""
    out, captured = found

    def cut(array: jax.Array | None, letters: str) -> Any:
        if array is None:
            return None
        if len(set(lengths)) == 1:
            return _cut(array, tuple(slice(lengths[0]) if axis in "TS" else slice(None) for axis in letters))
        return [
            _cut(array, (b, *(slice(n) if axis in "TS" else slice(None) for axis in letters[1:])))
            for b, n in enumerate(lengths)
        ]

    out = Output(cut(out.logits, "BTV"), None, cut(out.stream, "BTD"))  # pyright: ignore[reportArgumentType]
    return out, {name: cut(array, axes(name)) for name, array in captured.items()}


def _cut(array: jax.Array, index: tuple[Any, ...]) -> jax.Array:
    """Return a part of an array. An array of one device is cut on the host, which compiles nothing for each length."""
    if isinstance(array, Tracer) or len(array.sharding.device_set) > 1:
        return array[index]
    return jax.device_put(np.asarray(array)[index], array.sharding)
