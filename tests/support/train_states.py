"""Small training states of every optimizer, with prime sizes and without any training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpt2_jax.params import flatten, unflatten
from gpt2_jax.training.step import TrainState

SHAPES = {"wte": (37, 8), "wpe": (41, 8), "h0/attn/c_attn/w": (8, 24), "h0/ln_1/g": (8,), "ln_f/b": (8,)}
OPTIMIZERS = {
    "adamw": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mask=lambda flat: decayed(flat))),
    "sgd": lambda: optax.chain(optax.masked(optax.add_decayed_weights(0.1), decayed), optax.sgd(0.1, momentum=0.9)),
    "lion": lambda: optax.lion(optax.cosine_decay_schedule(1e-4, 100)),
    "adafactor": lambda: optax.adafactor(1e-3, min_dim_size_to_factor=5),
    "partitioned": lambda: optax.partition(
        {"trained": optax.adamw(1e-3), "frozen": optax.set_to_zero()},
        lambda flat: {name: "frozen" if name == "wte" else "trained" for name in flat},
    ),
}


def decayed(flat):
    return {name: len(leaf.shape) > 1 for name, leaf in flat.items()}


def random_state(seed: int, optimizer: str = "adamw", lora: int = 0, shapes=SHAPES) -> TrainState:
    """A state with random numbers. `lora` is the rank of LoRA's matrices for c_attn."""
    flat = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    pairs = None
    if lora:
        pairs = {"h0/attn/c_attn/w": {"a": jnp.zeros((8, lora)), "b": jnp.zeros((lora, 24))}}
    opt_state = OPTIMIZERS[optimizer]().init(flatten(pairs) if lora else flat)
    state = TrainState(jnp.int32(0), unflatten(flat), pairs, opt_state, jnp.float32(0))
    rng = np.random.default_rng(seed)

    def fill(leaf):
        whole = jnp.issubdtype(leaf.dtype, jnp.integer)
        values = rng.integers(0, 2**31, leaf.shape) if whole else rng.normal(size=leaf.shape)
        return jnp.asarray(np.asarray(values, leaf.dtype))

    return jax.tree.map(fill, state)


def abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def on_mesh(state, n_devices: int):
    """The state on this number of devices. The last axis that it divides is sharded."""
    mesh = jax.make_mesh((n_devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(leaf):
        spec = [None] * leaf.ndim
        for axis in reversed(range(leaf.ndim)):
            if leaf.shape[axis] % n_devices == 0:
                spec[axis] = "data"
                break
        return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*spec)))

    return jax.tree.map(place, state)


def assert_same(found, expected):
    """Check that types, dtypes and bits are the same."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    paths = [path for path, _ in jax.tree.leaves_with_path(expected)]
    for path, other, leaf in zip(paths, jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert other.dtype == leaf.dtype, path
        assert np.asarray(other).tobytes() == np.asarray(leaf).tobytes(), path
