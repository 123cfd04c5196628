"""The tiny model that the wild forms hold, its logits by NumPy in float64, and the same model in torch."""

import dataclasses
import functools
from pathlib import Path

import checkpoint_forms as forms
import numpy as np
import numpy_reference

import gpt2_jax

CONFIG = gpt2_jax.GPT2Config(n_vocab=1281, n_ctx=32, n_embd=24, n_head=3, n_layer=2)  # the embedded vocabulary fits
GELUS = {
    "gelu_new": numpy_reference.gelu_tanh,
    "gelu": numpy_reference.gelu_erf,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """A model as it was before it was written.

    Attributes:
      flat: OpenAI's names and (in, out) arrays, in the dtype that `load` must return.
      activation: a key of GELUS.
      by_layer: scores are also divided by layer + 1.
      head: the output head [V, D], if it is not `wte`.
      n_ids: the rows of `wte` that are compared. The rest is padding.
      vocabulary: a folder with the same vocabulary that transformers opens, if it does not open the form's folder.
    """

    flat: dict[str, np.ndarray]
    activation: str = "gelu_new"
    by_layer: bool = False
    head: np.ndarray | None = None
    n_ids: int | None = None
    vocabulary: Path | None = None

    def logits(self, tokens_BT) -> np.ndarray:
        """Logits [B, T, V] by NumPy in float64, of the ids that are no padding."""
        params = forms.nested({name: np.asarray(array, np.float64) for name, array in self.flat.items()})
        head = params["wte"] if self.head is None else np.asarray(self.head, np.float64)
        rows = []
        for tokens_T in tokens_BT:
            final = {}

            def see(name, x, final=final):
                if name == "ln_f/out":
                    final["x_TD"] = x
                if self.by_layer and name.endswith("attn/scores"):
                    return x / (int(name.split("/")[0][1:]) + 1)
                return x

            numpy_reference.row(params, tokens_T, CONFIG.n_head, see, gelu=GELUS[self.activation])
            rows.append(final["x_TD"] @ head[: self.n_ids].T)
        return np.stack(rows)


@functools.cache
def flat_model(n_vocab: int = CONFIG.n_vocab, dtype: str = "float32", biases: bool = True) -> dict[str, np.ndarray]:
    """Large random weights, so that each difference in the arithmetic shows in the logits. Do not write to them."""
    rng = np.random.default_rng(11)
    scale = {"w": 0.3, "g": 0.3, "b": 0.2 if biases else 0, "wte": 0.5, "wpe": 0.5}
    flat = {}
    for name, shape in forms.shapes(CONFIG.replace(n_vocab=n_vocab)).items():
        leaf = name.rsplit("/", 1)[-1]
        values = rng.normal(0, 1, shape) * scale[leaf] + (leaf == "g")
        flat[name] = values.astype(np.float32).astype(dtype)
    return flat


def source(n_vocab: int = CONFIG.n_vocab, **options) -> Source:
    """The model in float32."""
    return Source(flat_model(n_vocab), **options)


def config_of(flat) -> gpt2_jax.GPT2Config:
    """The config of a flat model."""
    return CONFIG.replace(n_vocab=flat["wte"].shape[0])


def another_head() -> np.ndarray:
    """An output head that is not `wte`."""
    return np.random.default_rng(12).normal(0, 0.5, (CONFIG.n_vocab, CONFIG.n_embd)).astype(np.float32)


def hf_tensors(flat, prefix: str = "transformer.") -> dict[str, np.ndarray]:
    """Hugging Face's names, with a prefix."""
    return forms.hf_tensors(flat, prefix)


def hf_fields(flat, **changes) -> dict:
    """Hugging Face's config.json. `...` deletes a field."""
    return forms.hf_config(config_of(flat), **changes)


def torch_model(model: Source, kind: str = "GPT2LMHeadModel", **changes):
    """The same model as one of transformers' classes. Extra heads are random."""
    import torch
    import transformers

    fields = {name: value for name, value in hf_fields(model.flat, **changes).items() if name != "n_ctx"}
    torch.manual_seed(5)
    theirs = getattr(transformers, kind)(transformers.GPT2Config(**fields)).eval().requires_grad_(False)
    own = dict(theirs.named_parameters())
    for name, array in hf_tensors(model.flat, "" if kind == "GPT2Model" else "transformer.").items():
        own[name].copy_(torch.tensor(np.asarray(array, np.float32)))
    if model.head is not None:
        own["lm_head.weight"].copy_(torch.tensor(model.head))
    return theirs
