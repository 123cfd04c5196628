"""Circuits as factors are compared with the dense matrices in NumPy and with the heads of a forward pass."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from forward import CONFIG, some_tokens
from toy_induction import INDUCTION, PREVIOUS, induction_toy

from gpt2_jax.research import circuits
from gpt2_jax.research._forward import forward

HEADS = list(itertools.product(range(3), range(3)))
COMPOSED = {"q": lambda ov, qk, _: ov @ qk, "k": lambda ov, qk, _: ov @ qk.T, "v": lambda ov, _, ov2: ov @ ov2}


def dense(params, layer, head):
    """Return OV and QK, [D, D] in float64, from slices of the fused matrices."""
    attn = numpy_reference.as_float64(params)[f"h{layer}"]["attn"]
    columns = slice(7 * head, 7 * head + 7)
    q, k, v = (attn["c_attn"]["w"][:, 21 * i : 21 * i + 21][:, columns] for i in range(3))
    return v @ attn["c_proj"]["w"][columns], q @ k.T


def differ(ours, theirs):
    return np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize(("layer", "head"), HEADS)
def test_both_circuits_are_the_dense_products(params, layer, head):
    ov, qk = dense(params, layer, head)
    ours = circuits.ov_circuit(CONFIG, params, layer, head), circuits.qk_circuit(CONFIG, params, layer, head)
    for circuit, matrix in zip(ours, (ov, qk), strict=True):
        assert circuit.left.shape == (21, 7)
        assert circuit.right.shape == (7, 21)
        assert differ(circuit.dense(), matrix) < 2e-6  # measured: 2e-7
        assert differ(circuit.norm(), np.linalg.norm(matrix)) < 2e-6
        # Likely mistakes give very different results: the transposed matrix, the other circuit, another head.
        others = [matrix.T, *dense(params, layer, (head + 1) % 3), *dense(params, (layer + 1) % 3, head)]
        assert all(differ(circuit.dense(), other) > 0.5 for other in others)
    assert differ(ours[0].dense(), qk) > 0.5


def test_they_are_what_a_forward_pass_computes(params):
    """Scores are x @ QK @ y / sqrt(H), and the output is the sum over heads of pattern @ x @ OV, without biases."""
    params = jax.tree.map(np.array, params)
    for layer in range(3):
        for part in ("c_attn", "c_proj"):
            params[f"h{layer}"]["attn"][part]["b"][:] = 0
    _, captured = forward(CONFIG, params, some_tokens(CONFIG, 2, 11), capture=r"h1/(ln_1/out|attn)")
    x, pattern = (np.asarray(captured[f"h1/{name}"], np.float64) for name in ("ln_1/out", "attn/pattern"))
    visible, added = np.tri(11, dtype=bool), 0
    for head in range(3):
        scores = x @ circuits.qk_circuit(CONFIG, params, 1, head).dense() @ x.swapaxes(1, 2) / np.sqrt(7)
        assert differ(captured["h1/attn/scores"][:, head][:, visible], scores[:, visible]) < 2e-6  # measured: 2e-7
        added = added + pattern[:, head] @ x @ circuits.ov_circuit(CONFIG, params, 1, head).dense()
    assert differ(captured["h1/attn/out"], added) < 2e-6  # measured: 2e-7


def test_the_svd_is_that_of_the_dense_matrix(params):
    ov, _ = dense(params, 2, 1)
    u, s, v = circuits.ov_circuit(CONFIG, params, 2, 1).svd()
    assert (u.shape, s.shape, v.shape) == ((21, 7), (7,), (7, 21))
    assert differ(s, np.linalg.svd(ov)[1][:7]) < 2e-6  # measured: 2e-7
    assert differ(u * s @ v, ov) < 2e-6  # measured: 5e-7
    for vectors in (u.T, v):
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(7), rtol=0, atol=2e-6)  # measured: 6e-7
    assert differ(v.T * s @ u.T, ov) > 0.5  # the directions that are read and written differ


def test_many_matrices_are_taken_at_once(params):
    some = [circuits.qk_circuit(CONFIG, params, layer, head) for layer, head in HEADS]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *some)
    u, s, v = stacked.svd()
    assert differ(jnp.einsum("ndh,nh,nhe->nde", u, s, v), np.stack([dense(params, *head)[1] for head in HEADS])) < 2e-6
    assert differ(stacked.norm(), np.stack([np.asarray(one.norm()) for one in some])) < 1e-6


@pytest.mark.parametrize("kind", COMPOSED)
def test_composition_is_that_of_the_dense_matrices(params, kind):
    found = circuits.composition_scores(CONFIG, params, kind)
    expected = np.zeros((3, 3, 3, 3))
    for writer, reader in itertools.product(HEADS, HEADS):
        if writer[0] < reader[0]:
            ov, (ov2, qk) = dense(params, *writer)[0], dense(params, *reader)
            norms = np.linalg.norm(ov) * np.linalg.norm(ov2 if kind == "v" else qk)
            expected[(*writer, *reader)] = np.linalg.norm(COMPOSED[kind](ov, qk, ov2)) / norms
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # measured: 8e-8
    assert (np.asarray(found)[0, :, 1:] > 0.05).all()


def test_the_kinds_of_composition_are_not_each_other(params):
    found = [np.asarray(circuits.composition_scores(CONFIG, params, kind))[0, :, 1] for kind in "qkv"]
    assert all(np.abs(a - b).max() > 0.01 for a, b in itertools.combinations(found, 2))


def test_the_toys_heads_are_composed_through_keys_and_values():
    """The induction head reads the previous-token head's output: in its keys, and in its values."""
    config, params = induction_toy()
    for kind, composed in (("q", False), ("k", True), ("v", True)):
        found = np.array(circuits.composition_scores(config, params, kind))
        assert (found[(*PREVIOUS, *INDUCTION)] > 0.1) == composed
        found[(*PREVIOUS, *INDUCTION)] = 0
        assert (found == 0).all()


@pytest.mark.parametrize("ln_f", [False, True])
def test_copying_scores_are_from_the_eigenvalues_of_the_whole_circuit(params, ln_f):
    wide = numpy_reference.as_float64(params)
    unembed = through_ln_f(wide) if ln_f else wide["wte"]
    found = circuits.copying_scores(CONFIG, params, ln_f=ln_f)
    for layer, head in HEADS:
        eigenvalues = np.linalg.eigvals(wide["wte"] @ dense(params, layer, head)[0] @ unembed.T)  # [V, V]
        expected = eigenvalues.real.sum() / np.abs(eigenvalues).sum()
        np.testing.assert_allclose(found[layer, head], expected, rtol=0, atol=3e-6)  # measured: 4e-7
    assert np.ptp(found) > 0.1


def through_ln_f(params):
    """Return the effect of ln_f, with its scale held, on each logit, written as a matrix."""
    centre = np.eye(21) - 1 / 21
    return params["wte"] @ np.diag(params["ln_f"]["g"]) @ centre


def test_the_toys_induction_head_copies():
    config, params = induction_toy()
    found = circuits.copying_scores(config, params)
    assert found[INDUCTION] > 0.999
    assert np.isnan(found[0, 0])  # a head of zeros


@pytest.mark.parametrize("ln_f", [False, True])
def test_top_tokens_lie_furthest_along(params, ln_f):
    wide = numpy_reference.as_float64(params)
    vectors = np.random.default_rng(5).normal(size=(2, 3, 21)).astype(np.float32)
    values = vectors @ (through_ln_f(wide) if ln_f else wide["wte"]).T
    ids, found = circuits.top_tokens(CONFIG, params, vectors, 11, ln_f=ln_f)
    np.testing.assert_array_equal(ids, np.argsort(-values, axis=-1)[..., :11])
    np.testing.assert_allclose(found, -np.sort(-values, axis=-1)[..., :11], rtol=0, atol=2e-6)  # measured: 4e-7


def test_they_work_inside_other_programs(params):
    circuit = jax.jit(lambda p: circuits.qk_circuit(CONFIG, p, 1, 2))(params)
    np.testing.assert_array_equal(circuit.left, circuits.qk_circuit(CONFIG, params, 1, 2).left)
    np.testing.assert_allclose(jax.jit(circuits.LowRank.norm)(circuit), circuit.norm(), rtol=1e-6)
    scores = jax.jit(functools.partial(circuits.composition_scores, CONFIG, kind="k"))(params)
    np.testing.assert_allclose(scores, circuits.composition_scores(CONFIG, params, "k"), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda p: circuits.qk_circuit(CONFIG, p, 3, 0), "layer must be a whole number, from 0 to 2, not 3"),
        (lambda p: circuits.ov_circuit(CONFIG, p, 0, -1), "head must be a whole number, from 0 to 2, not -1"),
        (lambda p: circuits.ov_circuit(CONFIG, {}, 0, 0), "missing: wte"),
        (lambda p: circuits.composition_scores(CONFIG, p, "o"), "kind must be one of q, k, v, not 'o'"),
        (
            lambda p: circuits.top_tokens(CONFIG, p, np.ones(20), 3),
            r"vectors must have the shape \[..., 21\] \(n_embd\), not \[20\]",
        ),
        (lambda p: circuits.top_tokens(CONFIG, p, np.ones(21), 54), "k must be a whole number, from 1 to 53, not 54"),
    ],
)
def test_bad_arguments_are_refused(params, ask, told):
    with pytest.raises(ValueError, match=told):
        ask(params)
