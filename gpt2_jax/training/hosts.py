"""What `fit` does otherwise if several processes train one model. With one process, nothing here runs.

Every process reads the same batches and runs the same programs on the same mesh. See `gpt2_jax.processes`.
"""

from __future__ import annotations

import signal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from gpt2_jax import processes
from gpt2_jax.params import Params, flatten, unflatten
from gpt2_jax.sharding import DATA, MODEL, param_shardings
from gpt2_jax.training.signals import Stop


def put(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """Put an array that every process holds in full on the devices of all processes. Nothing is sent between them."""
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def gathered(params: Params) -> Params:
    """Return params as NumPy arrays in process 0, and an empty dict in the others. All must call this.

    Tensors are gathered one after the other. Each device holds one in full for a moment.
    """
    from jax.experimental import multihost_utils

    flat = {}
    for name, leaf in flatten(params).items():
        whole = multihost_utils.process_allgather(leaf, tiled=True)
        if processes.is_first():
            flat[name] = np.asarray(whole)
    return unflatten(flat)


def on_own_devices(params: Params, mesh: Mesh) -> Params:
    """Return params on the devices of this process that are in a mesh. They are divided along `model` alone."""
    flat = flatten(params)
    shardings = param_shardings(flat, own_mesh(mesh), gathered=(DATA,))
    return unflatten({name: jax.device_put(leaf, shardings[name]) for name, leaf in flat.items()})


def own_mesh(mesh: Mesh) -> Mesh:
    """Return the devices of this process that are in a mesh, as its part of it, or else all along `model`."""
    try:
        return mesh.local_mesh
    except ValueError:  # on the torus of a TPU pod, they may be no rectangle of the mesh
        return Mesh(np.array(mesh.local_devices).reshape(1, -1), (DATA, MODEL))


class CommonStop(Stop):
    """A `Stop` of all processes together: a signal to one of them stops all after the same step.

    Args:
      mesh: the devices of the run; every process has some of them.
    """

    def __init__(self, mesh: Mesh):
        super().__init__()
        self._own = 0  # the number of the signal that came to this process
        self._asked: jax.Array | None = None
        self._shape, self._sharding = (mesh.size,), NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def agree(self) -> None:
        """Ask all processes for their signals. Take over the answer to the question before, which has arrived."""
        answer = self._asked
        self._asked = self._largest(put(np.full(self._shape, self._own, np.int32), self._sharding))
        if answer is not None and (number := int(answer)) and self.signal is None:
            self.signal = signal.Signals(number).name

    def _note(self, number: int, _frame: object) -> None:
        if self._own and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._own = self._own or number
