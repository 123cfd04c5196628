"""Training steps of a tiny model: recipes, batches, and reference steps written in NumPy from their definitions."""

import functools
import math
import re

import checkpoint_forms as forms
import jax
import jax.numpy as jnp
import numpy as np
import tiny_models

import gpt2_jax
from gpt2_jax.data.batching import Batch
from gpt2_jax.recipe import Recipe, from_dict
from gpt2_jax.training import init_state, make_plan, make_train_step

CONFIG = gpt2_jax.GPT2Config(n_vocab=37, n_ctx=23, n_embd=12, n_head=3, n_layer=1)  # each layer takes time to compile
DEEP = CONFIG.replace(n_layer=2)
N_TOKENS = 11
PLAIN = {  # everything that a test does not request is off
    "model": {"dropout": 0.0},
    "optimizer": {"schedule": "constant", "learning_rate": 1e-3, "clip": 0.0, "weight_decay": 0.0},
    "mesh": {"data": 1},
    "steps": 50,
    "batch_size": 6,
    "seed": 3,
}
KEY_BIAS = re.compile(r"c_attn/b$")  # its middle third (keys) has no effect: softmax ignores a common offset


def recipe(**changes) -> Recipe:
    """PLAIN with changes. Changes of a part are dicts: optimizer={"clip": 1.0}."""
    merged = {**PLAIN, **changes}
    for name, value in changes.items():
        if isinstance(value, dict):
            merged[name] = {**PLAIN.get(name, {}), **value}
    return from_dict(Recipe, merged)


def config_of(recipe, config=CONFIG):
    """The config with the recipe's dropout and dtypes."""
    dtypes = {"param_dtype": "float64"} if recipe.compute_dtype == "float64" else {}
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), recipe.model.dropout)
    return config.replace(compute_dtype=recipe.compute_dtype, **rates, **dtypes)


def batch(recipe, seed=1, config=CONFIG, n_tokens=N_TOKENS) -> Batch:
    """Random windows with a random number of targets in the loss, so that parts have different weights."""
    rng = np.random.default_rng(seed)
    shape = (recipe.accumulate, recipe.batch_size // recipe.accumulate, n_tokens)
    ids = rng.integers(0, config.n_vocab, (*shape[:2], n_tokens + 1), dtype=np.int32)
    weights = (rng.random(shape) < rng.random(shape[:2])[..., None]).astype(np.float32)
    weights[0, 0, 0] = 1
    return Batch(tokens=ids[..., :-1], targets=ids[..., 1:], weights=weights)


def in_parts(batch, n) -> Batch:
    """The same rows in this number of parts."""
    return jax.tree.map(lambda leaf: leaf.reshape(n, -1, leaf.shape[-1]), batch)


def params_of(config, seed=7):
    """Random weights. They are so small that gradients are neither all small nor all large."""
    return tiny_models.random_params(config, seed, scale=0.3)


@functools.cache
def _train_step(config, recipe, x64):
    return make_train_step(make_plan(config, recipe))


def train_step(recipe, config=CONFIG):
    """The compiled step. Each recipe compiles once."""
    return _train_step(config_of(recipe, config), recipe, jax.config.jax_enable_x64)


@functools.cache
def _first_state(config, recipe, x64):
    return init_state(make_plan(config, recipe), params_of(config))


def begin(recipe, config=CONFIG):
    """A new state. It is made once for each recipe and then copied, because a step donates the memory of its state."""
    state = _first_state(config_of(recipe, config), recipe, jax.config.jax_enable_x64)
    return jax.tree.map(lambda leaf: jax.device_put(jnp.array(leaf), leaf.sharding), state)


def run(recipe, batches, config=CONFIG):
    """Take one step for each batch. Return the last state and the metrics of each step as NumPy."""
    state, step, seen = begin(recipe, config), train_step(recipe, config), []
    for one in batches:
        state, metrics = step(state, one)
        seen.append(jax.tree.map(np.asarray, metrics))
    return state, seen


def flat(params) -> dict[str, np.ndarray]:
    """{"h0/attn/c_attn/w": NumPy array}, copied."""
    return {name: np.array(leaf) for name, leaf in forms.leaves(params).items()}


def bits(tree) -> list[bytes]:
    """The bytes of every array of a tree."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def furthest(ours, theirs, but=None) -> float:
    """The largest difference between two flat models, without the parameters whose names match `but`."""
    assert ours.keys() == theirs.keys()
    return max(np.abs(ours[name] - theirs[name]).max() for name in ours if not (but and but.search(name)))


# ---- the reference in NumPy


def learning_rate(recipe, step):
    """The rate at step 0, 1, ...: up to the peak at the last warmup step, then down to final_fraction at the last."""
    o = recipe.optimizer
    if step < o.warmup_steps:
        return o.learning_rate * (step + 1) / o.warmup_steps
    peak = max(o.warmup_steps - 1, 0)
    progress = (step - peak) / (recipe.steps - 1 - peak)
    left = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}[o.schedule]
    return o.learning_rate * (left if o.schedule == "constant" else o.final_fraction + (1 - o.final_fraction) * left)


def plain_loss(config, params, batch):
    """The mean nats of the targets in the loss, from all logits at once."""
    tokens, targets, weights = (
        leaf.reshape(-1, leaf.shape[-1]) for leaf in (batch.tokens, batch.targets, batch.weights)
    )
    log_p = jax.nn.log_softmax(gpt2_jax.GPT2(config).apply({"params": params}, tokens).logits)
    nats = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return (nats * weights).sum() / weights.sum()


@functools.partial(jax.jit, static_argnums=0)
def plain_gradients(config, params, batch):
    """The loss and its gradient with respect to every parameter."""
    return jax.value_and_grad(plain_loss, argnums=1)(config, params, batch)


def factor(rules, name):
    """The value of the first rule whose pattern is found in the name."""
    return next(value for pattern, value in rules if re.search(pattern, name))


class Slow:
    """A NumPy optimizer written from its definition, for a flat model. `step` changes the model in place."""

    def __init__(self, o, weights):
        self.o, self.n_steps = o, 0
        self.weights = {name: np.array(w) for name, w in weights.items()}
        self.m = {name: np.zeros_like(w) for name, w in weights.items()}
        self.v = {name: np.zeros_like(w) for name, w in weights.items()}

    def step(self, gradients, learning_rate):
        """Take one step. Return the gradient norm of the trained parameters before clipping."""
        o, self.n_steps = self.o, self.n_steps + 1
        rates = {name: learning_rate * factor(o.learning_rates, name) for name in self.weights}
        trained = [name for name in self.weights if factor(o.learning_rates, name) != 0]
        norm = np.sqrt(sum((np.asarray(gradients[name]) ** 2).sum() for name in trained))
        scale = o.clip / norm if 0 < o.clip < norm else 1.0
        for name in trained:
            w = self.weights[name]
            update = self.direction(name, np.asarray(gradients[name]) * scale)
            w -= rates[name] * (update + o.weight_decay * factor(o.decay, name) * w)
        return norm

    def direction(self, name, g):
        """The update without weight decay, to be multiplied by the learning rate."""
        m, v, (b1, b2) = self.m[name], self.v[name], self.o.betas
        if self.o.name == "sgd":
            m[...] = self.o.momentum * m + g
            return m
        if self.o.name == "lion":
            sign = np.sign(b1 * m + (1 - b1) * g)
            m[...] = b2 * m + (1 - b2) * g
            return sign
        m[...] = b1 * m + (1 - b1) * g
        v[...] = b2 * v + (1 - b2) * g**2
        return m / (1 - b1**self.n_steps) / (np.sqrt(v / (1 - b2**self.n_steps)) + self.o.epsilon)


def slow_run(recipe, batches, rates, config=CONFIG):
    """`run` in NumPy, with the given learning rate at each step. Return flat weights, losses and norms."""
    config = config_of(recipe, config)
    slow = Slow(recipe.optimizer, flat(params_of(config)))
    losses, norms = [], []
    for one, rate in zip(batches, rates, strict=True):
        loss, gradients = plain_gradients(config, forms.nested(slow.weights), one)
        norms.append(slow.step(flat(gradients), rate))
        losses.append(float(loss))
    return slow.weights, losses, norms


# ---- compiled, but not run


def compiled(recipe, config):
    """The compiled step for windows of n_ctx tokens. No state is created."""
    plan = make_plan(config_of(recipe, config), recipe)
    shape = (recipe.accumulate, recipe.batch_size // recipe.accumulate, plan.n_tokens)
    one = Batch(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)))
    return make_train_step(plan).lower(plan.state, one).compile()


def temporary(program) -> int:
    """The bytes that a compiled step needs in addition to its inputs and outputs."""
    return program.memory_analysis().temp_size_in_bytes
