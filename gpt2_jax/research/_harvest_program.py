"""The compiled programs that return the activations of a batch.

Shape letters: B batch, T query.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.activations import layer_of
from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.devices import on_devices
from gpt2_jax.generation.memory import is_out_of_memory
from gpt2_jax.model import GPT2
from gpt2_jax.params import Params
from gpt2_jax.research._harvest_plan import Batch, Plan
from gpt2_jax.sharding import DATA, axis_size, platform

TOKENS_PER_CALL = {"cpu": 1024}  # padding included; more do not fit a CPU's caches
TOKENS_PER_CALL_ELSEWHERE = 16384
BYTES_PER_CALL = 2**29  # of activations; those of two calls exist at a time


class Program:
    """The compiled programs, one for each length.

    Attributes:
      described: what their results depend on, for the manifest.
    """

    def __init__(self, config: GPT2Config, params: Params, names: tuple[str, ...], dtype: np.dtype, row_bytes: int):
        self.model, self.params = on_devices(config, params, edited=True)
        self.names, self.dtype = names, dtype
        layers = [layer_of(name) for name in names]
        self.stop = max(-1 if layer is None else layer for layer in layers) + 1  # XLA prunes what else is not needed
        if any(name.startswith("ln_f/") for name in names):
            self.stop = None
        self.n_devices = axis_size(self.model.mesh, DATA)
        tokens_per_call = TOKENS_PER_CALL.get(platform(self.params), TOKENS_PER_CALL_ELSEWHERE)
        self.tokens_per_call = min(tokens_per_call, max(1, BYTES_PER_CALL // row_bytes))
        device = next(iter(jax.tree.leaves(self.params)[0].devices()))
        self.described = {
            "dtype": str(config.compute_dtype),
            "param_dtype": str(config.param_dtype),
            "device": device.device_kind,
            "mesh": None if self.model.mesh is None else dict(self.model.mesh.shape),
            "tokens_per_call": self.tokens_per_call,
            "jax": jax.__version__,
        }

    def start(self, plan: Plan, batch: Batch) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Start a batch: return the values [B, T, ...] and whether they are finite [B], while they are computed."""
        tokens_BT = np.zeros((batch.n_rows, batch.n_tokens), np.int32)
        length_B = np.zeros(batch.n_rows, np.int32)
        length_B[: len(batch.windows)] = plan.length_W[batch.windows]
        for b, w in enumerate(batch.windows):
            tokens_BT[b, : length_B[b]] = plan.id_N[plan.offset_W[w] :][: length_B[b]]
        with memory_told(batch):
            results = _captured(self.model, self.names, self.stop, self.dtype, self.params, tokens_BT, length_B)
            for array in jax.tree.leaves(results):
                array.copy_to_host_async()
        return results


@functools.partial(jax.jit, static_argnames=("model", "names", "stop", "dtype"))
def _captured(
    model: GPT2,
    names: tuple[str, ...],
    stop: int | None,
    dtype: np.dtype,
    params: Params,
    tokens_BT: jax.Array,
    length_B: jax.Array,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Return the activations as they are stored, and whether all those of a row's real tokens are finite."""
    mask_BT = jnp.arange(tokens_BT.shape[1]) < length_B[:, None]
    how = {"right_padded": True, "capture": names, "stop_at_layer": stop, "method": "run"}
    captured = model.apply({"params": params}, tokens_BT, mask_BT, **how)[2]
    captured = {name: value.astype(dtype) for name, value in captured.items()}
    finite = {}
    for name, value in captured.items():
        finite_BT = jnp.isfinite(value).all(axis=range(2, value.ndim))
        finite[name] = (finite_BT | ~mask_BT).all(axis=1)
    return captured, finite


@contextlib.contextmanager
def memory_told(batch: Batch) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"not enough memory to capture activations of {batch.n_rows} texts of {batch.n_tokens} tokens together: "
            "capture fewer activations, or use bfloat16"
        ) from error
