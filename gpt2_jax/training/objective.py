"""What a run learns, recipe.objective: its batches, and the loss of a batch.

Shape letters: A parts of a step, B rows of a part, T tokens, D n_embd, L labels.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.data.batching import Batch, batches, windows
from gpt2_jax.data.example_batches import (
    LabelledRows,
    PackedRows,
    PaddedRows,
    Rows,
    documents_of,
    example_batches,
    example_windows,
    padding_share,
    padding_shares,
)
from gpt2_jax.data.examples import Examples, PreparedExamples
from gpt2_jax.data.token_files import Prepared, Tokens
from gpt2_jax.lora import Branches
from gpt2_jax.model import GPT2
from gpt2_jax.params import Params, output_head
from gpt2_jax.sharding import DATA
from gpt2_jax.training.loss import CHUNK, token_loss
from gpt2_jax.training.plan import Plan

# ---- batches


def train_batches(plan: Plan, data: Prepared | PreparedExamples, first_step: int = 0) -> Generator[Batch, None, None]:
    """Yield the batch of each step, [batch_size, ...], on the host, without end."""
    recipe = plan.recipe
    rows = rows_of(plan, data, data.train)
    if rows is None:
        assert isinstance(data.train, Tokens)
        return batches(data.train, plan.n_tokens, recipe.batch_size, recipe.seed, first_step)
    return example_batches(rows, recipe.batch_size, recipe.seed, first_step)


def val_batches(
    plan: Plan, data: Prepared | PreparedExamples, split: Tokens | Examples, n_rows: int, at_most: int | None = None
) -> Iterator[Batch]:
    """Yield the batches of a validation loss, [n_rows, ...], on the host: the same ones in each evaluation.

    `at_most` is the maximum number of rows; 0 means all, and None the recipe's.
    """
    at_most = plan.recipe.monitor.evaluate_windows if at_most is None else at_most
    rows = rows_of(plan, data, split)
    if rows is None:
        assert isinstance(split, Tokens)
        return windows(split, plan.n_tokens, n_rows, at_most)
    return example_windows(rows, n_rows, at_most)


def rows_of(plan: Plan, data: Prepared | PreparedExamples, split: Tokens | Examples) -> Rows | None:
    """Return the rows of an epoch; None if the windows of a text are read as one text."""
    recipe, n_tokens = plan.recipe, plan.n_tokens
    if recipe.objective == "classification":
        assert isinstance(split, Examples)
        assert isinstance(data, PreparedExamples)
        return LabelledRows(split, n_tokens, label_weights(recipe.classification.balance, data))
    if isinstance(split, Examples) or recipe.data.pack:
        return _rows(split, n_tokens, recipe.data.pack, (data.manifest or {}).get("eot"))
    return None


@functools.lru_cache(maxsize=8)  # training and validation texts: documents are searched and packed once
def _rows(split: Tokens | Examples, n_tokens: int, packed: bool, eot: int | None) -> PaddedRows | PackedRows:
    if isinstance(split, Tokens):
        return PackedRows(documents_of(split, eot), n_tokens, split=True)
    return PackedRows(split, n_tokens) if packed else PaddedRows(split, n_tokens)


def account(plan: Plan, data: Prepared | PreparedExamples) -> list[str]:
    """Return sentences about the training rows: which examples are cut or left out, and how much is padding.

    Which texts of a classifier are cut is in `described`, for each split.
    """
    rows, n_tokens = rows_of(plan, data, data.train), plan.n_tokens
    if rows is None:
        return []
    if not isinstance(rows, PaddedRows | PackedRows):
        return [f"padding: {padding_share(rows, n_tokens):.1%} of the rows of {n_tokens:,} tokens"]
    counted = f"{len(data.train):,} training examples" if isinstance(data.train, Examples) else "packed documents"
    said = f"{counted} make {len(rows):,} rows of {n_tokens:,} tokens"
    said += f"; longer than a row, cut at the end: {rows.n_cut:,}" if rows.n_cut else ""
    said += f"; without a target in a row, left out: {rows.n_skipped:,}" if rows.n_skipped else ""
    alone, packed = padding_shares(rows)
    how = f"{alone:.1%} with one in a row, {packed:.1%} with several (data.pack)"
    used = "several" if plan.recipe.data.pack else "one"
    return [said, f"padding: {how}; this run has {used} in a row"]


def label_weights(balance: str, data: PreparedExamples) -> np.ndarray | None:
    """Return the weight of each label in the loss; None means 1. "weights": n / (labels * examples of the label)."""
    if balance != "weights":
        return None
    counts = np.asarray([data.manifest["train"]["by_label"][label] for label in data.labels])
    return counts.sum() / (len(counts) * np.maximum(counts, 1))


def abstract_batch(plan: Plan) -> Batch:
    """Return a training batch as jax.ShapeDtypeStruct, [A, B, ...]."""
    recipe, at = plan.recipe, plan.over_rows(None)
    shape = (recipe.accumulate, recipe.batch_size // recipe.accumulate)

    def array(dtype: Any, *more: int) -> Any:
        return jax.ShapeDtypeStruct((*shape, *more), dtype, sharding=at)

    tokens = array(jnp.int32, plan.n_tokens)
    if recipe.objective == "classification":
        return Batch(tokens, array(jnp.int32), array(jnp.float32), lengths=array(jnp.int32))
    segments = tokens if recipe.data.pack else None
    return Batch(tokens, tokens, array(jnp.float32, plan.n_tokens), segments=segments)


# ---- the loss


def batch_loss(
    plan: Plan,
    model: GPT2,
    params: Params,
    batch: Batch,
    key: jax.Array | None = None,
    branches: Branches | None = None,
) -> jax.Array:
    """Return the sum of `weight * -log p(target)` over a batch of B rows, in nats.

    Args:
      plan: the plan of the run.
      model: the model; `params` are divided as it needs them.
      params: its params.
      batch: [B, T] arrays; for classification [B] targets, weights and lengths.
      key: the key of dropout; None means no dropout.
      branches: LoRA's pairs, if they are not merged into `params`.
    """
    with contextlib.nullcontext() if branches is None else branches.in_modules():
        if plan.recipe.objective == "classification":
            return label_loss(label_logits(model, params, batch, key), batch)
        h_BTD = _hidden(model, params, batch, key)
    head_VD = output_head(params)
    if branches is not None:
        h_BTD, head_VD = branches.at_head(h_BTD, head_VD)
    chunk = CHUNK * plan.mesh.shape[DATA]  # CHUNK on each device
    return token_loss(h_BTD, head_VD, batch.targets, batch.weights, chunk, plan.mesh)


def _hidden(model: GPT2, params: Params, batch: Batch, key: jax.Array | None) -> jax.Array:
    """Return the hidden states [B, T, D]. No mask is needed: padding comes last, and its states are not read."""
    rngs = None if key is None else {"dropout": key}
    how = {"deterministic": key is None, "segments_BT": batch.segments, "method": "hidden", "rngs": rngs}
    return model.apply({"params": params}, batch.tokens, None, None, **how)[0]


def label_logits(model: GPT2, params: Params, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """Return the logits [B, L] of the labels. Arguments: see `batch_loss`."""
    h_BTD = _hidden(model, params, batch, key)
    mask_BT = jnp.arange(h_BTD.shape[1]) < jnp.asarray(batch.lengths)[:, None]
    return model.apply({"params": params}, h_BTD, mask_BT, method="classify_hidden")


def label_loss(logits_BL: jax.Array, batch: Batch) -> jax.Array:
    """Return the sum of `weight * -log p(label)`, in nats."""
    log_p_BL = jax.nn.log_softmax(logits_BL)
    log_p_B1 = jnp.take_along_axis(log_p_BL, jnp.asarray(batch.targets)[:, None], axis=1)
    return (batch.weights * -log_p_B1[:, 0]).sum()


def label_counts(logits_BL: jax.Array, batch: Batch) -> jax.Array:
    """Return how many texts of each label (rows) got each label (columns), int32 [L, L]. Padding does not count."""
    n_labels, counted_B = logits_BL.shape[-1], jnp.asarray(batch.weights) > 0
    true_BL = jax.nn.one_hot(batch.targets, n_labels, dtype=jnp.int32) * counted_B[:, None]
    got_BL = jax.nn.one_hot(logits_BL.argmax(-1), n_labels, dtype=jnp.int32)
    return jnp.einsum("Bi,Bj->ij", true_BL, got_BL)
