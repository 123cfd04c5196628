"""Detokenizers: they undo the word splitting of a benchmark's text, and remove the spaces that the splitting added.

WikiText and the Penn Treebank are stored as words with a space between each two words, also before a full stop. GPT-2
was not trained on such text, so its paper (section 3.1) undoes the splitting. Two changes cannot be undone and stay:
"<unk>" for rare words, and the Treebank's "N" for numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

ENDINGS = frozenset({"'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "n't"})  # ends of contractions, stored as words
CLOSING = frozenset({",", ".", ";", ":", "!", "?", "%", ")", "]", "}"})
OPENING = frozenset({"(", "[", "{", "$", "£", "€", "¥", "#"})


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which spaces are removed from a benchmark's text.

    Attributes:
      before: words with no space before them.
      after: words with no space after them.
      around: words with no space before or after them.
      between_numbers: words with no space before or after them, if both neighbors are numbers.
      pairs: pairs of words that were one word.
      spelt: {word of the benchmark: normal spelling}.
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
    """Undo the word splitting of WikiText, line by line.

    " @-@ ", " @,@ " and " @.@ " become "-", "," and "." inside a word or a number. "= = Career = =" becomes
    "== Career ==". Punctuation, brackets, quotes, "'s" and currency signs are spaced as in normal English. Only white
    space and the "@" signs are removed.
    """
    return _joined(text, WIKITEXT)


def ptb(text: str) -> str:
    """Undo the word splitting of the Penn Treebank, line by line: WSJ text, as it is stored or in lower case.

    Pairs of backticks or apostrophes become double quotes, and "-lrb-" and similar words become brackets. Slashes and
    asterisks lose the backslash before them. "n't", "'s", "can not", "gon na", punctuation and "$" are joined to their
    words. "<unk>" and "N" stay.
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
    """Return whether words[i] has no space before it, and whether it has none after it. Updates `is_open` (quotes)."""
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
        return previous.endswith("s"), False  # "the ships ' armour"; or feet, a year, or an unmatched quote
    is_open[word] = True
    return False, True
