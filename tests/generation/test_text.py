"""RowText against the simple way: decode all ids at every token, and search for the stop strings in the text."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.generation.text import RowText, check_stop_strings

TEXTS = [
    "To be, or not to be: that is the question.\n\nHAMLET:\n", "aaaa", "abab", "aab", " ", "\n\n", "<|endoftext|>",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\U0001f1eb\U0001f1f7\U0001f1e9\U0001f1ea",
    "\U0001f44d\U0001f3fd", "\u6f22\u5b57\u304b\u306a", "\ud55c\uae00", "e\u0301\u0323", "\u0928\u093f", "caf\xe9",
    "\ufffd", "\U0010ffff", "\x00",
]  # fmt: skip
SMALL = st.text("ab\xe9\xe8\U0001f468\u200d\ufffd", min_size=1, max_size=5)
STOPS = st.lists(st.one_of(SMALL, st.sampled_from([text[:3] for text in TEXTS] + TEXTS)), max_size=4)


@st.composite
def ids_of_any_kind(draw, tokenizer):
    """Whole texts, any ids (incomplete characters), single bytes, and small texts with one byte per token."""
    single = [tokenizer.encode(chr(i))[0] for i in range(128)]
    by_byte = {tokenizer.token_bytes(i): i for i in range(256)}
    parts = st.one_of(
        st.sampled_from(TEXTS).map(tokenizer.encode),
        st.lists(st.integers(0, tokenizer.n_vocab - 1), max_size=5),
        st.lists(st.integers(0, 255), max_size=4),
        SMALL.map(lambda text: [by_byte[bytes([byte])] for byte in text.encode()]),
        SMALL.map(tokenizer.encode),
        st.lists(st.sampled_from(single), max_size=3),
    )
    return [i for part in draw(st.lists(parts, max_size=9)) for i in part]


def plain(tokenizer, ids, stops):
    """Return (text, ids, stop) from the whole text after every token; stop is None if there was none."""
    token_bytes = [tokenizer.token_bytes(i) for i in ids]
    for n in range(len(ids) + 1):
        whole = b"".join(token_bytes[:n])
        if found := [(whole.index(stop.encode()), i) for i, stop in enumerate(stops) if stop.encode() in whole]:
            cut, which = min(found)
            n_whole = max(m for m in range(n + 1) if len(b"".join(token_bytes[:m])) <= cut)
            return whole[:cut].decode("utf-8", "replace"), ids[:n_whole], stops[which]
    return tokenizer.decode(ids), ids, None


def in_calls(tokenizer, ids, stops, sizes):
    """Add the ids, a few at a time, and return the pieces and the row."""
    row, pieces, start = RowText(tokenizer, stops), [], 0
    for size in sizes:
        pieces.append(row.add(ids[start : start + size]))
        start += size
    pieces.append(row.add(ids[start:]))
    pieces.append(row.end())
    return pieces, row


@settings(max_examples=300)
@given(st.data(), STOPS, st.lists(st.integers(0, 4), max_size=40))
def test_pieces_joined_are_the_text_cut_at_the_earliest_stop_string(tokenizer, data, stops, sizes):
    ids = data.draw(ids_of_any_kind(tokenizer))
    text, counted, stop = plain(tokenizer, ids, stops)
    pieces, row = in_calls(tokenizer, ids, stops, sizes)
    assert ("".join(pieces), row.ids, row.stop) == (text, counted, stop)
    assert text.startswith(tokenizer.decode(counted).rstrip("\ufffd"))


@settings(max_examples=300)
@given(st.data(), st.sampled_from(TEXTS), st.integers(0, 9), st.integers(1, 9))
def test_a_stop_string_out_of_the_text_itself_is_found(tokenizer, data, last, start, length):
    """Stop strings that occur in the text, anywhere in the tokens. Some are the beginnings of others."""
    ids = [*data.draw(ids_of_any_kind(tokenizer)), *tokenizer.encode(last)]
    text = tokenizer.decode(ids)
    stops = [stop for stop in (text[start : start + length], text[start : start + 2], last) if stop]
    text, counted, stop = plain(tokenizer, ids, stops)
    assert stop or "\ufffd" in "".join(stops)
    for sizes in ([], [1] * len(ids), [3, 1, 5]):
        pieces, row = in_calls(tokenizer, ids, stops, sizes)
        assert ("".join(pieces), row.ids, row.stop) == (text, counted, stop)


@settings(max_examples=300)
@given(st.data(), STOPS)
def test_what_was_given_is_certain_and_nothing_certain_is_held_back(tokenizer, data, stops):
    """At every token all text is returned, except a possible beginning of a stop string and an incomplete character."""
    ids = data.draw(ids_of_any_kind(tokenizer))
    row, given_out = RowText(tokenizer, stops), ""
    for n, i in enumerate(ids, start=1):
        given_out += row.add([i])
        if row.stopped:
            assert given_out == plain(tokenizer, ids[:n], stops)[0]
            return
        whole = b"".join(map(tokenizer.token_bytes, ids[:n]))
        n_open = max(
            (k for stop in stops for k in range(len(stop.encode())) if whole.endswith(stop.encode()[:k])), default=0
        )
        expected = whole[: len(whole) - n_open].decode("utf-8", "replace")
        futures = [(whole + bytes([byte] * 3)).decode("utf-8", "replace") for byte in (0x80, 0x90, 0xA0, 0xBF)]
        if not n_open and not all(future.startswith(expected) for future in futures):
            expected = expected.removesuffix("\ufffd")
        elif not n_open and whole[-2:-1] == b"\xed" and whole[-1] in range(0xA0, 0xC0):
            expected = expected[:-2]  # half a surrogate, never a character: Python's decoder waits for a third
        assert given_out == expected


def test_pieces_as_they_come(tokenizer):
    """A family emoji comes one character at a time; a possible beginning of a stop string comes when it is not one."""
    row = RowText(tokenizer, ["STOP", "\n\n"])
    by_byte = {tokenizer.token_bytes(i): i for i in range(256)}

    def piece(data: bytes) -> str:
        return "".join(row.add([by_byte[bytes([byte])]]) for byte in data)

    assert piece("\U0001f468".encode()[:3]) == ""
    assert piece("\U0001f468".encode()[3:]) == "\U0001f468"
    assert piece(b"a ST") == "a "
    assert piece(b"x") == "STx"
    assert piece(b"\xe6\xbc") == ""
    assert piece(b"S") == "\ufffd"  # it cannot be completed, and S may begin a stop string
    assert piece(b"T\n") == "ST"
    assert piece(b"\nmore") == ""
    assert row.stopped
    assert tokenizer.decode(row.ids) == "\U0001f468a STx\ufffdST"
    assert row.add([3, -1, 10**9]) == row.end() == ""  # any id is ignored

    row = RowText(tokenizer, ["\n"])
    assert row.add([by_byte[b"\xe6"]]) == ""
    assert row.add([by_byte[b"\n"]]) == "\ufffd"  # does not wait for `end`


@pytest.mark.parametrize(
    ("text", "stops", "left"),
    [
        ("abcd", ["abc", "ab"], ""),  # a stop string that begins another is complete first
        ("xabcd", ["bcd", "abc"], "x"),
        ("xabcd", ["cd", "bc"], "xa"),
        ("aaab", ["aab"], "a"),
        ("ababc", ["abc"], "ab"),
        ("one STO two", ["STOP"], "one STO two"),
        ("caf\xe9", ["\xe9"], "caf"),
        ("caf\xe9", ["\xe8"], "caf\xe9"),  # its first byte is the same
        ("\ufffdx", ["\ufffd"], ""),
    ],
)
def test_by_hand_a_byte_a_token(tokenizer, text, stops, left):
    by_byte = {tokenizer.token_bytes(i): i for i in range(256)}
    row = RowText(tokenizer, stops)
    assert row.add([by_byte[bytes([byte])] for byte in text.encode()]) + row.end() == left
    assert tokenizer.decode(row.ids) == left


def test_of_those_one_token_completes_the_earliest_counts(tokenizer):
    """The one that begins first counts, even if the other ends first. The token in which it begins is left out."""
    long = max(range(tokenizer.n_vocab - 1), key=lambda i: len(tokenizer.token_bytes(i)))
    text = tokenizer.decode([long])
    assert len(text) >= 4
    row = RowText(tokenizer, [text[2:3], text[1:]])
    assert row.add([*tokenizer.encode("!"), long, long]) == "!" + text[:1]
    assert row.ids == tokenizer.encode("!")
    assert row.stopped
    assert row.stop == text[1:]


def test_bytes_that_are_no_character_are_no_replacement_character(tokenizer):
    """U+FFFD as a stop string means that character, not a replacement of invalid bytes."""
    torn = next(i for i in range(256) if tokenizer.token_bytes(i) == b"\xff")
    row = RowText(tokenizer, ["\ufffd"])
    assert row.add([torn, *tokenizer.encode("a\ufffdb")]) == "\ufffda"
    assert row.stopped


def test_an_id_outside_the_vocabulary_loses_nothing(tokenizer):
    row = RowText(tokenizer)
    ids = tokenizer.encode("To be")
    with pytest.raises(ValueError, match="1281"):
        row.add([*ids, tokenizer.n_vocab])
    assert row.ids == ids
    assert row.add(tokenizer.encode("!")) + row.end() == "To be!"
    with pytest.raises(ValueError, match="ended"):
        row.add(ids)


@pytest.mark.parametrize(
    ("stops", "message"),
    [("STOP", r"list.*\['STOP'\]"), ([""], "''"), (["a", None], "None"), (5, "list"), (None, "list"), ([b"a"], "b'a'"),
     (["a\ud800"], "surrogate")],
)  # fmt: skip
def test_stop_strings_that_are_none(tokenizer, stops, message):
    with pytest.raises(ValueError, match=message) as error:
        RowText(tokenizer, stops)
    assert "\n" not in str(error.value)


def test_stop_strings_are_bytes_once():
    assert check_stop_strings(("b", "\xe9", "b")) == [b"b", b"\xc3\xa9"]


@pytest.mark.parametrize("n_in_a_call", [1, 16, 20_011])
def test_linear_in_the_number_of_ids(tokenizer, n_in_a_call):
    """Ten stop strings that almost occur everywhere: 16 times the ids take about 16 times as long, not 256 times."""
    stops = [*(f"STOP{i}" for i in range(5)), "The end of the", "\n\n", "zzz", "end of thx", "e" * 997]
    pattern = tokenizer.encode("The end of STO the end of th\n")

    def seconds(n_ids: int) -> float:
        ids = (pattern * n_ids)[:n_ids]
        row, start = RowText(tokenizer, stops), time.process_time()
        for first in range(0, n_ids, n_in_a_call):
            row.add(ids[first : first + n_in_a_call])
        assert len(row.ids) == n_ids
        return time.process_time() - start

    few, many = min(seconds(1250) for _ in range(3)), min(seconds(20_011) for _ in range(2))
    print(f"\n{n_in_a_call} ids a call: {many / 20_011 * 1e6:.1f} \xb5s an id")
    assert many < 64 * few
