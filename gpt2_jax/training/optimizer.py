"""Optax optimizers as a recipe describes them, over {name: array}."""

from __future__ import annotations

import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from gpt2_jax.params import by_rules
from gpt2_jax.recipe import Optimizer

MATRIX_OF_A_BLOCK = re.compile(r"(^|/)h\d+/.*/w(/[ab])?$")  # also LoRA's matrices


def make_schedule(optimizer: Optimizer, steps: int) -> optax.Schedule:
    """Return the learning rate schedule of steps 0, 1, ..., steps - 1.

    The warm-up rises linearly, from peak / warmup_steps at step 0 to the peak at its last step. Without warm-up, step 0
    has the peak. After that the rate falls to final_fraction of the peak, which it reaches at the last step. The
    "constant" schedule stays at the peak.

    Raises:
      ValueError: there are more warm-up steps than steps.
    """
    if optimizer.warmup_steps > steps:
        raise ValueError(f"optimizer.warmup_steps, {optimizer.warmup_steps}, must not be more than steps, {steps}")

    peak_step = max(optimizer.warmup_steps - 1, 0)

    def schedule(step):
        step = jnp.asarray(step, float)  # JAX divides int32 in float32 even if float64 is enabled
        progress = jnp.clip((step - peak_step) / max(steps - 1 - peak_step, 1), 0, 1)
        left = {"cosine": (1 + jnp.cos(jnp.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
        final = 1.0 if optimizer.schedule == "constant" else optimizer.final_fraction
        falling = final + (1 - final) * left[optimizer.schedule]
        return optimizer.learning_rate * jnp.where(step < peak_step, (step + 1) / (peak_step + 1), falling)

    return schedule


def make_optimizer(optimizer: Optimizer, names: Iterable[str]) -> optax.GradientTransformation:
    """Return the transformation from averaged gradients to updates. A step subtracts the learning rate times these.

    In order: clipping by the global norm of all gradients, the optimizer itself, decoupled weight decay (Loshchilov and
    Hutter 2017, for every optimizer), and the rules' factors of the learning rate. The learning rate of `make_schedule`
    follows the run's steps. The optimizer's own step count leaves out skipped steps.

    Args:
      optimizer: the `optimizer` part of the recipe.
      names: the names of the trained parameters.

    Raises:
      ValueError: the rules for learning rates or decay do not cover a name.
    """
    names = list(names)
    factors = by_rules(optimizer.learning_rates, names, "optimizer.learning_rates")
    decays = by_rules(optimizer.decay, names, "optimizer.decay")

    def clipped(updates, params):
        # As optax.clip_by_global_norm, but with one factor: XLA for CPUs writes optax's results to memory.
        norm = optax.tree.norm(updates)
        scale = jnp.where(norm > optimizer.clip, optimizer.clip / norm, 1)
        return {k: (u * scale).astype(u.dtype) for k, u in updates.items()}

    def decayed(updates, params):
        rate = optimizer.weight_decay
        return {k: u + rate * decays[k] * params[k] if rate * decays[k] else u for k, u in updates.items()}

    def scaled(updates, params):
        return {k: factors[k] * u if factors[k] != 1 else u for k, u in updates.items()}

    return optax.chain(
        optax.stateless(clipped) if optimizer.clip else optax.identity(),
        _core(optimizer, names),
        optax.stateless(decayed),
        optax.stateless(scaled),
    )


def _core(optimizer: Optimizer, names: Iterable[str]) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(*optimizer.betas, eps=optimizer.epsilon)
    if optimizer.name == "adamw":
        return adam
    if optimizer.name == "muon":
        kinds = {name: "muon" if MATRIX_OF_A_BLOCK.search(name) else "adamw" for name in names}
        return optax.partition({"muon": _muon(optimizer.momentum), "adamw": adam}, kinds)
    if optimizer.name == "lion":
        return optax.scale_by_lion(*optimizer.betas)
    if optimizer.name == "sgd":
        return optax.trace(optimizer.momentum) if optimizer.momentum else optax.identity()
    # Adafactor (Shazeer and Stern 2018): factored second moments, and updates relative to the size of the weights.
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())


def _muon(momentum: float) -> optax.GradientTransformation:
    """Return Muon (Jordan et al. 2024): the momentum of a matrix, with all its singular values moved close to 1.

    The update of a matrix (in, out) is multiplied by 0.2 sqrt(max(in, out)), which gives it the size of AdamW's updates
    (Liu et al. 2025, arXiv:2502.16982, section 2.2).
    """

    def resized(updates, params):
        return jax.tree.map(lambda u: 0.2 * max(u.shape) ** 0.5 * u, updates)

    def as_matrices(updates):
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), updates)

    muon = contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=as_matrices)
    return optax.chain(muon, optax.stateless(resized))
