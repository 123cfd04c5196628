"""Known values of published weights: the released sizes and the embedded model.

`gpt2_jax.inspection.verification` checks a loaded model against them. `gpt2_jax.release.known` is about the files to
download; this module is about their content. It is not in `release`, because `release` covers only OpenAI's release,
and the embedded model is not part of that.

Sources: the values of 124M are from OpenAI's checkpoint, and its continuations from greedy decoding with OpenAI's
TensorFlow code. OpenAI's TensorFlow graph also computed the continuation of the embedded model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from gpt2_jax.config import SIZES, GPT2Config


@dataclasses.dataclass(frozen=True)
class Greedy:
    """What greedy decoding appends to a prompt.

    Attributes:
      prompt: token ids, or a text.
      continuation: the new token ids, or their text.
      n_tokens: number of new tokens.
    """

    prompt: tuple[int, ...] | str
    continuation: tuple[int, ...] | str
    n_tokens: int


@dataclasses.dataclass(frozen=True)
class KnownValues:
    """Known values of one set of weights and its vocabulary.

    Attributes:
      name: its name in `gpt2_jax.load`.
      hparams: the five hyperparameters.
      n_params: number of parameters.
      vocabulary: the sha256 of all tokens and merges, as `gpt2_jax.tokenizer.fingerprint` computes it.
      ids: {text: token id} of some texts that are one token.
      values: single values of tensors, as (name of the tensor, index, value).
      greedy: continuations by greedy decoding in float32.
    """

    name: str
    hparams: Mapping[str, int]
    n_params: int
    vocabulary: str
    ids: Mapping[str, int]
    values: tuple[tuple[str, tuple[int, ...], float], ...] = ()
    greedy: tuple[Greedy, ...] = ()


def _released(name: str, n_params: int, **more: Any) -> KnownValues:
    return KnownValues(
        name,
        SIZES[name].to_hparams(),
        n_params,
        vocabulary="466832fd55dd9c3f008645f08ab0a00b3ff4a0e034a7edb40839627eb84482ea",
        ids={
            **{"hello": 31373, "Hello": 15496, "world": 6894, "the": 1169, " the": 262, "ing": 278, " ing": 5347},
            **{"!": 0, "ale": 1000, " pocket": 10000, "<|endoftext|>": 50256},
        },
        **more,
    )


_124M = _released(
    "124M",
    124_439_808,
    values=(
        ("wte", (0, 0), -0.11010301),
        ("wte", (1, 0), 0.04034033),
        ("wte", (2, 0), -0.12746179),
        ("wte", (0, -1), 0.04531523),
    ),
    greedy=(
        Greedy(
            (464, 3290),  # "The dog"
            (373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13, 198, 198, 464, 3290),
            18,
        ),
        Greedy(
            "Alan Turing theorized that computers would one day become",
            " the most powerful machines on the planet.\n\nThe computer is a machine that can perform complex "
            "calculations, and it can perform these calculations in a way that is very similar to the human brain.",
            40,
        ),
    ),
)
_SHAKESPEARE = KnownValues(
    "shakespeare",
    {"n_vocab": 1281, "n_ctx": 256, "n_embd": 256, "n_head": 4, "n_layer": 4},
    3_553_024,
    vocabulary="090e2e561058473f9c775496535f7e594234693ed5b062c9bda1f0edb057fa80",
    ids={"!": 0, " the": 267, " king": 529, "ROMEO": 858, "the": 891, "ory": 1279, "<|endoftext|>": 1280},
    values=(
        ("wte", (0, 0), 0.035482772),
        ("wte", (1, 0), -0.10827534),
        ("wte", (2, 0), -0.09114045),
        ("wte", (0, -1), 0.01904276),
    ),
    greedy=(
        Greedy(
            (13, 198, 198, 881, 25, 198, 754, 11, 415),  # ".\n\nPETRUCHIO:\nNow, by"
            (267, 872, 320, 946, 11, 198, 326, 11, 415, 267, 872, 300, 347, 680, 11),
            15,
        ),
    ),
)

KNOWN: Mapping[str, KnownValues] = MappingProxyType(
    {
        "124M": _124M,
        "355M": _released("355M", 354_823_168),
        "774M": _released("774M", 774_030_080),
        "1558M": _released("1558M", 1_557_611_200),
        "shakespeare": _SHAKESPEARE,
    }
)
"""The released sizes and the embedded model, by name."""


def known_for(config: GPT2Config) -> KnownValues | None:
    """Return the known values for weights of this shape; None if there are none, or the arithmetic is not OpenAI's."""
    if config.variants:
        return None
    hparams = config.to_hparams()
    return next((known for known in KNOWN.values() if known.hparams == hparams), None)
