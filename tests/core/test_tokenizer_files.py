"""Vocabulary files that are missing, malformed or of another model are rejected by name, in one sentence."""

import json
import shutil
from pathlib import Path

import pytest

import gpt2_jax

EOT = "<|endoftext|>"


@pytest.fixture
def vocabulary_dir(model_dir, tmp_path):
    """A copy of the embedded vocabulary that a test may break, in a folder without hparams.json."""
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(model_dir / name, tmp_path / name)
        (tmp_path / name).chmod(0o644)
    return tmp_path


def assert_refused(directory: Path, match: str, error: type[Exception] = ValueError) -> str:
    with pytest.raises(error, match=match) as caught:
        gpt2_jax.load_tokenizer(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_vocabulary_alone_is_enough(vocabulary_dir):
    assert gpt2_jax.load_tokenizer(vocabulary_dir).n_vocab == 1281


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
def test_missing_file(vocabulary_dir, name):
    (vocabulary_dir / name).unlink()
    assert_refused(vocabulary_dir, name.replace(".", r"\."), FileNotFoundError)


def test_missing_directory(tmp_path):
    assert_refused(tmp_path / "no-such-model", "no-such-model", FileNotFoundError)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"!": 0,', b"[]", b"{}", b"null", b"17", b'{"\xff": 0}', b"<?xml version='1.0'?>", b"[" * 200_000],
    ids=["empty", "open", "truncated", "list", "no tokens", "null", "number", "not utf-8", "xml", "too deep"],
)
def test_malformed_encoder(vocabulary_dir, content):
    (vocabulary_dir / "encoder.json").write_bytes(content)
    assert_refused(vocabulary_dir, r"encoder\.json")


def swapped(ids: dict, a: str, b: str) -> dict:
    return ids | {a: ids[b], b: ids[a]}


def renamed(ids: dict, old: str, new: str) -> dict:
    return {new if token == old else token: i for token, i in ids.items()}


ENCODER_EDITS = {
    "gap at the end": lambda ids: ids | {EOT: 1290},
    "gap inside": lambda ids: {token: i for token, i in ids.items() if i != 700},
    "duplicate": lambda ids: ids | {"!": 1},
    "negative": lambda ids: ids | {"!": -1},
    "float": lambda ids: ids | {"!": 0.5},
    "string": lambda ids: ids | {"!": "0"},
    "null": lambda ids: ids | {"!": None},
    "list": lambda ids: ids | {"!": [0]},
    "huge": lambda ids: ids | {"!": 2**70},
    "character that is no byte": lambda ids: renamed(ids, "ory", "\u6f22"),
    "missing byte": lambda ids: renamed(ids, "!", "zzz"),
    "token no merge makes": lambda ids: renamed(ids, "ory", "zzz"),
    "swapped merges": lambda ids: swapped(ids, "\u0120t", "he"),
}


@pytest.mark.parametrize("edit", ENCODER_EDITS.values(), ids=ENCODER_EDITS)
def test_wrong_encoder(vocabulary_dir, edit):
    """Ids must be 0 .. n-1, each once, and follow the order of the merges. Anything else would give wrong text."""
    path = vocabulary_dir / "encoder.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    assert_refused(vocabulary_dir, r"encoder\.json")


def test_no_end_of_text(vocabulary_dir):
    """It is None. What needs it says so."""
    path = vocabulary_dir / "encoder.json"
    ids = json.loads(path.read_text(encoding="utf-8"))
    del ids[EOT]
    path.write_text(json.dumps(ids), encoding="utf-8")
    tokenizer = gpt2_jax.load_tokenizer(vocabulary_dir)
    assert (tokenizer.eot, tokenizer.n_vocab, tokenizer.added) == (None, 1280, {})
    assert tokenizer.encode(f"a{EOT}", allow_special=True) == tokenizer.encode(f"a{EOT}")
    with pytest.raises(ValueError, match="an empty prompt needs an end-of-text token, and the vocabulary has none"):
        tokenizer.prompt("")


MERGES_EDITS = {
    "swapped": lambda lines: [*lines[:5], lines[6], lines[5], *lines[7:]],
    "dropped": lambda lines: [*lines[:500], *lines[501:]],
    "last dropped": lambda lines: [*lines[:-2], ""],
    "cut off": lambda lines: lines[:301],
    "one more": lambda lines: [*lines[:-1], "z z", ""],
    "twice": lambda lines: [*lines[:7], *lines[6:]],
    "of unknown parts": lambda lines: [*lines[:9], "zzz zzz", *lines[10:]],
    "three parts": lambda lines: [*lines[:9], lines[9] + " x", *lines[10:]],
    "one part": lambda lines: [*lines[:9], lines[9].replace(" ", ""), *lines[10:]],
    "character that is no byte": lambda lines: [*lines[:9], "\u6f22 \u5b57", *lines[10:]],
    "only the version": lambda lines: [lines[0], ""],
}


@pytest.mark.parametrize("edit", MERGES_EDITS.values(), ids=MERGES_EDITS)
def test_merges_out_of_step(vocabulary_dir, edit):
    """The n-th merge makes token 256 + n: one line lost or moved would shift every later id."""
    path = vocabulary_dir / "vocab.bpe"
    path.write_text("\n".join(edit(path.read_text(encoding="utf-8").split("\n"))), encoding="utf-8")
    assert_refused(vocabulary_dir, r"vocab\.bpe")


@pytest.mark.parametrize(
    "content",
    [b"", b"#version: 0.2\n\xff\xfe t\n", b"\x00" * 99, b"<Error>" + b"NoSuchBucket " * 99, b"x\n" + b"a" * 9999],
    ids=["empty", "not utf-8", "zeros", "error page", "long line"],
)
def test_malformed_merges(vocabulary_dir, content):
    (vocabulary_dir / "vocab.bpe").write_bytes(content)
    assert_refused(vocabulary_dir, r"vocab\.bpe")


@pytest.mark.parametrize("n_vocab", [1281 + 1024, 1279, 50257])
def test_vocabulary_of_another_model(vocabulary_dir, model_dir, n_vocab):
    """A vocabulary next to another model's hparams.json has other ids: the warning has both sizes."""
    hparams = json.loads((model_dir / "hparams.json").read_text(encoding="utf-8")) | {"n_vocab": n_vocab}
    (vocabulary_dir / "hparams.json").write_text(json.dumps(hparams), encoding="utf-8")
    with pytest.warns(UserWarning, match=rf"1,281 ids, but .* n_vocab = {n_vocab:,} rows: .* another model") as caught:
        gpt2_jax.load_tokenizer(vocabulary_dir)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("n_vocab", [1280, 1281, 1344, 1281 + 1023])
def test_a_padded_embedding_and_an_added_token_without_a_row(vocabulary_dir, model_dir, n_vocab):
    """50,304 rows for 50,257 ids (karpathy/build-nanogpt#95), and "[PAD]" without a row (transformers#29899)."""
    hparams = json.loads((model_dir / "hparams.json").read_text(encoding="utf-8")) | {"n_vocab": n_vocab}
    (vocabulary_dir / "hparams.json").write_text(json.dumps(hparams), encoding="utf-8")
    tokenizer = gpt2_jax.load_tokenizer(vocabulary_dir)
    assert (tokenizer.n_vocab, tokenizer.eot) == (1281, None if n_vocab == 1280 else 1280)


def test_a_token_that_no_merge_makes_is_named(tmp_path):
    """It is found quickly among 50,258 tokens: a search through all names for each token took minutes."""
    vocabularies = pytest.importorskip("vocabularies")
    shutil.copy(vocabularies.real_vocabulary_dir() / "vocab.bpe", tmp_path)
    ids = json.loads((vocabularies.real_vocabulary_dir() / "encoder.json").read_text(encoding="utf-8"))
    ids |= {"padpad": 50256, "<|endoftext|>": 50257}
    (tmp_path / "encoder.json").write_text(json.dumps(ids), encoding="utf-8")
    assert_refused(tmp_path, r"holds 'padpad', id 50256, which no line of .*vocab\.bpe makes")


def test_tokens_added_after_the_end_of_text(tmp_path, model_dir, tokenizer):
    """Text that spells such a token stays text, unless special tokens are allowed. The id decodes to its name."""
    shutil.copy(model_dir / "vocab.bpe", tmp_path)
    ids = tokenizer.tokens | {"[PAD]": 1281, "<|user|>": 1282}
    (tmp_path / "encoder.json").write_text(json.dumps(ids), encoding="utf-8")
    more = gpt2_jax.load_tokenizer(tmp_path)
    assert (more.n_vocab, more.eot) == (1283, 1280)
    assert more.added == {"<|endoftext|>": 1280, "[PAD]": 1281, "<|user|>": 1282}
    text = "a [PAD]<|user|> b<|endoftext|>"
    assert more.encode(text) == tokenizer.encode(text)
    a, b = tokenizer.encode("a "), tokenizer.encode(" b")
    assert more.encode(text, allow_special=True) == [*a, 1281, 1282, *b, 1280]
    assert more.decode([1282, *tokenizer.encode(" b"), 1281]) == "<|user|> b[PAD]"
    more.to_files(tmp_path / "again.json", tmp_path / "again.bpe")
    again = gpt2_jax.Tokenizer.from_files(tmp_path / "again.json", tmp_path / "again.bpe")
    assert (again.tokens, again.added) == (ids, more.added)


def test_merges_that_spell_the_end_of_text_are_refused(vocabulary_dir):
    """Ordinary text would become the special token."""
    ids = json.loads((vocabulary_dir / "encoder.json").read_text(encoding="utf-8"))
    next_id = ids.pop(EOT)
    with (vocabulary_dir / "vocab.bpe").open("a", encoding="utf-8") as merges:
        for end in range(2, len(EOT) + 1):
            if EOT[:end] not in ids:
                ids[EOT[:end]] = next_id
                next_id += 1
                merges.write(f"{EOT[: end - 1]} {EOT[end - 1]}\n")
    (vocabulary_dir / "encoder.json").write_text(json.dumps(ids), encoding="utf-8")
    (vocabulary_dir / "hparams.json").unlink(missing_ok=True)
    assert_refused(vocabulary_dir, r"makes <\|endoftext\|> by merging")


@pytest.mark.parametrize("merges", [5, None, [1], [None], [(1, 2)], [("a", None)], [("a",)], ["a b"]], ids=repr)
def test_merges_that_are_not_pairs_of_tokens(tokenizer, merges):
    with pytest.raises(ValueError, match=r"the merges.* pairs? of tokens") as caught:
        gpt2_jax.Tokenizer(tokenizer.tokens, merges)
    assert "\n" not in str(caught.value)
