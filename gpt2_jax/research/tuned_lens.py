"""The tuned lens: an affine map for each layer, trained so that the logit lens predicts what the model predicts.

The logit lens reads a layer's residual stream as if it were the last one. But layers use other bases. A translator,
x + x @ w + b, moves a layer's stream into the basis of the last one. It is trained to minimize the KL divergence from
the model's prediction to the lens's (Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the
Tuned Lens", section 2). `logit_lens(..., translators=translators)` reads with it.

Shape letters: B batch, T position, D n_embd, L translated activations, V vocab, P positions of a batch, C positions of
one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpt2_jax.checks import whole_number
from gpt2_jax.config import GPT2Config
from gpt2_jax.explicit_axes import whole_on_auto_axes
from gpt2_jax.jax_defaults import under_jax_defaults
from gpt2_jax.params import Params
from gpt2_jax.research._forward import as_params, as_tokens, forward, places
from gpt2_jax.research.lens import CHUNK, Translators, stream_logits


@under_jax_defaults
def identity_translators(config: GPT2Config) -> Translators:
    """Return the translators that change nothing: those of h0/resid_pre and of each resid_post but the last.

    Training starts from them. They are float32, or float64 if the config's compute_dtype is.
    """
    names = ("h0/resid_pre", *(f"h{i}/resid_post" for i in range(config.n_layer - 1)))
    dtype = jnp.promote_types(config.compute_dtype, jnp.float32)
    w_LDD = jnp.zeros((len(names), config.n_embd, config.n_embd), dtype)
    return Translators(names, w_LDD, jnp.zeros((len(names), config.n_embd), dtype))


@under_jax_defaults
@whole_on_auto_axes
def train_tuned_lens(
    config: GPT2Config,
    params: Params,
    tokens_BT: Any,
    mask_BT: Any = None,
    *,
    steps: int = 250,
    batch_size: int = 8,
    optimizer: optax.GradientTransformation | None = None,
    translators: Translators | None = None,
    seed: int = 0,
) -> tuple[Translators, np.ndarray]:
    """Train the translators of all layers on texts. The model does not change.

    Each layer has its own loss: KL(model's prediction, lens's prediction), averaged over the real tokens of a batch.
    The logits of `CHUNK` positions and one layer are in memory at a time. It compiles one program, for one shape.

    Args:
      config, params: the model.
      tokens_BT, mask_BT: the texts, as `forward` takes them. Rows are drawn at random, each once before any is drawn
        again.
      steps: how many batches to train on.
      batch_size: rows of a batch, at most B.
      optimizer: of optax. None means Adam with a learning rate that decreases linearly from 1e-3 to 0.
      translators: where to start. None means the identity.
      seed: of the order of rows.

    Returns:
      The translators, and the losses [steps, L] in nats per token, each before the step.

    Raises:
      ValueError: as `forward`; translators of another model; or a number is out of range.
    """
    tokens_BT, params = np.asarray(as_tokens(config, tokens_BT)), as_params(config, params)
    mask_BT = np.asarray(places(mask_BT, tokens_BT.shape) >= 0)
    steps, batch_size = whole_number("steps", steps, 1), whole_number("batch_size", batch_size, 1, len(tokens_BT))
    optimizer = optax.adam(optax.linear_schedule(1e-3, 0, steps)) if optimizer is None else optimizer
    trained = identity_translators(config) if translators is None else _checked(config, translators)
    step, state = _step_of(config, optimizer), optimizer.init(cast(Any, trained))
    losses = []
    for rows in _batches(len(tokens_BT), steps, batch_size, np.random.default_rng(seed)):
        trained, state, loss_L = step(params, trained, state, tokens_BT[rows], mask_BT[rows])
        losses.append(loss_L)
    return trained, np.stack(jax.device_get(losses))


def _checked(config: GPT2Config, translators: Translators) -> Translators:
    expected = identity_translators(config)
    found = (translators.names, translators.w_LDD.shape, translators.b_LD.shape)
    if found != (expected.names, expected.w_LDD.shape, expected.b_LD.shape):
        raise ValueError(f"the translators are not of this model: they have {found[0]} and the shape {found[1]}")
    return translators


def _batches(n_rows: int, steps: int, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Return the rows of each batch, [steps, batch_size]."""
    n_epochs = -(-steps * batch_size // n_rows)
    rows = np.concatenate([rng.permutation(n_rows) for _ in range(n_epochs)])
    return rows[: steps * batch_size].reshape(steps, batch_size)


def _step_of(config: GPT2Config, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    last = f"h{config.n_layer - 1}/resid_post"

    @jax.jit
    def step(params: Params, translators: Translators, state: Any, tokens_BT: jax.Array, mask_BT: jax.Array) -> Any:
        patterns = [f"^{name}$" for name in (*translators.names, last)]
        _, captured = forward(config, params, tokens_BT, mask_BT, capture=patterns)
        stream_LPD = jnp.stack([captured[name].reshape(-1, config.n_embd) for name in translators.names])
        final_PD = captured[last].reshape(-1, config.n_embd)
        loss_L, gradient = _gradient(config, params, translators, stream_LPD, final_PD, mask_BT.reshape(-1))
        updates, state = optimizer.update(cast(Any, gradient), state, cast(Any, translators))
        return optax.apply_updates(cast(Any, translators), updates), state, loss_L

    return step


def _gradient(
    config: GPT2Config,
    params: Params,
    translators: Translators,
    stream_LPD: jax.Array,
    final_PD: jax.Array,
    mask_P: jax.Array,
) -> tuple[jax.Array, Translators]:
    """Return each translator's mean KL divergence, [L], and its gradient. Sums go over chunks of positions."""
    n, chunk = len(final_PD), min(CHUNK, len(final_PD))
    n_chunks = -(-n // chunk)

    def chunks(array: jax.Array, axis: int) -> jax.Array:
        """[..., P, ...] -> [chunks, ..., C, ...]."""
        array = jnp.pad(array, [(0, n_chunks * chunk - n if i == axis else 0) for i in range(array.ndim)])
        array = array.reshape(*array.shape[:axis], n_chunks, chunk, *array.shape[axis + 1 :])
        return jnp.moveaxis(array, axis, 0)

    def of_chunk(total: Any, parts: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, None]:
        stream_LCD, final_CD, mask_C = parts
        target_CV = jax.nn.log_softmax(stream_logits(config, params, final_CD))

        def loss(translator: Translators, stream_CD: jax.Array) -> jax.Array:
            logits_CV = stream_logits(config, params, translator.translate(stream_CD))
            kl_C = (jnp.exp(target_CV) * (target_CV - jax.nn.log_softmax(logits_CV))).sum(-1)
            return jnp.where(mask_C, kl_C, 0).sum()

        def of_layer(layer: tuple[Translators, jax.Array]) -> Any:
            return jax.value_and_grad(loss)(*layer)

        return jax.tree.map(jnp.add, total, jax.lax.map(of_layer, (translators, stream_LCD))), None

    zero = jnp.zeros(len(stream_LPD), translators.b_LD.dtype), jax.tree.map(jnp.zeros_like, translators)
    total, _ = jax.lax.scan(of_chunk, zero, (chunks(stream_LPD, 1), chunks(final_PD, 0), chunks(mask_P, 0)))
    return jax.tree.map(lambda leaf: leaf / jnp.maximum(mask_P.sum(), 1), total)
