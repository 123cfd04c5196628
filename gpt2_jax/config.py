"""The hyperparameters of a GPT-2 model, and its exact parameter counts and bytes of memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

from gpt2_jax.checks import choice, real_number, whole_number

HPARAMS = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
DROPOUT_RATES = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
VARIANTS = (  # fields under Hugging Face's names, in which other GPT-2s differ from OpenAI's
    "activation_function",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "tie_word_embeddings",
)
ACTIVATIONS = {  # Hugging Face's names of activation functions -> ours; those of one function differ only in rounding
    "gelu_new": "gelu_new",  # the tanh form of GELU
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu": "gelu",  # exact: with the error function
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
BOOK_WORDS = {  # names in the configs of the build-an-LLM books; they also have drop_rate and qkv_bias
    "vocab_size": "n_vocab",
    "context_length": "n_ctx",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
}
BOOK_RATES = {"drop_rate_emb": "embd_pdrop", "drop_rate_attn": "attn_pdrop", "drop_rate_shortcut": "resid_pdrop"}
LARGEST = 2**31 - 1  # largest value of a hyperparameter: JAX uses int32
ATTENTION = ("auto", "plain", "fused")
POOLINGS = ("last", "mean", "first")
FLOAT_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Hyperparameters under the names of OpenAI's hparams.json, dropout rates, dtypes and variants of the arithmetic.

    The defaults of the variants are OpenAI's GPT-2. Their names are those of Hugging Face's config.json.

    It is frozen and hashable, so it can be a static argument of a jitted function.

    Attributes:
      n_vocab: number of token ids (50,257 for the released vocabulary).
      n_ctx: longest sequence in tokens, which is the number of rows of `wpe`.
      n_embd: width of the residual stream; a multiple of n_head.
      n_head: attention heads per layer.
      n_layer: number of blocks.
      embd_pdrop, attn_pdrop, resid_pdrop: dropout rates in [0, 1): after the embeddings, on the attention weights, and
        on what a block adds to the residual stream. They apply only with `deterministic=False`.
      qkv_bias: False means that the query, key and value biases are 0 and get no gradient.
      param_dtype: dtype of the stored parameters.
      compute_dtype: dtype of the inputs of matrix products; LayerNorm, softmax and logits are at least float32.
      activation_function: the MLP's nonlinearity: "gelu_new" (the tanh form of GELU), "gelu" (exact), "relu" or "silu".
        Hugging Face's other names of these functions become one of the four: gelu_pytorch_tanh, gelu_python_tanh,
        gelu_fast and gelu_accurate; gelu_python; swish.
      scale_attn_by_inverse_layer_idx: True also divides the attention scores of layer i by i + 1.
      reorder_and_upcast_attn: kept for export. It changes nothing here: attention scores are always at least float32.
      tie_word_embeddings: False means that the output head is a parameter of its own, `lm_head` [V, D], and not `wte`.
      attention: "auto" takes a fused kernel for attention on GPUs and TPUs, where it is known to fit. "plain" never
        takes it. "fused" raises a ValueError if there is none: on CPUs, in other dtypes, with dropout on the attention
        weights, or with taps on scores or pattern. Calls with earlier tokens or fewer than 128 tokens are always plain.
        It is not saved with a model: each program chooses its own.
      labels: the names of the classes of a classifier, which has a head of its own, `score/w` [D, labels]. The other
        params are those of GPT-2. Empty means that the model is no classifier.
      pooling: what the classifier's head reads: the last hidden state of a text ("last", as in Hugging Face's
        GPT2ForSequenceClassification), the mean over its tokens ("mean"), or the state of its first token ("first").

    Raises:
      ValueError: a value has the wrong type or is out of range.
    """

    n_vocab: int
    n_ctx: int
    n_embd: int
    n_head: int
    n_layer: int
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    qkv_bias: bool = True
    param_dtype: Any = "float32"
    compute_dtype: Any = "float32"
    activation_function: str = "gelu_new"
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    attention: str = "auto"
    labels: tuple[str, ...] = ()
    pooling: str = "last"

    def __post_init__(self):
        for name in HPARAMS:
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 1, LARGEST))
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        for name in DROPOUT_RATES:
            object.__setattr__(self, name, real_number(name, getattr(self, name), 0, 1, open_high=True))
        for name in ("qkv_bias", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        activation = ACTIVATIONS[choice("activation_function", self.activation_function, ACTIVATIONS)]
        object.__setattr__(self, "activation_function", activation)
        choice("attention", self.attention, ATTENTION)
        choice("pooling", self.pooling, POOLINGS)
        object.__setattr__(self, "labels", _checked_labels(self.labels))
        for name in ("param_dtype", "compute_dtype"):
            object.__setattr__(self, name, float_dtype(name, getattr(self, name)))

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> GPT2Config:
        """Build a config from the contents of an hparams.json, which has exactly five names.

        Raises:
          ValueError: a name is unknown or missing, or a value is not a positive whole number.
        """
        _check_names(hparams, HPARAMS)
        return cls(**hparams)

    @classmethod
    def from_book(cls, settings: Mapping[str, Any]) -> GPT2Config:
        """Build a config from the names that the build-an-LLM books use.

        The names are vocab_size, context_length, emb_dim, n_heads, n_layers, drop_rate (for all three dropout rates)
        and qkv_bias. For the released weights set qkv_bias to True, as the books do: those weights have these biases.
        drop_rate_emb, drop_rate_attn and drop_rate_shortcut set one dropout rate each. kv_window_size, the size of the
        book's KV cache, is accepted if it does not shorten the context.

        Raises:
          ValueError: a name is unknown or missing, or a value is out of range.
        """
        _check_names(settings, (*BOOK_WORDS, "drop_rate", "qkv_bias"), (*BOOK_RATES, "kv_window_size"))
        rates: dict[str, Any] = dict.fromkeys(DROPOUT_RATES, settings.get("drop_rate"))
        rates |= {ours: settings[word] for word, ours in BOOK_RATES.items() if word in settings}
        hparams = {ours: settings[word] for word, ours in BOOK_WORDS.items()}
        config = cls(**hparams, **rates, qkv_bias=settings["qkv_bias"])
        window = settings.get("kv_window_size")
        if window is not None and whole_number("kv_window_size", window, 1, LARGEST) < config.n_ctx:
            raise ValueError(
                f"kv_window_size ({window}) is less than context_length ({config.n_ctx}): attention to only the last "
                "tokens is not supported"
            )
        return config

    def to_hparams(self) -> dict[str, int]:
        """Return the contents of OpenAI's hparams.json."""
        return {name: getattr(self, name) for name in HPARAMS}

    def replace(self, **changes: Any) -> GPT2Config:
        """Return a copy with some fields changed, checked like a new one."""
        return dataclasses.replace(self, **changes)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def variants(self) -> dict[str, Any]:
        """The fields in which this model's arithmetic differs from OpenAI's GPT-2, with their values."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: getattr(self, name) for name in VARIANTS if getattr(self, name) != defaults[name]}

    @property
    def param_counts(self) -> dict[str, int]:
        """Exact number of parameters by part, over all layers. A tied output head is `wte` itself, counted once."""
        d, n = self.n_embd, self.n_layer
        head = {} if self.tie_word_embeddings else {"lm_head": self.n_vocab * d}
        return {
            "wte": self.n_vocab * d,
            "wpe": self.n_ctx * d,
            "attn": n * (4 * d * d + 4 * d),
            "mlp": n * (8 * d * d + 5 * d),
            "ln": (2 * n + 1) * 2 * d,
            **head,
            **({"score": d * len(self.labels)} if self.labels else {}),
        }

    @property
    def n_params(self) -> int:
        """Exact number of parameters."""
        return sum(self.param_counts.values())

    @property
    def param_bytes(self) -> int:
        """Bytes of the parameters in `param_dtype`."""
        return self.n_params * self.param_dtype.itemsize

    def cache_bytes(self, batch_size: int, length: int) -> int:
        """Bytes of the keys and values of `batch_size` rows of `length` slots, in `compute_dtype`."""
        return 2 * self.n_layer * batch_size * length * self.n_embd * self.compute_dtype.itemsize

    @property
    def adam_bytes(self) -> int:
        """Bytes of float32 training state under Adam: parameters, gradients and two moments (no activations)."""
        return 4 * 4 * self.n_params


def _checked_labels(labels: Any) -> tuple[str, ...]:
    if (
        isinstance(labels, str)
        or not isinstance(labels, list | tuple)
        or not all(isinstance(one, str) for one in labels)
    ):
        raise ValueError(f"labels must be a tuple of names, not {labels!r}")
    if len(labels) == 1 or len(set(labels)) != len(labels):
        raise ValueError(f"labels must be two or more different names, not {', '.join(labels)}")
    return tuple(labels)


def _check_names(values: Mapping[str, Any], names: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"hyperparameters must be a mapping of names to numbers, not a {type(values).__name__}")
    unknown = [str(name) for name in values if name not in (*names, *optional)]
    whole = set(BOOK_RATES) <= set(values)  # the rates of all parts are there, so drop_rate need not be
    missing = [name for name in names if name not in values and not (whole and name == "drop_rate")]
    if unknown:
        raise ValueError(
            f"unknown hyperparameters {', '.join(unknown)}: the names are {', '.join((*names, *optional))}"
        )
    if missing:
        raise ValueError(f"missing hyperparameters {', '.join(missing)}")


def float_dtype(name: str, value: Any, allowed: tuple[str, ...] = FLOAT_DTYPES) -> np.dtype:
    """Return `value` as a dtype. If it is not one of `allowed`, raise a ValueError that starts with `name`."""
    try:
        dtype = None if value is None else jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
    return dtype


def _released(n_embd: int, n_head: int, n_layer: int) -> GPT2Config:
    return GPT2Config(n_vocab=50257, n_ctx=1024, n_embd=n_embd, n_head=n_head, n_layer=n_layer)


SIZES: Mapping[str, GPT2Config] = MappingProxyType(
    {
        "124M": _released(n_embd=768, n_head=12, n_layer=12),
        "355M": _released(n_embd=1024, n_head=16, n_layer=24),
        "774M": _released(n_embd=1280, n_head=20, n_layer=36),
        "1558M": _released(n_embd=1600, n_head=25, n_layer=48),
    }
)
"""The configs of the released models, by name."""
