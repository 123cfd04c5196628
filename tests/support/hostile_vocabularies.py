"""Texts that break tokenizers, and random folders of vocabularies."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import vocabularies
from vocabulary_forms import DIGITS, LOWER, PREFIX
from vocabulary_makers import EOT, SPECIALS, added, described, embedded, template, two_files


def hostile_texts(count: int, seed: int, tokens: Sequence[str] = ()) -> list[str]:
    """Texts of special characters, parts of special tokens, long runs, digits and scripts; the same for a seed."""
    draw = random.Random(seed)
    pieces = [
        *vocabularies.SNIPPETS,
        *SPECIALS,
        *tokens,
        "abc",
        "ddd",
        "abc ddd",
        "THE the",
        "12345",
        "\u2581",
        "<0x0A>",
    ]
    pieces += [token[:cut] for token in (*tokens, EOT, "<pad>") for cut in (1, -1)]
    pieces += [
        "ab<c>",
        "\u00e9t\u00e9",
        "e\u0301te\u0301",
        "thee",
        "methee",
        "<sp 1>",
        "[PAD]",
        "<user>x",
        "thou",
        "\u0130",
        "\u1e9e",
    ]

    def piece() -> str:
        kind = draw.random()
        if kind < 0.75:
            return draw.choice(pieces)
        if kind < 0.85:
            return chr(draw.choice([draw.randrange(0x80), draw.randrange(0x3000), draw.randrange(0xE000, 0x30000)]))
        if kind < 0.9:
            return draw.choice("a 0\n!é") * draw.randrange(1, 40)
        return draw.choice(["  ", " ", "\n"]) + draw.choice(pieces)

    return [
        "".join(piece() for _ in range(draw.randrange(12))).encode("utf-8", "replace").decode() for _ in range(count)
    ]


NAMES = ["[PAD]", "<s>", "</s>", "<unk>", EOT, "the", "<x>", "<x", "x>", "\u00e9", "hello", " hi", "a b", "\n", "t"]


def random_folder(folder: Path, seed: int) -> Path:
    """A folder in which any files name, add and declare any tokens, the same for a seed."""
    draw = random.Random(seed)
    tokens, merges = embedded()
    merges = merges[:120]
    ends = [token for token in ("<s>", "</s>", EOT, "[PAD]") if draw.random() < 0.3]
    bytes_and_merges = [*(token for token in tokens if len(token) == 1), *(left + right for left, right in merges)]
    names = [
        *ends,
        *bytes_and_merges,
        *(token for token in (EOT, "<unk>") if draw.random() < 0.4 and token not in ends),
    ]
    ids = {token: i for i, token in enumerate(names)}

    def some(share: float, value: Callable[[], Any]) -> Any:
        return value() if draw.random() < share else None

    def described_token(content: str) -> dict[str, Any]:
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        return added(content, **{flag: draw.random() < 0.2 for flag in flags})

    def name() -> Any:
        content = draw.choice(NAMES)
        typed = {key: value for key, value in described_token(content).items() if key != "special"}
        return content if draw.random() < 0.8 else {"__type": "AddedToken", **typed}

    def own_tokens() -> list[dict[str, Any]]:
        known = [token for token in ids if token in NAMES]
        more = draw.sample([token for token in NAMES if token not in ids], 2)
        numbered = [*((ids[token], token) for token in sorted(known, key=ids.__getitem__)), *enumerate(more, len(ids))]
        return [{"id": i, **described_token(token)} for i, token in numbered]

    config = {
        **{key: some(0.25, name) for key in ("bos_token", "eos_token", "unk_token", "pad_token", "image_token")},
        "added_tokens_decoder": some(0.3, lambda: {str(draw.randrange(400)): described_token(draw.choice(NAMES))}),
        "additional_special_tokens": some(0.2, lambda: draw.sample(NAMES, 2)),
        **{f"add_{key}": some(0.15, lambda: draw.random() < 0.7) for key in ("bos_token", "eos_token", "prefix_space")},
        "tokenizer_class": draw.choice([None, "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"]),
    }
    contents = {
        "tokenizer_config": {key: value for key, value in config.items() if value is not None},
        "special_tokens_map": some(0.3, lambda: {"pad_token": draw.choice(NAMES), "eos_token": draw.choice(NAMES)}),
        "added_tokens": some(0.2, lambda: {token: draw.randrange(400) for token in draw.sample(NAMES, 2)}),
    }
    if draw.random() < 0.6 or config["tokenizer_class"] in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        changes = {**(some(0.2, lambda: LOWER) or {}), **(some(0.2, lambda: draw.choice([DIGITS, PREFIX])) or {})}
        if (end := next((token for token in ids if token in NAMES), None)) and draw.random() < 0.3:
            changes["post_processor"] = template([end], some(0.3, lambda: [end]) or [], ids)
        model = {"vocab": ids, "merges": merges}
        contents["tokenizer"] = described(added_tokens=own_tokens(), model=model, **changes)
    given = {key: value for key, value in contents.items() if value is not None}
    return two_files(folder, ids, merges, **given)
