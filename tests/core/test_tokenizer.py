"""The tokenizer gives Hugging Face's ids for every text, accepts any input, and rejects broken vocabularies by name.

Hugging Face `tokenizers` and tiktoken put all 1,112,064 characters in the same class of GPT-2's splitting pattern
(checked one by one, tokenizers 0.23 and tiktoken 0.14). OpenAI's encoder.py splits with the `regex` module, whose
Unicode tables may be newer. It differs from both only on characters that were unassigned when their tables were made
(17,480 for regex 2026.11). So texts that are compared id for id contain only assigned characters.
"""

import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strength import campaign, full_only
from vocabularies import EOT, SNIPPETS, Vocabulary

import gpt2_jax

ROOT = Path(__file__).resolve().parents[2]
ASSIGNED = st.characters(exclude_categories=("Cs", "Cn"))
TEXTS = st.lists(st.one_of(st.sampled_from(SNIPPETS), st.text(ASSIGNED, max_size=5)), max_size=40).map("".join)


def assert_same_ids(vocabulary: Vocabulary, text: str) -> list[int]:
    """Our ids equal the reference's. A mismatch shows the first difference, not megabytes of ids."""
    ours, theirs = vocabulary.ours.encode(text), vocabulary.reference_ids(text)
    if ours != theirs:
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        pytest.fail(
            f"{len(ours)} ids against {len(theirs)}; from {at}: {ours[at : at + 9]} against {theirs[at : at + 9]}"
        )
    return ours


# ---- the ids of ordinary text


@settings(deadline=None, max_examples=300)
@given(text=TEXTS)
def test_ids_equal_hugging_face(vocabulary, text):
    """Any mixture of scripts, whitespace, contractions and control characters gives the reference's ids."""
    ids = assert_same_ids(vocabulary, text)
    assert vocabulary.ours.decode(ids) == text


def test_every_character_in_every_context(vocabulary):
    """Each assigned character next to a letter, a digit, a mark and a space: its class in the pattern is right."""
    chars = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cs", "Cn", "Co")]
    assert len(chars) > 140_000
    text = "".join(f"a{c}1{c} {c}!{c}a" for c in chars[:: campaign(7, 1)])
    ids = assert_same_ids(vocabulary, text)
    assert vocabulary.ours.decode(ids) == text


def test_every_token_alone(vocabulary):
    """The text of each token gives the ids that the merges lead to, usually its own id."""
    own = 0
    for i, token in enumerate(vocabulary.token_bytes[:-1]):
        try:
            text = token.decode("utf-8")
        except UnicodeDecodeError:
            continue
        ids = vocabulary.ours.encode(text)
        assert ids == vocabulary.reference_ids(text), text
        own += ids == [i]
    assert own > 0.9 * len(vocabulary.token_bytes) - 256


@settings(deadline=None)
@given(text=st.text())
def test_decode_gives_back_any_text(vocabulary, text):
    """All of Unicode is preserved, with unassigned characters; nothing is normalized, stripped or prefixed."""
    assert vocabulary.ours.decode(vocabulary.ours.encode(text)) == text


def test_known_ids_of_the_real_vocabulary(real):
    """Ids printed in papers and threads are the same here: no offset, no space in front."""
    tokenizer = real.ours
    known = {"hello": 31373, "Hello": 15496, "world": 6894, "the": 1169, " the": 262, "ing": 278, " ing": 5347,
             "!": 0, "ale": 1000, " pocket": 10000}  # fmt: skip
    for text, i in known.items():
        assert tokenizer.encode(text) == [i]
        assert tokenizer.decode([i]) == text
    assert (tokenizer.n_vocab, tokenizer.eot) == (50257, 50256)
    assert tokenizer.encode("The dog") == [464, 3290]


def test_embedded_vocabulary(model_dir, tokenizer):
    assert (tokenizer.n_vocab, tokenizer.eot) == (1281, 1280)
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""
    ids = tokenizer.encode("ROMEO:\nWhat light?")
    assert all(type(i) is int for i in ids)
    assert gpt2_jax.load_tokenizer(str(model_dir)).encode("ROMEO:\nWhat light?") == ids


@pytest.mark.parametrize("text", [None, 17, b"bytes", ["a", "list"]])
def test_encode_refuses_what_is_no_text(tokenizer, text):
    with pytest.raises(ValueError, match="str"):
        tokenizer.encode(text)


# ---- <|endoftext|>


@settings(deadline=None)
@given(parts=st.lists(TEXTS.map(lambda text: text.replace("|", "")), min_size=2, max_size=4))
def test_end_of_text_is_text_unless_asked(vocabulary, parts):
    """By default it stays text. With allow_special it becomes the id, and the text around it is encoded separately."""
    text = EOT.join(parts)
    eot = vocabulary.ours.eot
    plain = assert_same_ids(vocabulary, text)
    assert eot not in plain
    asked = vocabulary.ours.encode(text, allow_special=True)
    expected = vocabulary.reference_ids(parts[0])
    for part in parts[1:]:
        expected = [*expected, eot, *vocabulary.reference_ids(part)]
    assert asked == expected
    assert vocabulary.ours.decode(asked) == vocabulary.ours.decode(plain) == text


@pytest.mark.parametrize(
    "parts",
    [
        ("", ""),
        ("", "", ""),
        ("a   ", "   b"),
        ("a \n\n", "\n\n b"),
        ("x" + " " * 1_200_000, " " * 1_200_000 + "x"),
        pytest.param(("\n" * 1_200_000, "\n" * 1_200_000), marks=full_only("as many spaces are the huge run")),
        ("<|endof", "text|>"),
    ],
    ids=["alone", "twice", "spaces", "newlines", "huge spaces", "huge newlines", "nested"],
)
def test_special_next_to_whitespace(vocabulary, parts):
    """A run of whitespace of any length ends where the special token begins, as at the end of a text."""
    eot = vocabulary.ours.eot
    asked = vocabulary.ours.encode(EOT.join(parts), allow_special=True)
    expected = vocabulary.reference_ids(parts[0])
    for part in parts[1:]:
        expected += [eot, *vocabulary.reference_ids(part)]
    assert asked == expected, (len(asked), len(expected))
    assert eot not in vocabulary.ours.encode(EOT.join(parts))


# ---- decoding


@settings(deadline=None)
@given(data=st.data())
def test_any_ids_decode(vocabulary, data):
    """Incomplete characters become U+FFFD, never an exception: a model may produce any ids."""
    ids = data.draw(st.lists(st.integers(0, vocabulary.ours.n_vocab - 1), max_size=30))
    assert vocabulary.ours.decode(ids) == b"".join(vocabulary.token_bytes[i] for i in ids).decode("utf-8", "replace")


def test_decode_takes_arrays(tokenizer, reference):
    """Rows of an id array decode like a list of the same ids."""
    row = reference["greedy"][0]
    assert tokenizer.decode(row) == tokenizer.decode(row.tolist()) == tokenizer.decode(tuple(row.tolist()))


@pytest.mark.parametrize("bad", [1281, 1282, -1, 50256, 2**31, 2**32, 2**64, -(2**63)])
def test_ids_outside_the_vocabulary(tokenizer, bad):
    with pytest.raises(ValueError, match=rf"(?<!\d){bad}(?!\d)") as caught:
        tokenizer.decode([5, bad, 7])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ids", ["17", [1.5], [None], ["the"], None, 17])
def test_decode_refuses_what_are_no_ids(tokenizer, ids):
    with pytest.raises(ValueError, match="id"):
        tokenizer.decode(ids)


# ---- the bytes of one token


def test_token_bytes(vocabulary):
    """Every token's bytes are those that its name in encoder.json spells. The special token's are its name."""
    ours = [vocabulary.ours.token_bytes(i) for i in range(vocabulary.ours.n_vocab)]
    assert ours == vocabulary.token_bytes
    assert ours[vocabulary.ours.eot] == EOT.encode()
    assert vocabulary.ours.token_bytes(vocabulary.ours.n_vocab - 2) == ours[-2]


def test_token_bytes_of_an_added_token(tokenizer):
    """The bytes of a token added after `<|endoftext|>` are its name in UTF-8."""
    padded = gpt2_jax.Tokenizer({**tokenizer.tokens, "[P\xc4D]": tokenizer.n_vocab}, tokenizer.merges)
    assert padded.token_bytes(tokenizer.n_vocab) == "[P\xc4D]".encode()
    assert padded.decode([tokenizer.n_vocab]) == "[P\xc4D]"


def test_token_bytes_of_an_array_element(tokenizer, reference):
    row = reference["greedy"][0]
    assert b"".join(map(tokenizer.token_bytes, row)).decode("utf-8", "replace") == tokenizer.decode(row)


@pytest.mark.parametrize("bad", [1281, -1, 2**64, -(2**63), "17", 1.5, None, b"a", [5]])
def test_token_bytes_refuses_what_is_no_id(tokenizer, bad):
    with pytest.raises(ValueError, match="id") as caught:
        tokenizer.token_bytes(bad)
    assert str(bad) in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- no download, no cache


def test_no_network_and_no_cache_folder(model_dir, tmp_path):
    """Without tiktoken's cache and without connections, it loads, works and leaves no file."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    program = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise AssertionError('a connection was attempted')\n"
        "socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse\n"
        "import sys, gpt2_jax\n"
        "tokenizer = gpt2_jax.load_tokenizer(sys.argv[1])\n"
        "print(tokenizer.decode(tokenizer.encode('To be, or not to be')))\n"
    )
    nowhere = str(scratch / "missing")
    env = os.environ | dict.fromkeys(("HOME", "XDG_CACHE_HOME", "TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"), nowhere)
    env |= {"TMPDIR": str(scratch), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(model_dir.resolve())],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "To be, or not to be\n"), done.stderr
    assert list(scratch.iterdir()) == []


INTERRUPTED = """
import re
import tokenizers
from gpt2_jax.tokenizer import openai

def compile(*args):
    raise KeyboardInterrupt

re.purge()
re._compiler.compile = compile
try:
    openai.is_canonical({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_in_the_first_call_of_the_library_is_no_panic():
    """Its first call asks NumPy for its version, which compiles a regular expression. It must not fail there."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")
