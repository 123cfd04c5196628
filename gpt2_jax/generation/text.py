"""A row's ids as text while they come: whole characters, cut where a stop string begins.

All matching is done on bytes, since a stop string may begin and end anywhere inside a token, and inside a character's
bytes a token may end. In UTF-8 that finds what a search in the decoded text would find, but for one character: bytes
that are no character come out as U+FFFD, and a U+FFFD in a stop string matches that character's own three bytes alone.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from gpt2_jax.tokenizer import Tokenizer


class RowText:
    """The new text of one row: takes ids, gives text as soon as it is certain, and stops at a stop string.

    The first token that completes a stop string stops the row, and the text ends where the earliest of those that it
    completes begins. How the ids are divided among the calls of `add` changes nothing of this. All pieces and `end()`
    joined are `tokenizer.decode` of the ids up to that place. The cost is linear in the number of ids.

    Attributes:
      ids: the ids that count: all that were added, or those that lie wholly before the stop string.
      stopped: a stop string was completed; what is added later is ignored.
    """

    ids: list[int]
    stopped: bool

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()):
        """Begin with no ids.

        Raises:
          ValueError: stop strings that `check_stop_strings` refuses.
        """
        self.ids, self.stopped, self._ended = [], False, False
        self._tokenizer = tokenizer
        self._stops = check_stop_strings(stop_strings)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps the first bytes of a character itself
        self._held = bytearray()  # what the decoder has not been given

    def add(self, ids: Iterable[int]) -> str:
        """Take new ids, and return the text that they make certain: no id to come can change it, or cut it off.

        Held back are the first bytes of a character, and what may turn out to be the beginning of a stop string. Two
        bytes that would begin a surrogate wait for a third too: they are no character, but Python's decoder keeps them.

        Raises:
          ValueError: an id is outside the vocabulary (the text of those before it comes with the next call), or
            `end` was called.
        """
        if self._ended:
            raise ValueError("the text has ended: take a new RowText for the next one")
        for i in ids:
            if self.stopped:
                break
            self._take(i)
        n_open = 0 if self.stopped else self._n_open()
        certain = self._held[: len(self._held) - n_open]
        del self._held[: len(certain)]
        # A stop string begins with a character's first byte: what is unfinished before it stays so.
        return self._decoder.decode(certain, final=self.stopped or n_open > 0)

    def end(self) -> str:
        """Return what was held back: no more ids come."""
        self._ended = True
        text = self._decoder.decode(self._held, final=True)
        self._held.clear()
        return text

    def _take(self, i: int) -> None:
        """Append an id's bytes, and if they complete stop strings, cut where the earliest begins."""
        token = self._tokenizer.token_bytes(i)
        n_before = len(self._held)
        self._held += token
        self.ids.append(int(i))
        starts = [self._held.find(stop, max(0, n_before - len(stop) + 1)) for stop in self._stops]
        if not (found := [start for start in starts if start >= 0]):
            return
        self.stopped = True
        n_beyond = len(self._held) - min(found)
        del self._held[min(found) :]
        while n_beyond > 0:
            n_beyond -= len(self._tokenizer.token_bytes(self.ids.pop()))

    def _n_open(self) -> int:
        """Return the length of the longest end of the held bytes that a stop string begins with; it is none whole."""
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
    """Return the bytes of each stop string, once.

    Raises:
      ValueError: not a sequence of strings, or one of them is empty or holds a lone surrogate.
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
            raise ValueError(f"the stop string {stop!r} holds a lone surrogate, which no text can contain") from error
    return list(stops)
