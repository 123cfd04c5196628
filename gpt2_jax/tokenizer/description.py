"""The content of a tokenizer.json, the file in which Hugging Face's `tokenizers` describes a tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PLAIN_BPE = {  # the fields of a BPE model in tokenizer.json, as GPT-2 has them
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "",
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


def added_fields(token: str, i: int, special: bool) -> dict[str, Any]:
    """Return an added token as tokenizer.json has it: found everywhere in a text."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": token, **plain, "special": special}


def description(
    tokens: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    added: Sequence[Mapping[str, Any]],
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
) -> dict[str, Any]:
    """Return the content of a tokenizer.json for a vocabulary of OpenAI's form."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added),
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "post_processor": template(tokens, prefix, suffix) or BYTE_LEVEL | {"trim_offsets": False},
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            **PLAIN_BPE,
            "vocab": dict(tokens),
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


def template(tokens: Mapping[str, int], prefix: Sequence[int], suffix: Sequence[int]) -> dict[str, Any] | None:
    """Return the post-processor of a tokenizer.json that puts ids before and after a text; None if there are none."""
    if not prefix and not suffix:
        return None
    name_of = {i: token for token, i in tokens.items() if i in (*prefix, *suffix)}
    before, after = ([{"SpecialToken": {"id": name_of[i], "type_id": 0}} for i in ids] for ids in (prefix, suffix))
    first, second = ([{"Sequence": {"id": name, "type_id": i}}] for i, name in enumerate("AB"))
    special = {token: {"id": token, "ids": [i], "tokens": [token]} for i, token in name_of.items()}
    single = [*before, *first, *after]
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, *second], "special_tokens": special}


def ends_of(post_processor: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the ids that a post-processor puts before and after a text; None if it is of another kind."""
    kind = post_processor.get("type") if isinstance(post_processor, dict) else post_processor
    if kind in (None, "ByteLevel"):
        return (), ()
    try:
        special = post_processor["special_tokens"]
        names = [part["SpecialToken"]["id"] if "SpecialToken" in part else None for part in post_processor["single"]]
        middle = names.index(None)
        before, after = ([special[name]["ids"] for name in part] for part in (names[:middle], names[middle + 1 :]))
        return tuple(itertools.chain(*before)), tuple(itertools.chain(*after))
    except (KeyError, TypeError, ValueError):  # another kind, malformed, or the text is there twice or not at all
        return None
