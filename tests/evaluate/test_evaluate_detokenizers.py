"""Detokenizers: they turn a benchmark's words into normal English, and lose only spaces."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.evaluate.detokenizers import DETOKENIZERS, ptb, wikitext

WIKITEXT = [
    ("a well @-@ known , 12 @.@ 5 m long boat of 1 @,@ 200 tons .", "a well-known, 12.5 m long boat of 1,200 tons."),
    ("the four @-@ by @-@ four race", "the four-by-four race"),
    (" = Robert Bruce = ", "= Robert Bruce ="),
    (" = = Early years = = ", "== Early years =="),
    (" = = = 1990 \u2013 1995 = = = ", "=== 1990\u20131995 ==="),
    ("the years 1990 \u2013 1995 were good \u2013 or so", "the years 1990\u20131995 were good \u2013 or so"),
    ("by stones — and nails", "by stones—and nails"),
    ('the song " My Days " , from " Two " .', 'the song "My Days", from "Two".'),
    ('He said , " Go ! " and went .', 'He said, "Go!" and went.'),
    ("( see [ 3 ] ; or { 4 } ) : yes ?", "(see [3]; or {4}): yes?"),
    ("the town 's mayor didn 't say they 're late", "the town's mayor didn't say they're late"),
    ("the ships ' guns and the ' long ' one", "the ships' guns and the 'long' one"),
    ("it cost $ 3 @.@ 5 million or £ 2 , 20 % more", "it cost $3.5 million or £2, 20% more"),
    ("at 60 km / h and 3 \u2044 4 mile", "at 60 km/h and 3\u20444 mile"),
    ("at 7 : 30 : the end", "at 7:30: the end"),
    ("38 @.@ 5 ° C , an angle of 5 ° east", "38.5°C, an angle of 5° east"),
    ("<unk> said <unk> 's word", "<unk> said <unk>'s word"),
    (" \n = A = \n \n One . \n", "\n= A =\n\nOne.\n"),
    ("a lone ' mark and a lone \" mark", "a lone ' mark and a lone \"mark"),
    ("don't touch it, \"really\"", "don't touch it, \"really\""),
    ("", ""),
]  # fmt: skip
PTB = [
    ("mr. <unk> did n't say it 's over", "mr. <unk> didn't say it's over"),
    ("he ca n't , wo n't and can not", "he can't, won't and cannot"),
    ("they 're gon na sell , i 'm told", "they're gonna sell, i'm told"),
    ("shares rose $ N to $ N a share", "shares rose $N to $N a share"),
    ("it fell N N , or us$ N million , N %", "it fell N N, or us$N million, N%"),
    ("the dealers ' association 's view", "the dealers' association's view"),
    ("`` No , '' he said -LRB- twice -RRB- .", '"No," he said (twice).'),
    ("a -lcb- b -rcb- and -lsb- c -rsb-", "a {b} and [c]"),
    ("a `` so-called ` blue ' chip ''", "a \"so-called 'blue' chip\""),
    ("N 1\\/2 of S\\*P ; and/or", "N 1/2 of S*P; and/or"),
    (' he said " yes " \n no \n', 'he said "yes"\nno\n'),
]


@pytest.mark.parametrize(("cut", "text"), WIKITEXT)
def test_wikitext(cut, text):
    assert wikitext(cut) == text
    assert DETOKENIZERS["wikitext"](cut) == text


@pytest.mark.parametrize(("cut", "text"), PTB)
def test_ptb(cut, text):
    assert ptb(cut) == text
    assert DETOKENIZERS["ptb"](cut) == text


def test_none_changes_nothing():
    assert DETOKENIZERS["none"](" a , b \n") == " a , b \n"


characters = [*"aB7,.;:!?()[]{}%$£#/-=\"'°", "\u2044", "\u2013", "\u2014"]
words = st.sampled_from([*characters, "12", "@-@", "@,@", "@.@", "'s", "n't", "<unk>"])
spaced = st.lists(st.one_of(words, st.text(st.characters(exclude_characters=" \n"), min_size=1)), max_size=23)


@given(st.lists(spaced, min_size=1, max_size=3))
def test_wikitext_loses_nothing_but_white_space_and_marks(lines):
    cut = " \n ".join(" ".join(line) for line in lines)
    marks = re.compile(r"(?:(?<= )|^)@([-,.])@(?= |$)", re.MULTILINE)
    kept = "".join(marks.sub(r"\1", cut).split())
    assert "".join(wikitext(cut).split()) == kept
    assert wikitext(cut).count("\n") == len(lines) - 1


@given(st.text("abN7 ", max_size=41))
def test_plain_words_keep_single_spaces(text):
    for detokenize in (wikitext, ptb):
        assert detokenize(text) == " ".join(text.split())
