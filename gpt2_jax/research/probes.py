"""Linear probes: what a linear classifier or a linear regression reads from activations, scored on held-out examples.

A classifier is logistic regression with an L2 penalty, a regression is ridge regression (Alain and Bengio 2016,
"Understanding intermediate layers using linear classifier probes"; Hoerl and Kennard 1970). A probe that scores well
shows that a linear map can read the label, not that the model reads it. To test that, erase it (`leace`) or edit it.

Shape letters: n examples, D width of the activations, C classes, K logits of an example (1 for two classes, else C), F
folds.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.core import Tracer
from jax.scipy.linalg import solve_triangular

from gpt2_jax.checks import real_number, whole_number
from gpt2_jax.explicit_axes import whole_on_auto_axes
from gpt2_jax.jax_defaults import under_jax_defaults
from gpt2_jax.research.trees import module_of

NEWTON_STEPS, CG_STEPS = 100, 200
LENGTHS = (1.0, 0.5, 0.25, 0.1, 0.03, 0.01)  # of a Newton step
TOLERANCE = 1e-24  # of what a Newton step gains, in nats per example


@struct.dataclass
class Probe:
    """Linear probes of one label, one for each activation. Leading axes are the activations': [L] for [L, n, D].

    Attributes:
      names: the names of the activations, if they were a dict: the L entries of the leading axis.
      classes: the C classes in the order of the logits; None if labels are numbers.
      weights: [..., D, K], fitted to all examples. They act on the activations as they are, so
        `x @ weights + bias` is the prediction of a number, or the logits. For two classes it is the log-odds of the
        second: then `weights[..., 0]` is the direction from the first class to the second.
      bias: [..., K].
      scores: [...], the mean of the fold scores.
      fold_scores: [..., F]: the accuracy on each fold, for numbers R^2, of the probe that is fitted to the other folds.
      chance: the accuracy of the constant prediction that is best on the other folds, mean over folds; 0 for R^2.
      held_out: [..., n, K], the prediction or logits of each example by the probe that has not seen its fold.
      folds: [n], the fold of each example.
      converged: [...], False where an optimization stopped at the limit of steps. A larger l2 helps.
    """

    names: tuple[str, ...] | None = struct.field(pytree_node=False)
    classes: tuple[int, ...] | None = struct.field(pytree_node=False)
    weights: jax.Array
    bias: jax.Array
    scores: jax.Array
    fold_scores: jax.Array
    chance: float
    held_out: jax.Array
    folds: Any
    converged: jax.Array


@under_jax_defaults
@whole_on_auto_axes
def linear_probe(
    activations: Any,
    labels: Any,
    *,
    groups: Any = None,
    folds: int | Sequence[int] = 5,
    l2: float = 1.0,
    standardize: bool = True,
    seed: int = 0,
) -> Probe:
    """Fit a linear probe to each activation, and score it by cross-validation. One compiled program fits all of them.

    It minimizes the sum over examples of the cross-entropy in nats, or of half the squared error, plus
    `l2 / 2 * sum(weights**2)`. The bias is not penalized. So l2 is 1 / C of scikit-learn's LogisticRegression, and
    alpha of its Ridge. Classification is solved by Newton's method, regression in closed form. Both compute in float64,
    one activation at a time: float32 is not enough where classes are separable, as they are for n < D.

    Args:
      activations: [..., n, D], such as [L, n, D] for L layers or [L, P, n, D] for layers and positions, or
        {name: [..., n, D]}.
      labels: [n]: a class of each example (integers or bools), or a number (floats).
      groups: [n], integers. Examples of one group, such as the tokens of one text, are never in two folds. None means
        that each example is a group of its own; then each fold has about the same share of each class.
      folds: the number of folds, into which examples or groups are drawn at random; or the fold of each example, [n].
      l2: the weight of the penalty, above 0.
      standardize: True divides each of the D channels by its standard deviation over the examples that are fitted,
        so that the penalty treats all channels alike. The weights that are returned act on the activations as they are.
      seed: of the random folds.

    Raises:
      ValueError: shapes or dtypes do not fit, a value is not finite, there are fewer than 2 folds or fewer groups than
        folds, all labels are the same, all examples of a class are in one fold, or the activations are traced.
    """
    names = tuple(activations) if isinstance(activations, Mapping) else None
    x = _stacked(activations)
    y_n, classes = _labels(labels, x.shape[-2])
    fold_n = _folds(y_n, classes, groups, folds, seed)
    n_folds = int(fold_n.max()) + 1
    fitted_Fn = np.concatenate([fold_n != np.arange(n_folds)[:, None], np.ones((1, len(y_n)), bool)])
    _check_folds(y_n, classes, fitted_Fn[:-1])
    l2 = real_number("l2", l2, 0, open_low=True)
    n_classes = 0 if classes is None else len(classes)
    dtype = jax.dtypes.canonicalize_dtype(jnp.promote_types(x.dtype, jnp.float32))
    with jax.enable_x64(True):
        found = _fit(n_classes, standardize, dtype, x, y_n, fitted_Fn, fold_n, np.float64(l2))
    chance = np.mean([_constant(y_n, fitted_n) for fitted_n in fitted_Fn[:-1]]) if n_classes else 0.0
    return Probe(names=names, classes=classes, chance=float(chance), folds=fold_n, **found)


def _stacked(activations: Any) -> Any:
    """Return activations [..., n, D]."""
    if isinstance(activations, Mapping):
        shapes = {name: list(np.shape(x)) for name, x in activations.items()}
        if len({tuple(shape) for shape in shapes.values()}) != 1:
            raise ValueError(f"the activations of one call must have one shape: they are {shapes}")
        activations = module_of(*activations.values()).stack(list(activations.values()))
    x = activations if isinstance(activations, np.ndarray) else jnp.asarray(activations)
    if x.ndim < 2 or x.size == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"activations must be floats [..., n, D], not {x.dtype}{list(x.shape)}")
    if isinstance(x, Tracer):
        raise ValueError("linear_probe runs its own program in float64: call it outside of jit, vmap and grad")
    if not jnp.isfinite(x).all():
        raise ValueError("activations must be finite numbers")
    return x


def _labels(labels: Any, n: int) -> tuple[np.ndarray, tuple[int, ...] | None]:
    """Return labels [n], as indices of the classes if they are classes, and the classes."""
    y_n = np.asarray(labels)
    numbers = jnp.issubdtype(y_n.dtype, jnp.floating)
    if y_n.shape != (n,) or not (numbers or y_n.dtype == bool or np.issubdtype(y_n.dtype, np.integer)):
        raise ValueError(f"labels must be integers, bools or floats [{n}], not {y_n.dtype}{list(y_n.shape)}")
    if (y_n == y_n[0]).all():
        raise ValueError(f"all {n} labels are the same")
    if not numbers:
        classes, index_n = np.unique(y_n, return_inverse=True)
        return index_n.astype(np.int32), tuple(classes.tolist())
    if not np.isfinite(y_n).all():
        raise ValueError("labels must be finite numbers")
    return y_n, None


def _folds(y_n: np.ndarray, classes: Any, groups: Any, folds: int | Sequence[int], seed: int) -> np.ndarray:
    """Return the fold of each example, int32 [n]."""
    n, rng = len(y_n), np.random.default_rng(seed)
    if np.ndim(folds):
        fold_n = np.asarray(folds)
        if fold_n.shape != (n,) or not np.issubdtype(fold_n.dtype, np.integer):
            raise ValueError(
                f"folds must be a number of folds, or whole numbers [{n}], not {fold_n.dtype}{list(fold_n.shape)}"
            )
        found, fold_n = np.unique(fold_n, return_inverse=True)
        whole_number("the number of folds", len(found), 2)
        if groups is not None:
            raise ValueError("groups serve to draw folds: pass either groups or the fold of each example")
        return fold_n.astype(np.int32)
    n_folds = whole_number("folds", folds, 2, n)
    if groups is not None:
        group_n = np.asarray(groups)
        if group_n.shape != (n,) or not np.issubdtype(group_n.dtype, np.integer):
            raise ValueError(f"groups must be whole numbers [{n}], not {group_n.dtype}{list(group_n.shape)}")
        return _group_folds(group_n, n_folds, rng)
    order = rng.permutation(n)
    order = order if classes is None else order[np.argsort(y_n[order], kind="stable")]
    fold_n = np.empty(n, np.int32)
    fold_n[order] = np.arange(n) % n_folds
    return fold_n


def _group_folds(group_n: np.ndarray, n_folds: int, rng: np.random.Generator) -> np.ndarray:
    """Return the fold of each example, int32 [n]: no group is divided, and folds have about the same size."""
    _, index_n, sizes = np.unique(group_n, return_inverse=True, return_counts=True)
    whole_number("folds", n_folds, 2, len(sizes))
    order = rng.permutation(len(sizes))
    fold_of, filled = np.empty(len(sizes), np.int32), np.zeros(n_folds, int)
    for group in order[np.argsort(-sizes[order], kind="stable")]:  # the largest groups first, into the emptiest fold
        fold_of[group] = filled.argmin()
        filled[fold_of[group]] += sizes[group]
    return fold_of[index_n]


def _check_folds(y_n: np.ndarray, classes: Any, fitted_Fn: np.ndarray) -> None:
    for f, fitted_n in enumerate(fitted_Fn):
        if classes is not None and (missing := set(range(len(classes))) - set(y_n[fitted_n].tolist())):
            raise ValueError(f"all examples of class {classes[missing.pop()]} are in fold {f}: take fewer folds")
        if classes is None and np.ptp(y_n[~fitted_n]) == 0:
            raise ValueError(f"the labels in fold {f} are all the same, so R^2 is not defined: take fewer folds")


def _constant(y_n: np.ndarray, fitted_n: np.ndarray) -> float:
    """Return the accuracy, on the other examples, of the class that is most frequent in the fitted ones."""
    return float((y_n[~fitted_n] == np.bincount(y_n[fitted_n]).argmax()).mean())


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fit(
    n_classes: int,
    standardize: bool,
    dtype: np.dtype,
    x: jax.Array,
    y_n: jax.Array,
    fitted_Fn: jax.Array,
    fold_n: jax.Array,
    l2: jax.Array,
) -> dict[str, jax.Array]:
    """Fit probes to each activation and each set of examples. The last set is all examples."""

    def one(x_nD: jax.Array) -> dict[str, jax.Array]:
        x_nD = x_nD.astype(jnp.float64)
        mean_D = x_nD.mean(0)
        x_nD = x_nD - mean_D
        probe = functools.partial(_probe, n_classes, standardize, x_nD, y_n, l2)
        weights_FDK, bias_FK, converged_F = jax.vmap(probe)(fitted_Fn)
        held_nK = jnp.einsum("nD,FDK->FnK", x_nD, weights_FDK) + bias_FK[:, None]
        held_nK = held_nK[fold_n, jnp.arange(len(fold_n))]
        scores_F = _scores(n_classes, held_nK, y_n, ~fitted_Fn[:-1])
        return {
            "weights": weights_FDK[-1],
            "bias": bias_FK[-1] - mean_D @ weights_FDK[-1],
            "scores": scores_F.mean(),
            "fold_scores": scores_F,
            "held_out": held_nK,
            "converged": converged_F.all(),
        }

    with jax.default_matmul_precision("highest"):
        found = jax.lax.map(one, x.reshape(-1, *x.shape[-2:]))
    found = {name: value.reshape(*x.shape[:-2], *value.shape[1:]) for name, value in found.items()}
    return {name: value if value.dtype == bool else value.astype(dtype) for name, value in found.items()}


def _scores(n_classes: int, held_nK: jax.Array, y_n: jax.Array, held_Fn: jax.Array) -> jax.Array:
    """Return the accuracy or R^2 on each fold."""
    count_F = held_Fn.sum(-1)
    if n_classes:
        return ((_logits(held_nK).argmax(-1) == y_n) & held_Fn).sum(-1) / count_F
    y_n = y_n.astype(held_nK.dtype)
    mean_F1 = jnp.where(held_Fn, y_n, 0).sum(-1, keepdims=True) / count_F[:, None]
    total_F = jnp.where(held_Fn, jnp.square(y_n - mean_F1), 0).sum(-1)
    return 1 - jnp.where(held_Fn, jnp.square(y_n - held_nK[:, 0]), 0).sum(-1) / total_F


def _probe(
    n_classes: int, standardize: bool, x_nD: jax.Array, y_n: jax.Array, l2: jax.Array, fitted_n: jax.Array
) -> tuple[Any, Any, Any]:
    """Fit one probe to the examples in `fitted_n`. Return its weights [D, K], bias [K], and whether it converged.

    It works with z = (x - mean) / scale of these examples, without computing z.
    """
    share_n = fitted_n / fitted_n.sum()  # so all sums below are means over the fitted examples
    share_n, l2 = share_n.astype(x_nD.dtype), l2 / fitted_n.sum()
    mean_D = share_n @ x_nD
    cov_DD = (x_nD - mean_D).T @ (share_n[:, None] * (x_nD - mean_D))
    variance_D = jnp.diagonal(cov_DD)
    # A channel that is constant in the fitted examples may differ in the others. Its variance is only rounding.
    rounding_D = jnp.square(len(x_nD) * jnp.finfo(x_nD.dtype).eps * mean_D)
    varies_D = variance_D > rounding_D
    scale_D = jnp.where(varies_D, jnp.sqrt(variance_D), 1) if standardize else jnp.ones_like(variance_D)
    cov_DD = cov_DD / scale_D / scale_D[:, None]
    solve = _regression if n_classes == 0 else functools.partial(_classification, n_classes)
    w_DK, bias_K, converged = solve(x_nD, y_n, share_n, mean_D, scale_D, cov_DD, l2)
    w_DK = w_DK / scale_D[:, None]
    return w_DK, bias_K - mean_D @ w_DK, converged


def _regression(x_nD, y_n, share_n, mean_D, scale_D, cov_DD, l2):
    y_n = y_n.astype(x_nD.dtype)
    y_mean = share_n @ y_n
    cross_D = ((share_n * (y_n - y_mean)) @ (x_nD - mean_D)) / scale_D
    factor = jax.scipy.linalg.cho_factor(cov_DD + l2 * jnp.eye(len(cov_DD), dtype=x_nD.dtype))
    return jax.scipy.linalg.cho_solve(factor, cross_D)[:, None], y_mean[None], jnp.bool_(True)


def _classification(n_classes, x_nD, y_n, share_n, mean_D, scale_D, cov_DD, l2):
    """Minimize the loss by Newton's method, in coordinates u in which all curvatures are at most about 1.

    The curvature of the cross-entropy is at most that of cov_DD / 2 (Böhning 1992), which `to_w` makes the identity.
    Conjugate gradients solve each Newton step. The best of its lengths is taken: logits are linear in the length.
    """
    n_logits = 1 if n_classes == 2 else n_classes
    factor_DD = jnp.linalg.cholesky(cov_DD / 2 + l2 * jnp.eye(len(cov_DD), dtype=x_nD.dtype))
    to_w_DD = solve_triangular(factor_DD, jnp.eye(len(cov_DD), dtype=x_nD.dtype), lower=True, trans="T")

    def predict(u):
        w_DK = to_w_DD @ u["w"]
        scaled_DK = w_DK / scale_D[:, None]
        return w_DK, x_nD @ scaled_DK - mean_D @ scaled_DK + u["bias"]

    def cost(w_DK, logits_nK):
        losses_n = optax.softmax_cross_entropy_with_integer_labels(_logits(logits_nK), y_n)
        return share_n @ losses_n + l2 / 2 * jnp.square(w_DK).sum()

    def step(carry):
        u, i, _ = carry
        slope, curve = jax.linearize(jax.grad(lambda u: cost(*predict(u))), u)
        change, _ = jax.scipy.sparse.linalg.cg(curve, slope, tol=1e-3, maxiter=CG_STEPS)
        here, there = predict(u), predict(change)
        lengths = jnp.asarray(LENGTHS)  # all at once: with a loop here, XLA's CPU threads hung (jaxlib 0.10.2)
        costs = jax.vmap(lambda length: cost(*(a - length * b for a, b in zip(here, there, strict=True))))(lengths)
        length = lengths[jnp.argmin(costs)]
        return optax.tree.add_scale(u, -length, change), i + 1, optax.tree.vdot(change, slope)

    def goes_on(carry):
        return (carry[1] < NEWTON_STEPS) & (carry[2] > TOLERANCE)

    zero = {"w": jnp.zeros((len(cov_DD), n_logits), x_nD.dtype), "bias": jnp.zeros(n_logits, x_nD.dtype)}
    u, _, gain = jax.lax.while_loop(goes_on, step, (zero, 0, jnp.asarray(jnp.inf, x_nD.dtype)))
    return to_w_DD @ u["w"], u["bias"], jnp.asarray(gain) <= TOLERANCE


def _logits(logits_nK: jax.Array) -> jax.Array:
    """Return logits of all classes: one logit is that of the second of two classes, beside 0."""
    return jnp.pad(logits_nK, [(0, 0), (1, 0)]) if logits_nK.shape[-1] == 1 else logits_nK
