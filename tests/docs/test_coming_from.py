"""The pages docs/coming_from: every table has rows that are checked, and every name of ours that they cite exists.

What a row says is checked by the file of its part, tests/docs/test_coming_from_PART.py.
"""

import ast
import re
from pathlib import Path

import coming_from
import pytest

ROWS = [row for page in coming_from.PAGES for row in coming_from.rows(page)]
OURS = re.compile(r"`((?:gpt2_jax|research|surgery|training)(?:\.\w+)+)")


def test_each_table_has_its_checks():
    """Each is in the part of one test file, which is there; that each row has a check, that file tests."""
    assert set(coming_from.PAGES) == {"flax", "transformer_lens", "nanogpt", "books"}
    parts = [(page, heading) for page, headings in coming_from.PARTS.values() for heading in headings]
    there = [(page, heading) for page in coming_from.PAGES for heading in coming_from.tables(page)]
    assert sorted(parts) == sorted(there)
    files = {
        path.stem.removeprefix("test_coming_from_") for path in Path(__file__).parent.glob("test_coming_from_*.py")
    }
    assert files - {"parity_lens", "parity_flax"} == set(coming_from.PARTS)


@pytest.mark.parametrize("page", coming_from.PAGES)
def test_each_table_is_one_of_rows(page):
    for table in coming_from.tables(page).values():
        assert table.count(coming_from.HEAD) == 1
        assert table[0] == coming_from.HEAD
        assert set(table[1]) <= set("|- ")
        assert len(table) > 3


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.page}: {row.theirs}")
def test_names_of_a_row_exist(row):
    assert row.theirs
    assert row.code
    for code in row.code:
        if not code.endswith(".png"):
            coming_from.check_code(code)


@pytest.mark.parametrize("page", coming_from.PAGES)
def test_names_in_the_text_exist(page):
    names = OURS.findall(coming_from.FENCE.sub("", coming_from.PAGES[page]))
    assert names
    for name in names:
        coming_from.resolve(ast.parse(name, mode="eval").body)


@pytest.mark.parametrize(
    "code",
    [
        "research.forwards(config, params, tokens)",
        "research.forward(config, params, tokens, captured='.')",
        "research.forward(config)",
        "gpt2_jax.GPT2(config).apply({}, tokens, mask=mask)",
        "config.vocab_size",
        "tokenizer.encoded(text)",
        "hL/resid_past",
    ],
)
def test_a_wrong_name_is_seen(code):
    with pytest.raises((AssertionError, AttributeError, TypeError, SyntaxError)):
        coming_from.check_code(code)


@pytest.mark.parametrize("line", ["--batch-siz 3", "gpt2-generate --top-n 3", "--steps no"])
def test_a_wrong_option_is_seen(line):
    with pytest.raises(SystemExit):
        coming_from.check_code(line)
