"""What uses a tokenizer works with the vocabularies that people have: processes, runs, streams, large texts."""

import json
import pickle

import hostile_vocabularies as hostile
import numpy as np
import pytest
import vocabulary_forms as forms
import vocabulary_makers as makers
from hypothesis import given, settings
from hypothesis import strategies as st
from strength import campaign

import gpt2_jax
from gpt2_jax.checkpoints import runs
from gpt2_jax.data import open_prepared, prepare
from gpt2_jax.generation.text import RowText
from gpt2_jax.recipe import Recipe
from gpt2_jax.research.pictures import token_labels
from gpt2_jax.tokenizer import fingerprint

BOTH = ["special first, named", "digits"]  # one form for each backend
TEXT = forms.TEXT


@pytest.mark.parametrize("name", BOTH)
def test_a_tokenizer_travels_to_other_processes(tmp_path, name):
    ours = forms.load(tmp_path, name)
    again = pickle.loads(pickle.dumps(ours))
    assert (again.eot, again.tokens, again.added, again.settings) == (ours.eot, ours.tokens, ours.added, ours.settings)
    assert again.encode(TEXT, allow_special=True) == ours.encode(TEXT, allow_special=True)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": TEXT + str(i)}) + "\n" for i in range(50)))
    one = prepare([tmp_path / "a.jsonl"], tmp_path / "one", ours, n_workers=1)
    two = prepare([tmp_path / "a.jsonl"], tmp_path / "two", ours, n_workers=2)
    assert one.digests() == two.digests()
    ids = np.concatenate([split.read(0, split.n_tokens)[0] for split in (one.train, one.val)])
    documents = np.split(ids, np.flatnonzero(ids == ours.eot) + 1)
    assert {ours.decode(document[:-1]) for document in documents if len(document)} == {TEXT + str(i) for i in range(50)}
    assert open_prepared(tmp_path / "one", again).train.n_tokens == one.train.n_tokens


@pytest.mark.parametrize("name", BOTH)
def test_a_run_keeps_the_tokenizer(tmp_path, name):
    ours = forms.load(tmp_path, name)
    config = forms.small_model(ours.n_vocab)[0]
    runs.write_run(tmp_path / "run", config, Recipe(), {}, ours)
    again = gpt2_jax.load_tokenizer(tmp_path / "run")
    assert (again.eot, again.added, fingerprint(again)) == (ours.eot, ours.added, fingerprint(ours))
    assert runs.write_run(tmp_path / "run", config, Recipe(), {}, again)  # resumed: it is the same tokenizer


def test_fingerprints_tell_tokenizers_apart(tmp_path, tokenizer):
    """The same tokens and merges, and other ids for the same text."""
    names = ("digits", "normalizer", "prefix space", "added_tokens_decoder", "added tokens that strip")
    found = [fingerprint(forms.load(tmp_path / name, name)) for name in names] + [fingerprint(tokenizer)]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", [*BOTH, "course", "byte fallback", "words", "added tokens that strip"])
def test_streamed_text_is_the_decoded_text(tmp_path, name):
    """Whatever the pieces. A stop string is found across tokens."""
    ours = forms.load(tmp_path, name)
    draw = np.random.default_rng(5)
    for _ in range(50):
        ids = [int(i) for i in draw.integers(0, ours.n_vocab, 30)]
        row = RowText(ours)
        assert "".join(row.add([i]) for i in ids) + row.end() == ours.decode(ids)
        assert b"".join(map(ours.token_bytes, ids)).decode(errors="replace") == ours.decode(ids)
        assert len(token_labels(ours, ids)) == 30
    ids = ours.encode("the man that stops here")
    row = RowText(ours, ["that"])
    text = row.add(ids) + row.end()
    assert row.stopped
    assert text.strip() == "the man"


def test_byte_level_decoding_is_that_of_the_library(tmp_path):
    ours = forms.load(tmp_path, "course")
    theirs = makers.course()
    draw = np.random.default_rng(6)
    for _ in range(campaign(200, 5_000)):
        ids = [int(i) for i in draw.integers(0, ours.n_vocab, 12)]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return forms.load(tmp_path_factory.mktemp("digits"), "digits")


@settings(deadline=None)
@given(text=st.text() | st.lists(st.sampled_from(hostile.hostile_texts(200, 9))).map("".join))
def test_the_other_backend_decodes_what_it_encodes(digits, text):
    assert digits.decode(digits.encode(text)) == digits.decode(digits.encode(text, allow_special=True)) == text


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ud83d\ude00"], ids=["high", "low", "pair"])
def test_lone_surrogates(digits, tokenizer, text):
    """Both backends read them as U+FFFD; a pair is a character."""
    assert digits.decode(digits.encode(text)) == tokenizer.decode(tokenizer.encode(text))


@pytest.mark.parametrize("name", ["digits", "prefix space", "added_tokens_decoder", "special first, named"])
@pytest.mark.parametrize("text", ["spaces", "newlines x", "words"])
def test_large_texts(tmp_path, name, text):
    """A megabyte takes a second, and the ids do not depend on where a long text is cut."""
    ours = forms.load(tmp_path, name)
    n = campaign(400_000, 3_000_000)
    words = "".join(hostile.hostile_texts(n // 40, 8)) + "x <user> 12  \n y" * (n // 16)
    text = {"spaces": " " * n, "newlines x": "\n" * n + "x", "words": words}[text]
    whole = ours.encode(text)
    if not ours.is_openai_form:
        assert whole == ours._backend._plain.encode(text, add_special_tokens=False).ids
    if name != "prefix space":
        assert ours.decode(whole) == text
