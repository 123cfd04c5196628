"""LEACE: erase a concept from activations, so that no linear classifier finds it, with the least change.

A concept is a label of each activation: a class, or one or more numbers. No linear classifier finds it better than a
constant does if, and only if, the covariance of activations and labels is 0 in each entry. Among the affine maps that
reach this, LEACE changes the activations least, in mean squared distance (Belrose et al. 2023, "LEACE: Perfect linear
concept erasure in closed form", theorems 3.1 and 4.2):

    x - (x - mean) @ W @ P @ pinv(W),

where W is the inverse square root of the activations' covariance (of its pseudoinverse, if it is singular), and P
projects on the columns of W @ (covariance of activations and labels).

Shape letters: n examples, D width of the activations, Z numbers of a label, K rank of what is erased.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gpt2_jax.jax_defaults import under_jax_defaults

CHUNK = 2**24  # numbers that are in float64 at a time: 128 MB


@struct.dataclass
class Eraser:
    """An affine map that erases a concept: `eraser(x)`. It is a pytree, and also a tap of one activation.

    Attributes:
      mean_D: the mean of the activations that it was fitted to.
      left_DK, right_KD: the factors of what is subtracted, (x - mean) @ left @ right. right @ left is the identity, so
        erasing twice is erasing once.
    """

    mean_D: jax.Array
    left_DK: jax.Array
    right_KD: jax.Array

    @under_jax_defaults
    def __call__(self, x: Any, position_BT: Any = None) -> jax.Array:
        """Return activations [..., D] without the concept, in their dtype. Sums are at least float32.

        `position_BT` is not used: it makes the eraser a tap, `taps={"h3/resid_post": eraser}`.

        Raises:
          ValueError: x is not D wide.
        """
        x, width = jnp.asarray(x), self.mean_D.shape[-1]
        if x.shape[-1:] != (width,):
            raise ValueError(f"the eraser takes activations [..., {width}], not {list(x.shape)}")
        with jax.default_matmul_precision("highest"):
            return (x - (x - self.mean_D) @ self.left_DK @ self.right_KD).astype(x.dtype)


@under_jax_defaults
def leace(activations: Any, labels: Any) -> Eraser:
    """Fit the eraser of a concept. The fit is in float64 on the host: it cannot be traced.

    After the eraser, all classes of the fitted activations have the same mean, and numbers have no covariance with
    them. In a model, use it where the activation is made: `taps={"h3/resid_post": eraser}`.

    Args:
      activations: [..., D]: one activation at several places, for example h3/resid_post [B, T, D], or [n, D].
      labels: for each place, a class (integers or bools, [...]), a number (floats, [...]), or Z numbers
        (floats, [..., Z]).

    Returns:
      The eraser. Its arrays are float32, or have the dtype of activations in float64.

    Raises:
      ValueError: shapes or dtypes do not fit, a value is not finite, there are less than two examples, or the labels
        are all the same.
    """
    x_nD, z_nZ = _examples(activations, labels)
    mean_D, cov_DD, cross_DZ = _covariances(x_nD, z_nZ)
    values_D, vectors_DD = np.linalg.eigh(cov_DD)
    kept = values_D > values_D.max() * len(values_D) * np.finfo(np.float64).eps
    roots, vectors = np.sqrt(values_D[kept]), vectors_DD[:, kept]  # W = vectors / roots @ vectors.T
    basis, sizes, _ = np.linalg.svd((vectors / roots).T @ cross_DZ, full_matrices=False)
    spread = np.sqrt(np.square(z_nZ - z_nZ.mean(0)).mean(0).max())  # no size is larger than this, up to a factor of Z
    basis = basis[:, sizes > spread * max(cross_DZ.shape) * np.finfo(np.float64).eps]
    dtype = np.float64 if np.asarray(activations).dtype == np.float64 else np.float32
    parts = mean_D, (vectors / roots) @ basis, basis.T @ (vectors * roots).T
    return Eraser(*(jnp.asarray(part.astype(dtype)) for part in parts))


def _examples(activations: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return activations [n, D] and labels as numbers [n, Z]: 1 or 0 for each class."""
    x, z = np.asarray(activations), np.asarray(labels)
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"activations must be floats [..., D], not {x.dtype}{list(x.shape)}")
    numbers = jnp.issubdtype(z.dtype, jnp.floating)
    if not (z.shape == x.shape[:-1] or (numbers and z.ndim == x.ndim and z.shape[:-1] == x.shape[:-1])):
        raise ValueError(f"labels must be {list(x.shape[:-1])} like the activations, not {list(z.shape)}")
    x_nD = x.reshape(-1, x.shape[-1])
    if numbers:
        z_nZ = z.reshape(len(x_nD), -1 if len(x_nD) else 1).astype(np.float64)
    elif z.dtype == bool or np.issubdtype(z.dtype, np.integer):
        z_nZ = (z.reshape(-1, 1) == np.unique(z)).astype(np.float64)
    else:
        raise ValueError(f"labels must be integers, bools or floats, not {z.dtype}")
    if len(x_nD) < 2 or (z_nZ == z_nZ[0]).all():
        raise ValueError(f"the labels of {len(x_nD)} examples are all the same: there is nothing to erase")
    if not np.isfinite(z_nZ).all():
        raise ValueError("labels must be finite numbers")
    return x_nD, z_nZ


def _covariances(x_nD: np.ndarray, z_nZ: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean [D], the covariance [D, D] and the covariance with the labels [D, Z], in float64."""
    (n, width), z_nZ = x_nD.shape, z_nZ - z_nZ.mean(0)
    step = max(1, CHUNK // width)
    chunks = [slice(i, i + step) for i in range(0, n, step)]
    mean_D = sum(x_nD[chunk].astype(np.float64).sum(0) for chunk in chunks) / n
    if not np.isfinite(mean_D).all():
        raise ValueError("activations must be finite numbers")
    cov_DD, cross_DZ = np.zeros((width, width)), np.zeros((width, z_nZ.shape[1]))
    for chunk in chunks:
        centered = x_nD[chunk].astype(np.float64) - mean_D
        cov_DD += centered.T @ centered / n
        cross_DZ += centered.T @ z_nZ[chunk] / n
    return mean_D, cov_DD, cross_DZ
