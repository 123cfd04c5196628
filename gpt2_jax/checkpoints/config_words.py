"""The words in which programs describe a GPT-2 in config.json, brought to Hugging Face's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpt2_jax.config import BOOK_RATES, DROPOUT_RATES

# transformers' GPT2Config accepts both, and uses these if both are there. Old files also have n_ctx beside n_positions;
# transformers reads n_positions.
SYNONYMS = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}
BOOK = {"emb_dim": "n_embd", "n_heads": "n_head", "n_layers": "n_layer", "context_length": "n_positions"}
NANOGPT = {"block_size": "n_positions"}
ALL_RATES = ("dropout", "drop_rate")  # nanoGPT's and the book's word for one rate in all places


def in_hugging_face_words(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json under Hugging Face's names.

    The words of the build-an-LLM book (emb_dim, ...) and of nanoGPT (block_size, ...) are accepted, and the synonyms
    that transformers accepts. nanoGPT computes the exact GELU since June 2023 (karpathy/nanoGPT#274), so its config
    means that if it does not say. Without `bias`, the config is older, or of build-nanogpt or minGPT, whose GELU is
    OpenAI's.

    Raises:
      ValueError: a word of the book or of nanoGPT and Hugging Face's word for the same field have different values.
    """
    found = dict(fields)
    if "block_size" in found and "bias" in found:
        found.setdefault("activation_function", "gelu")
    found |= {ours: found[word] for word, ours in SYNONYMS.items() if word in found}
    for word, ours in (BOOK | NANOGPT | BOOK_RATES).items():
        if word in found:
            _set(found, ours, found[word], word)
    for word in ALL_RATES:
        for ours in DROPOUT_RATES if word in found else ():
            found.setdefault(ours, found[word])
    if "n_ctx" in found:
        found.setdefault("n_positions", found["n_ctx"])
    return found


def leaves_nanogpts_gelu_open(fields: Mapping[str, Any]) -> bool:
    """Return whether a config.json beside weights of nanoGPT does not say which GELU they were trained with.

    Older versions of nanoGPT wrote the same words with another GELU. In words of nanoGPT without its `dropout`, the
    config is of build-nanogpt or minGPT, which have only one GELU.
    """
    if "activation_function" in fields:
        return False
    return "block_size" not in fields or bool({"bias", "dropout"} & fields.keys())


def _set(fields: dict[str, Any], name: str, value: Any, word: str) -> None:
    if fields.setdefault(name, value) != value:
        raise ValueError(f"{word} = {value!r} and {name} = {fields[name]!r} are two names of one field: remove one")
