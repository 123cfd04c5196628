"""Forward passes and gradients of the same weights; benchmarks/fidelity.py runs each of them in its own process.

Every function takes the folder of the weights, tokens [T] and a `Way`. It returns the logits [T, V], or the gradients
of the mean loss as {our name: gradient}. A library is imported only in the process that needs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Forward = Callable[[Path, np.ndarray, "Way"], np.ndarray]
Gradients = Callable[[Path, np.ndarray, "Way"], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Way:
    """How a pass is computed.

    Attributes:
      dtype: dtype of weights and products: "float64", "float32" or "bfloat16".
      where: "cpu" or "gpu".
      rounded: whether float32 products have JAX's default precision. For torch this means TF32, as on a GPU in JAX.
    """

    dtype: str
    where: str
    rounded: bool = False


def _ours(folder: Path, way: Way) -> tuple[Any, Any]:
    import jax

    import gpt2_jax

    jax.config.update("jax_enable_x64", way.dtype == "float64")
    jax.config.update("jax_default_matmul_precision", None if way.rounded else "highest")
    config, params = gpt2_jax.load(folder / "hf", dtype="bfloat16" if way.dtype == "bfloat16" else "float32")
    if way.dtype == "float64":
        params = jax.tree.map(lambda leaf: leaf.astype("float64"), params)
    return gpt2_jax.GPT2(config.replace(param_dtype=way.dtype, compute_dtype=way.dtype)), params


def our_logits(folder: Path, tokens_T: np.ndarray, way: Way) -> np.ndarray:
    """Return the logits of this library."""
    import jax

    model, params = _ours(folder, way)
    return np.asarray(jax.jit(lambda p, t: model.apply({"params": p}, t).logits)(params, tokens_T[None]))[0]


def our_gradients(folder: Path, tokens_T: np.ndarray, way: Way) -> dict[str, np.ndarray]:
    """Return the gradients of this library's loss."""
    import jax
    import jax.numpy as jnp

    from gpt2_jax.params import flatten
    from gpt2_jax.training.loss import token_loss

    model, params = _ours(folder, way)
    target_BT, weight_BT = tokens_T[None, 1:], jnp.ones((1, len(tokens_T) - 1))

    def loss(params: Any) -> jax.Array:
        h_BTD, _ = model.apply({"params": params}, tokens_T[None, :-1], method="hidden")
        return token_loss(h_BTD, params["wte"].astype(h_BTD.dtype), target_BT, weight_BT) / weight_BT.sum()

    return {name: np.asarray(leaf) for name, leaf in flatten(jax.jit(jax.grad(loss))(params)).items()}


def _torch(folder: Path, way: Way) -> Any:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high" if way.rounded else "highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    model = transformers.GPT2LMHeadModel.from_pretrained(
        folder / "hf", dtype=getattr(torch, way.dtype), use_cache=False
    )
    return model.eval().to("cuda" if way.where == "gpu" else "cpu")


def torch_logits(folder: Path, tokens_T: np.ndarray, way: Way) -> np.ndarray:
    """Return the logits of Hugging Face torch."""
    import torch

    model = _torch(folder, way)
    with torch.inference_mode():
        logits_TV = model(torch.from_numpy(tokens_T[None]).to(model.device)).logits[0].cpu()
    return (logits_TV.float() if way.dtype == "bfloat16" else logits_TV).numpy()


def torch_gradients(folder: Path, tokens_T: np.ndarray, way: Way) -> dict[str, np.ndarray]:
    """Return the gradients of Hugging Face torch; its loss is in float32 or wider, like its own loss."""
    import torch

    from gpt2_jax.checkpoints.huggingface import hugging_face_name
    from gpt2_jax.model import abstract_params
    from gpt2_jax.params import flatten

    model = _torch(folder, way)
    tokens_T = torch.from_numpy(tokens_T).to(model.device)
    logits_TV = model(tokens_T[None, :-1]).logits[0]
    logits_TV = logits_TV.float() if way.dtype == "bfloat16" else logits_TV
    torch.nn.functional.cross_entropy(logits_TV, tokens_T[1:]).backward()
    parameters = dict(model.named_parameters())
    names = flatten(abstract_params(_config(folder)))
    return {name: parameters[hugging_face_name(name)].grad.float().cpu().numpy() if way.dtype == "bfloat16"
            else parameters[hugging_face_name(name)].grad.cpu().numpy() for name in names}  # fmt: skip


def _config(folder: Path) -> Any:
    import gpt2_jax

    return gpt2_jax.load_config(folder / "hf")


def _tensorflow(config: Any, params: dict[str, Any], tokens_T: Any) -> Any:
    """Return the logits, computed in TensorFlow by the same operations as the original graph.

    Source: openai/gpt-2, src/model.py.
    """
    import tensorflow as tf

    def norm(x_TD: Any, name: str) -> Any:
        x_TD = x_TD - tf.reduce_mean(x_TD, axis=-1, keepdims=True)
        x_TD = x_TD * tf.math.rsqrt(tf.reduce_mean(tf.square(x_TD), axis=-1, keepdims=True) + 1e-5)
        return x_TD * params[f"{name}/g"] + params[f"{name}/b"]

    def dense(x_TD: Any, name: str) -> Any:
        return tf.matmul(x_TD, params[f"{name}/w"]) + params[f"{name}/b"]

    def attention(x_TD: Any, name: str) -> Any:
        heads = [-1, config.n_head, config.head_dim]
        qkv = tf.split(dense(x_TD, f"{name}/c_attn"), 3, axis=-1)
        q_NTH, k_NTH, v_NTH = (tf.transpose(tf.reshape(part, heads), [1, 0, 2]) for part in qkv)
        scores_NTT = tf.matmul(q_NTH, k_NTH, transpose_b=True) * tf.math.rsqrt(tf.cast(config.head_dim, q_NTH.dtype))
        mask_TT = tf.linalg.band_part(tf.ones_like(scores_NTT[0]), -1, 0)
        scores_NTT = scores_NTT * mask_TT - 1e10 * (1 - mask_TT)
        z_NTH = tf.matmul(tf.nn.softmax(scores_NTT), v_NTH)
        return dense(tf.reshape(tf.transpose(z_NTH, [1, 0, 2]), [-1, config.n_embd]), f"{name}/c_proj")

    def mlp(x_TD: Any, name: str) -> Any:
        x_TF = dense(x_TD, f"{name}/c_fc")
        gelu_TF = 0.5 * x_TF * (1 + tf.tanh((2 / np.pi) ** 0.5 * (x_TF + 0.044715 * tf.pow(x_TF, 3))))
        return dense(gelu_TF, f"{name}/c_proj")

    x_TD = tf.gather(params["wte"], tokens_T) + params["wpe"][: tokens_T.shape[0]]
    for i in range(config.n_layer):
        x_TD = x_TD + attention(norm(x_TD, f"h{i}/ln_1"), f"h{i}/attn")
        x_TD = x_TD + mlp(norm(x_TD, f"h{i}/ln_2"), f"h{i}/mlp")
    return tf.matmul(norm(x_TD, "ln_f"), params["wte"], transpose_b=True)


def _tensorflow_variables(folder: Path) -> tuple[Any, dict[str, Any]]:
    import tensorflow as tf

    import gpt2_jax
    from gpt2_jax.params import flatten

    config, params = gpt2_jax.load(folder / "hf", dtype="float32")
    return config, {name: tf.Variable(np.asarray(leaf)) for name, leaf in flatten(params).items()}


def tensorflow_logits(folder: Path, tokens_T: np.ndarray, way: Way) -> np.ndarray:
    """Return the logits of the original graph."""
    import tensorflow as tf

    config, variables = _tensorflow_variables(folder)
    return tf.function(lambda tokens_T: _tensorflow(config, variables, tokens_T))(tf.constant(tokens_T)).numpy()


def tensorflow_gradients(folder: Path, tokens_T: np.ndarray, way: Way) -> dict[str, np.ndarray]:
    """Return the gradients of the original graph."""
    import tensorflow as tf

    config, variables = _tensorflow_variables(folder)

    @tf.function
    def gradients(tokens_T: Any) -> dict[str, Any]:
        with tf.GradientTape() as tape:
            logits_TV = _tensorflow(config, variables, tokens_T[:-1])
            loss_T = tf.nn.sparse_softmax_cross_entropy_with_logits(tokens_T[1:], logits_TV)
            loss = tf.reduce_mean(loss_T)
        return {name: tf.convert_to_tensor(leaf) for name, leaf in tape.gradient(loss, variables).items()}

    return {name: leaf.numpy() for name, leaf in gradients(tf.constant(tokens_T)).items()}


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A library: functions for logits and gradients, the package to install, its dtypes and devices."""

    logits: Forward
    gradients: Gradients
    package: str
    dtypes: tuple[str, ...]
    devices: tuple[str, ...]


CONTESTANTS = {
    "ours": Contestant(our_logits, our_gradients, "jax", ("float64", "float32", "bfloat16"), ("cpu", "gpu")),
    "torch": Contestant(torch_logits, torch_gradients, "transformers", ("float32", "bfloat16"), ("cpu", "gpu")),
    "TF graph": Contestant(tensorflow_logits, tensorflow_gradients, "tensorflow", ("float32",), ("cpu",)),
}
TRUTH = Contestant(torch_logits, torch_gradients, "transformers", ("float64",), ("cpu", "gpu"))


def write_logits(contestant: Contestant, folder: Path, tokens_T: np.ndarray, way: Way, path: Path) -> None:
    """Write a contestant's logits into a .npy file."""
    np.save(path, contestant.logits(folder, tokens_T, way))


def write_gradients(contestant: Contestant, folder: Path, tokens_T: np.ndarray, way: Way, path: Path) -> None:
    """Write a contestant's gradients into a folder, one .npy file per parameter."""
    path.mkdir(exist_ok=True)
    for name, leaf in contestant.gradients(folder, tokens_T, way).items():
        np.save(path / f"{name.replace('/', '.')}.npy", leaf.astype(np.promote_types(leaf.dtype, np.float32)))
