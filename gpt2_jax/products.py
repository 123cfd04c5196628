"""Products with a weight. Sums of 16-bit numbers are rounded once. The highest precision sums in blocks.

- 16-bit numbers: if XLA is asked for a 16-bit result, it may round each term before it adds it, depending on the number
  of rows and the device. So products are asked for in float32, and rounded afterwards.
- The highest precision: on a CPU, XLA adds the terms of a sum one after another. Each addition rounds to the precision
  of the sum so far. So one long sum loses digits that a sum of short sums keeps.

Shape letters: T rows, K the summed axis, M columns, C terms of a block, P parts of a sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

BLOCK = 128  # terms that are summed one after another under the highest precision
HIGHEST = ("highest", "float32")  # JAX's two names for one precision
PARTS = 16  # of the sums of one row in 16 bits on a GPU; XLA divides those of 2 to 8 rows in the same way


def product(
    x: jax.Array, w: jax.Array, transposed: bool = False, dtype: jax.typing.DTypeLike | None = None
) -> jax.Array:
    """Return x @ w. On a CPU, float32 under the highest precision is summed in blocks of BLOCK rows of w.

    Terms of bfloat16 and float16 are added in float32, and the sum is rounded once, for any number of rows.

    `jax.default_matmul_precision("highest")` selects this; "float32" is another name for the same precision. The
    root-mean-square error over 768 terms on a CPU is 3.7e-7 for a plain product and 2.1e-7 in blocks (PyTorch:
    2.5e-7). The products of its gradients are summed in blocks too. A forward pass of the 124M shape takes 1.15 times
    as long, a pass with gradients 1.4 times, and a pass of 9 tokens, which is bound by memory, about 3 times.

    Args:
      x: [..., K].
      w: [K, M].
      transposed: w is [M, K] instead.
      dtype: dtype of the result; None means that of x and w.
    """
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    asked = precision in HIGHEST and jax.default_backend() == "cpu"
    if x.dtype.itemsize == 2 and dtype is None and not transposed:
        return _rounded_once(x, w)
    x_TK = x.reshape(-1, x.shape[-1])
    if asked and x.dtype == jnp.float32:
        y_TM = _in_blocks(x_TK, w.T if transposed else w)
    else:
        y_TM = jnp.einsum("TK,MK->TM" if transposed else "TK,KM->TM", x_TK, w, preferred_element_type=dtype)
    return y_TM.reshape(*x.shape[:-1], -1)


@jax.custom_jvp
def _rounded_once(x: jax.Array, w_KM: jax.Array) -> jax.Array:
    """Return x @ w for 16-bit numbers, added in float32.

    x keeps its shape [..., K]. As [T, K], the training step of 124M on a TPU would take 12 % more memory.
    """
    if x.size == x.shape[-1] and x.size % PARTS == 0:
        return lax.platform_dependent(x, w_KM, cuda=_in_parts, rocm=_in_parts, default=_added_in_float32)
    return _added_in_float32(x, w_KM)


def _added_in_float32(x: jax.Array, w_KM: jax.Array) -> jax.Array:
    return jnp.matmul(x, w_KM, preferred_element_type=jnp.float32).astype(x.dtype)


def _in_parts(x: jax.Array, w_KM: jax.Array) -> jax.Array:
    """Return the product of one row, as PARTS sums that are added at the end.

    Without this, XLA for GPUs makes two kernels of most such products. The first one writes every term to memory: three
    to five times the bytes of w. Without the barrier, XLA would join the two sums again.
    """
    x_PK, w_PKM = x.reshape(PARTS, -1), w_KM.reshape(PARTS, -1, w_KM.shape[1])
    y_PM = lax.optimization_barrier(jnp.einsum("PK,PKM->PM", x_PK, w_PKM, preferred_element_type=jnp.float32))
    return y_PM.sum(0).astype(x.dtype).reshape(*x.shape[:-1], -1)


@functools.partial(_rounded_once.defjvp, symbolic_zeros=True)
def _tangents_in_16_bits(primals, tangents):
    """Return the product and its tangent, whose products take and return 16-bit numbers.

    The transpose of a product that returns float32 would take float32, which GPUs and TPUs multiply several times more
    slowly.
    """
    (x, w_KM), (dx, dw_KM) = primals, tangents
    return _rounded_once(x, w_KM), _sum_of_known(dx, dw_KM, lambda: dx @ w_KM, lambda: x @ dw_KM)


@jax.custom_jvp
def _in_blocks(x_TK: jax.Array, w_KM: jax.Array) -> jax.Array:
    n_blocks = len(w_KM) // BLOCK
    rest = n_blocks * BLOCK
    if not n_blocks:
        return x_TK @ w_KM

    def add(i: jax.Array, sum_TM: jax.Array) -> jax.Array:
        x_TC = lax.dynamic_slice_in_dim(x_TK, i * BLOCK, BLOCK, axis=1)
        return sum_TM + x_TC @ lax.dynamic_slice_in_dim(w_KM, i * BLOCK, BLOCK)

    return lax.fori_loop(0, n_blocks, add, x_TK[:, rest:] @ w_KM[rest:])


@functools.partial(_in_blocks.defjvp, symbolic_zeros=True)
def _tangents(primals, tangents):
    (x_TK, w_KM), (dx_TK, dw_KM) = primals, tangents
    by_x, by_w = lambda: _by_columns(dx_TK, w_KM), lambda: _by_columns(dw_KM.T, x_TK.T).T
    return _in_blocks(x_TK, w_KM), _sum_of_known(dx_TK, dw_KM, by_x, by_w)


def _sum_of_known(dx, dw_KM, by_x: Callable[[], jax.Array], by_w: Callable[[], jax.Array]) -> jax.Array:
    """Return the sum of the parts of a tangent, without a part whose own tangent is zero by its structure."""
    parts = [part() for d, part in ((dx, by_x), (dw_KM, by_w)) if not isinstance(d, SymbolicZero)]
    return functools.reduce(jnp.add, parts)


def _by_columns(x_TK: jax.Array, w_KM: jax.Array) -> jax.Array:
    """Return x @ w. Its transpose with respect to x is a sum over the columns of w, and runs in blocks of columns."""
    n_blocks = w_KM.shape[1] // BLOCK
    rest = n_blocks * BLOCK
    if not n_blocks:
        return x_TK @ w_KM
    w_bKC = jnp.moveaxis(w_KM[:, :rest].reshape(len(w_KM), n_blocks, BLOCK), 1, 0)
    y_bTC = lax.map(lambda w_KC: x_TK @ w_KC, w_bKC)
    return jnp.concatenate([jnp.moveaxis(y_bTC, 0, 1).reshape(len(x_TK), rest), x_TK @ w_KM[:, rest:]], axis=1)
