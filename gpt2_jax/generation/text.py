"""Turns a row's ids into text as they come: whole characters, cut where a stop string begins.

Matching is done on bytes, because a stop string may begin and end inside a token, and a token may end inside a
character. In UTF-8 this finds what a search in the decoded text would find, with one exception: bytes that are not a
character decode to U+FFFD, but a U+FFFD in a stop string matches only that character's own three bytes.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from gpt2_jax.tokenizer import Tokenizer


class RowText:
    """The new text of one row. It takes ids, returns text as soon as it is certain, and stops at a stop string.

    The first token that completes a stop string stops the row. If it completes several, the text ends where the
    earliest begins. The result does not depend on how the ids are divided among calls of `add`. All pieces and `end()`,
    joined, are `tokenizer.decode` of the ids up to the stop. The cost is linear in the number of ids.

    Attributes:
      ids: all added ids, or only those entirely before the stop string.
      stop: the stop string that ended the row, or None. If several begin at the same place, it is the first of them in
        `stop_strings`. Ids added later are ignored.
    """

    ids: list[int]
    stop: str | None

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()):
        """Start with no ids.

        Raises:
          ValueError: `check_stop_strings` rejects the stop strings.
        """
        self.ids, self.stop, self._ended = [], None, False
        self._tokenizer = tokenizer
        self._stops = check_stop_strings(stop_strings)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps the first bytes of a character itself
        self._held = bytearray()  # bytes that the decoder has not read yet

    @property
    def stopped(self) -> bool:
        """Whether a stop string was completed."""
        return self.stop is not None

    def add(self, ids: Iterable[int]) -> str:
        """Add new ids, and return the text that is now certain: no later id can change it or cut it off.

        The first bytes of a character are held back, and so is the possible beginning of a stop string. Two bytes that
        would begin a surrogate wait for a third too: they are not a character, but Python's decoder keeps them.

        Raises:
          ValueError: an id is outside the vocabulary (the text of the ids before it comes with the next call), or
            `end` was called.
        """
        if self._ended:
            raise ValueError("the text has ended: make a new RowText for the next one")
        for i in ids:
            if self.stopped:
                break
            self._take(i)
        n_open = 0 if self.stopped else self._n_open()
        certain = self._held[: len(self._held) - n_open]
        del self._held[: len(certain)]
        # A stop string begins with a character's first byte, so an unfinished character before it stays unfinished.
        return self._decoder.decode(certain, final=self.stopped or n_open > 0)

    def end(self) -> str:
        """Return the text that was held back. No ids may follow."""
        self._ended = True
        text = self._decoder.decode(self._held, final=True)
        self._held.clear()
        return text

    def _take(self, i: int) -> None:
        """Append an id's bytes. If they complete stop strings, cut where the earliest begins."""
        token = self._tokenizer.token_bytes(i)
        n_before = len(self._held)
        self._held += token
        self.ids.append(int(i))
        starts = [self._held.find(stop, max(0, n_before - len(stop) + 1)) for stop in self._stops]
        if not (found := [start for start in starts if start >= 0]):
            return
        first = min(found)
        self.stop = self._stops[starts.index(first)].decode()
        n_beyond = len(self._held) - first
        del self._held[first:]
        while n_beyond > 0:
            n_beyond -= len(self._tokenizer.token_bytes(self.ids.pop()))

    def _n_open(self) -> int:
        """Return the length of the longest end of the held bytes that is the beginning of a stop string."""
        longest = 0
        for stop in self._stops:
            start = max(0, len(self._held) - len(stop) + 1)
            while (start := self._held.find(stop[:1], start)) >= 0:
                if stop.startswith(self._held[start:]):
                    longest = max(longest, len(self._held) - start)
                    break
                start += 1
        return longest


def check_stop_strings(stop_strings: Sequence[str]) -> list[bytes]:
    """Return the bytes of each stop string, without duplicates.

    Raises:
      ValueError: not a sequence of strings, or one of them is empty or contains a lone surrogate.
    """
    if isinstance(stop_strings, str):
        raise ValueError(f"stop_strings must be a list of strings, not one string: pass [{stop_strings!r}]")
    if not isinstance(stop_strings, Iterable):
        raise ValueError(f"stop_strings must be a list of strings, not {stop_strings!r}")
    stops = {}
    for stop in stop_strings:
        if not isinstance(stop, str) or not stop:
            raise ValueError(f"stop_strings must hold strings, none of them empty, not {stop!r}")
        try:
            stops[stop.encode()] = None
        except UnicodeEncodeError as error:
            raise ValueError(f"the stop string {stop!r} has a lone surrogate, which no text can contain") from error
    return list(stops)
