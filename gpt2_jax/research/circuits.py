"""What a head does, read from its weights: the QK and OV circuits, their SVD, and how heads compose.

A head's circuit is the product of a [D, H] and an [H, D] matrix, and is kept as these two factors. Nothing here makes a
[V, V] matrix. Vectors are rows, as in the params: x @ W.

- OV, W_V @ W_O: a head that attends to a token with stream x adds x @ OV to the stream of the query token.
- QK, W_Q @ W_K.T: the score of a query token with stream x for a key token with stream y is x @ QK @ y / sqrt(H),
  divided by i + 1 in layer i if the config says scale_attn_by_inverse_layer_idx.

x and y are what the head reads: the stream after ln_1. The score is the input of the softmax. The weights are used as
they are, without their biases. The weights of `fold_layer_norm(config, params)` include ln_1's g.
(Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".)

Shape letters: D n_embd, N heads, H head width, V vocab, L layers, K tokens kept.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from gpt2_jax.checks import choice, whole_number
from gpt2_jax.config import GPT2Config
from gpt2_jax.explicit_axes import whole_on_auto_axes
from gpt2_jax.jax_defaults import under_jax_defaults
from gpt2_jax.params import Params, output_head
from gpt2_jax.research._forward import as_params
from gpt2_jax.research.trees import product, wide
from gpt2_jax.research.units import split_heads


@struct.dataclass
class LowRank:
    """A [D, D] matrix of rank H as two factors, left @ right. Leading axes hold several matrices.

    Attributes:
      left: [..., D, H], at least float32.
      right: [..., H, D].
    """

    left: jax.Array
    right: jax.Array

    def dense(self) -> jax.Array:
        """Return the matrix itself, [..., D, D]."""
        return product(self.left, self.right)

    def svd(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the singular value decomposition: u_DH, s_H (the largest first), v_HD. The matrix is u * s @ v.

        It takes the QR decompositions of the factors, and the SVD of the product of their triangles, [H, H].
        """
        q_left, r_left = jnp.linalg.qr(self.left)
        q_right, r_right = jnp.linalg.qr(self.right.mT)
        u, s, v = jnp.linalg.svd(product(r_left, r_right.mT), full_matrices=False)
        return product(q_left, u), s, product(v, q_right.mT)

    def norm(self) -> jax.Array:
        """Return its Frobenius norm, [...]."""
        return jnp.linalg.norm(product(_triangle(self.left), _triangle(self.right.mT).mT), axis=(-2, -1))


@under_jax_defaults
@whole_on_auto_axes
def qk_circuit(config: GPT2Config, params: Params, layer: int, head: int) -> LowRank:
    """Return W_Q @ W_K.T of a head: rows belong to the query token, columns to the key token.

    Raises:
      ValueError: params do not match the config, or a layer or head is out of range.
    """
    weights = _weights(config, params, layer)
    head = whole_number("head", head, 0, config.n_head - 1)
    return LowRank(weights["q"][head], weights["k"][head].mT)


@under_jax_defaults
@whole_on_auto_axes
def ov_circuit(config: GPT2Config, params: Params, layer: int, head: int) -> LowRank:
    """Return W_V @ W_O of a head: rows belong to what the head reads, columns to what it writes.

    Raises:
      ValueError: as `qk_circuit`.
    """
    weights = _weights(config, params, layer)
    head = whole_number("head", head, 0, config.n_head - 1)
    return LowRank(weights["v"][head], weights["out"][head])


@under_jax_defaults
@whole_on_auto_axes
def top_tokens(
    config: GPT2Config, params: Params, vectors: Any, k: int = 10, *, ln_f: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Return the tokens whose embeddings have the largest dot products with vectors: ids and values, [..., K].

    A singular vector's sign is arbitrary: try -vector too.

    Args:
      config, params: the model.
      vectors: [..., D]: a row of v from `svd()`, which an OV circuit writes, or a column of u, which it reads.
      k: how many tokens to return for each vector.
      ln_f: False computes wte @ vector: the tokens whose embeddings are most like the vector. True also applies ln_f's
        g and subtracts the mean, without division by the scale: the tokens whose logits the vector raises most. These
        are read from the output head, which is `lm_head` if it is not tied.

    Raises:
      ValueError: params do not match the config, vectors are not n_embd wide, or k is not from 1 to n_vocab.
    """
    params = as_params(config, params)
    k = whole_number("k", k, 1, config.n_vocab)
    vectors = jnp.asarray(vectors)
    if vectors.shape[-1:] != (config.n_embd,):
        raise ValueError(f"vectors must have the shape [..., {config.n_embd}] (n_embd), not {list(vectors.shape)}")
    tokens_VD = _unembedding(params, ln_f=True) if ln_f else wide(jnp.asarray(params["wte"]))
    values, ids = jax.lax.top_k(product(vectors, tokens_VD.T), k)
    return ids, values


@under_jax_defaults
@whole_on_auto_axes
def composition_scores(config: GPT2Config, params: Params, kind: Literal["q", "k", "v"]) -> jax.Array:
    """Return how strongly each later head reads what each head writes: [L, N, L, N], the writer first.

    The score is `|A @ B| / (|A| |B|)` in Frobenius norms. A is the writer's OV. B is the reader's QK (kind "q": the
    queries read what is written), QK.T ("k": the keys) or OV ("v": the values). The score is 0 where the reader is not
    in a later layer, or where a head's weights are all 0. Random matrices score about 1 / sqrt(D).
    (Elhage et al. 2021, "Path Expansion of Attention Scores": Q-, K- and V-composition.)

    Raises:
      ValueError: params do not match the config, or `kind` is not "q", "k" or "v".
    """
    return _composition(config, as_params(config, params), choice("kind", kind, ("q", "k", "v")))


@under_jax_defaults
@whole_on_auto_axes
def copying_scores(config: GPT2Config, params: Params, *, ln_f: bool = False) -> jax.Array:
    """Return for each head, [L, N], whether attending to a token raises that token's logit: 1 copies, -1 suppresses.

    The score is the sum of the eigenvalues of the full OV circuit, wte @ OV @ head.T, divided by the sum of their
    absolute values. The output head is wte, or lm_head if it is not tied. The eigenvalues that are not 0 are those of
    the [H, H] matrix W_O @ head.T @ wte @ W_V. The score is NaN where all are 0. (Elhage et al. 2021, "Summarizing
    OV/QK Matrices".)

    Args:
      config, params: the model.
      ln_f: True applies ln_f's g to what the head writes, and subtracts its mean, before the logits.

    Raises:
      ValueError: params do not match the config.
      NotImplementedError: JAX cannot compute these eigenvalues on this device. Move the params to a CPU.
    """
    return _copying(config, ln_f, as_params(config, params))


def _weights(config: GPT2Config, params: Params, layer: int) -> dict[str, jax.Array]:
    """Return the weights of a layer's heads in at least float32: q, k, v [N, D, H], out [N, H, D]."""
    heads = {name: wide(jnp.asarray(part["w"])) for name, part in split_heads(config, params, layer).items()}
    return {name: w if name == "out" else w.swapaxes(0, 1) for name, w in heads.items()}


def _triangle(a: jax.Array) -> jax.Array:
    """Return the triangle R of the QR decomposition of [..., D, H]: `|a @ x|` equals `|R @ x|` for any x."""
    return jnp.linalg.qr(a, mode="r")


def _unembedding(params: Params, ln_f: bool) -> jax.Array:
    """Return [V, D]: the rows of the output head, or, with `ln_f`, the vectors that turn the stream into logits."""
    head_VD = wide(jnp.asarray(output_head(params)))
    if not ln_f:
        return head_VD
    read_VD = head_VD * wide(jnp.asarray(params["ln_f"]["g"]))
    return read_VD - read_VD.mean(-1, keepdims=True)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _composition(config: GPT2Config, params: Params, kind: str) -> jax.Array:
    layers = [_weights(config, params, layer) for layer in range(config.n_layer)]
    heads = {name: jnp.concatenate([layer[name] for layer in layers]) for name in ("q", "k", "v", "out")}
    writers = LowRank(heads["v"], heads["out"])
    factors = {"q": ("q", "k"), "k": ("k", "q"), "v": ("v", "out")}[kind]
    left, right = (heads[name] for name in factors)
    readers = LowRank(left, right if kind == "v" else right.mT)
    behind = _triangle(readers.right.mT).mT

    def of_writer(writer: tuple[jax.Array, jax.Array]) -> jax.Array:
        before_HH, out_HD = writer
        return jnp.linalg.norm(product(product(before_HH, product(out_HD, readers.left)), behind), axis=(-2, -1))

    norms = jax.lax.map(of_writer, (_triangle(writers.left), writers.right))
    sizes = writers.norm()[:, None] * readers.norm()
    layer = jnp.repeat(jnp.arange(config.n_layer), config.n_head)
    scores = jnp.where((layer[:, None] < layer) & (sizes > 0), norms / sizes, 0)
    return scores.reshape((config.n_layer, config.n_head) * 2)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _copying(config: GPT2Config, ln_f: bool, params: Params) -> jax.Array:
    in_out_DD = product(_unembedding(params, ln_f).T, wide(jnp.asarray(params["wte"])))
    scores = []
    for layer in range(config.n_layer):
        weights = _weights(config, params, layer)
        around_NHH = product(product(weights["out"], in_out_DD), weights["v"])
        eigenvalues_NH = jnp.linalg.eigvals(around_NHH)
        scores.append(eigenvalues_NH.real.sum(-1) / jnp.abs(eigenvalues_NH).sum(-1))
    return jnp.stack(scores)
