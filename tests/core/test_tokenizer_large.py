"""Texts of megabytes and hard texts: the ids of the whole text, in one call."""

import random

import numpy as np
import pytest
from strength import campaign
from vocabularies import SNIPPETS, WHITESPACE


def ordinary_text(size: int) -> str:
    """Sentences of invented words with numbers, names, contractions and paragraphs. No two pages are equal."""
    rng = random.Random(20260719)
    words = ["".join(rng.choices("etaoinshrdlucmfwygpbvk", k=rng.randint(1, 11))) for _ in range(9973)]
    words += [
        "don't",
        "it's",
        "we'll",
        "they've",
        "caf\xe9",
        "na\xefve",
        "1597",
        "3.14",
        "O'Neil",
        "e\u0301t\xe9",
        "\u6f22\u5b57",
    ]
    pieces, length = [], 0
    while length < size:
        sentence = " ".join(rng.choices(words, k=rng.randint(3, 23))).capitalize() + rng.choice(
            [". ", "? ", "!\n", ".\n\n"]
        )
        pieces.append(sentence)
        length += len(sentence)
    return "".join(pieces)


def mixture(pieces: list[str], count: int, seed: int) -> str:
    return "".join(random.Random(seed).choices(pieces, k=count))


BIG_TEXTS = {
    "spaces x": lambda: " " * 1_200_000 + "x",
    "newlines x": lambda: "\n" * 1_200_000 + "x",
    "spaces at the end": lambda: "x" + " " * 1_200_000,
    "mixed whitespace": lambda: "x" + mixture([*WHITESPACE], 1_200_000, 3) + "x",
    "whitespace runs": lambda: mixture([*WHITESPACE, "\n" * 97, " " * 10_007, "x", " x"], 3_001, 5),
    "letters": lambda: "e" * 1_200_000,
    "space and letters": lambda: " " + "\xe9" * 1_200_000,
    "digits": lambda: "7" * 1_200_000,
    "punctuation": lambda: "!" * 1_200_000,
    "contractions": lambda: "'ll" * 400_009 + "'" * 300_007,
    "snippets": lambda: mixture(SNIPPETS, 600_011, 7),
    "ordinary": lambda: ordinary_text(campaign(1_000_000, 3_000_000)),
}


@pytest.mark.parametrize("name", campaign(["newlines x", "whitespace runs", "ordinary"], list(BIG_TEXTS)))
def test_large_text_has_the_ids_of_the_whole(vocabulary, name):
    """Megabytes in one call: no panic, no quadratic time, no other ids where the text was cut."""
    text = BIG_TEXTS[name]()
    assert len(text) >= 1_000_000
    ids = vocabulary.ours.encode(text)  # 0.04 to 0.6 s on two cores; a quadratic search for the runs took 33 s
    expected = vocabulary.reference_ids(text)
    assert len(ids) == len(expected)
    assert np.array_equal(ids, expected)
    assert vocabulary.ours.decode(ids) == text


@pytest.mark.parametrize(
    "text",
    ["\ud800", "a\udfffb", "\udc80" * 3, "a\ud83d", " " * 1_200_000 + "\ud800", "x\ud800" + "\n" * 1_200_000 + "x"],
    ids=["high", "low", "escaped bytes", "torn pair", "after many spaces", "before many newlines"],
)
@pytest.mark.parametrize("allow_special", [False, True])
def test_lone_surrogates_do_not_crash(tokenizer, text, allow_special):
    """File names and broken JSON put them in a str. They are replaced; the text around them stays."""
    around = "<" + text + ">"
    ids = tokenizer.encode(around, allow_special=allow_special)
    decoded = tokenizer.decode(ids)
    clean = "".join(c for c in around if not 0xD800 <= ord(c) < 0xE000)
    assert [decoded[0], decoded[-1]] == ["<", ">"]
    assert "".join(c for c in decoded if c not in "\ufffd?") == clean
