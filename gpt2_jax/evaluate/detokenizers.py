"""Text as it was before a benchmark cut it into words: the spaces that the cutting put in are taken out again.

WikiText and the Penn Treebank are stored as words with a space between any two, so that a full stop stands alone. GPT-2
has never seen text like that, and its paper (section 3.1) undoes it. What is lost for good stays as it is: "<unk>" for
rare words, and the Treebank's "N" for numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

ENDINGS = frozenset({"'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "n't"})  # of contractions: cut off as words
CLOSING = frozenset({",", ".", ";", ":", "!", "?", "%", ")", "]", "}"})
OPENING = frozenset({"(", "[", "{", "$", "£", "€", "¥", "#"})


@dataclasses.dataclass(frozen=True)
class Rules:
    """Where a benchmark's text loses a space.

    Attributes:
      before: words with no space before them.
      after: words with none behind them.
      around: words with neither.
      between_numbers: words with neither if numbers stand on both sides.
      pairs: two words that were one.
      spelt: what stands for a word that the benchmark spells in its own way.
    """

    before: frozenset[str] = CLOSING | ENDINGS
    after: frozenset[str] = OPENING
    around: frozenset[str] = frozenset()
    between_numbers: frozenset[str] = frozenset()
    pairs: frozenset[tuple[str, str]] = frozenset()
    spelt: Mapping[str, str] = dataclasses.field(default_factory=dict)


WIKITEXT = Rules(
    before=CLOSING | ENDINGS | {"°"},
    # U+2044 is the bar of a fraction, U+2014 a dash between clauses, U+2013 one between years.
    around=frozenset({"@-@", "@,@", "@.@", "/", "\u2044", "\u2014"}),
    between_numbers=frozenset({"\u2013", ":"}),
    pairs=frozenset({("=", "="), ("°", "C"), ("°", "F")}),  # "= = Career = =" is a heading
    spelt={"@-@": "-", "@,@": ",", "@.@": "."},
)
BRACKETS = {"-lrb-": "(", "-rrb-": ")", "-lsb-": "[", "-rsb-": "]", "-lcb-": "{", "-rcb-": "}"}
BRACKETS |= {name.upper(): bracket for name, bracket in BRACKETS.items()}
PTB = Rules(
    before=CLOSING | ENDINGS | {"''", "'"} | {name for name in BRACKETS if BRACKETS[name] in CLOSING},
    after=OPENING | {"``", "`", "us$", "c$", "US$", "C$"} | {name for name in BRACKETS if BRACKETS[name] in OPENING},
    pairs=frozenset({("can", "not"), ("gon", "na"), ("wan", "na"), ("got", "ta")}),
    spelt=BRACKETS | {"``": '"', "''": '"', "`": "'"},
)


def wikitext(text: str) -> str:
    """Undo WikiText's cutting into words, line by line.

    " @-@ ", " @,@ " and " @.@ " become "-", "," and "." within a word or a number; "= = Career = =" becomes
    "== Career =="; punctuation, brackets, quotes, "'s" and signs of currency go where English has them. Nothing but
    white space, and the "@"s, goes.
    """
    return _joined(text, WIKITEXT)


def ptb(text: str) -> str:
    r"""Undo the Penn Treebank's cutting into words, line by line: WSJ text in its own spelling or in lower case.

    "``" and "''" become quotes, "-lrb-" and the like brackets, "\/" a slash and "\*" a star; "n't", "'s", "can not",
    "gon na", punctuation and "$" are joined to their words. "<unk>" and "N" stay.
    """
    return _joined(text.replace("\\/", "/").replace("\\*", "*"), PTB)


DETOKENIZERS: Mapping[str, Callable[[str], str]] = {"none": str, "wikitext": wikitext, "ptb": ptb}


def _joined(text: str, rules: Rules) -> str:
    lines = ([word for word in line.split(" ") if word.strip()] for line in text.split("\n"))
    return "\n".join(_join_line(words, rules) for words in lines)


def _join_line(words: Sequence[str], rules: Rules) -> str:
    line, apart, is_open = [], False, {'"': False, "'": False}
    for i, word in enumerate(words):
        previous = words[i - 1] if i else ""
        joins_left, joins_right = _joins(words, i, rules, is_open)
        if apart and not joins_left and (previous, word) not in rules.pairs:
            line.append(" ")
        line.append(rules.spelt.get(word, word))
        apart = not joins_right
    return "".join(line)


def _joins(words: Sequence[str], i: int, rules: Rules, is_open: dict[str, bool]) -> tuple[bool, bool]:
    """Say whether words[i] has no space before it, and whether it has none behind it; note quotes in `is_open`."""
    previous, word, following = (words[j] if 0 <= j < len(words) else "" for j in (i - 1, i, i + 1))
    is_between_numbers = previous[-1:].isdigit() and following[:1].isdigit()
    if word in rules.around or (word in rules.between_numbers and is_between_numbers):
        return True, True
    if word in rules.before or word in rules.after:
        return word in rules.before, word in rules.after
    if word not in is_open:
        return False, False
    if is_open[word]:
        is_open[word] = False
        return True, False
    if word == "'" and (previous.endswith("s") or word not in words[i + 1 :]):
        return previous.endswith("s"), False  # the ships ' armour; or feet, or a year, or left over
    is_open[word] = True
    return False, True
