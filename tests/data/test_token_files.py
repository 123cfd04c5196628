"""Token files: reading gives what was written, and files that do not fit are refused with one sentence."""

import json
import os

import numpy as np
import pytest
import token_folders

import gpt2_jax
from gpt2_jax.data._prepare import prepare
from gpt2_jax.data.token_files import Tokens, id_dtype, is_prepared, open_prepared
from gpt2_jax.tokenizer import fingerprint


@pytest.fixture
def folder(tmp_path, tokenizer):
    records = [{"p": text[:7], "c": text[7:]} for text in token_folders.DOCUMENTS]
    source = token_folders.write_jsonl(tmp_path / "pairs.jsonl", records)
    kwargs = {"prompt_field": "p", "completion_field": "c", "split": "tail", "val_fraction": 0.25}
    prepare([source], tmp_path / "tokens", tokenizer, **kwargs)
    return tmp_path / "tokens"


@pytest.fixture(scope="module")
def other(tokenizer):
    """A vocabulary of the same size with two ids exchanged."""
    tokens = dict(tokenizer.tokens)
    tokens["!"], tokens["?"] = tokens["?"], tokens["!"]
    return gpt2_jax.Tokenizer(tokens, tokenizer.merges)


def assert_refused(culprit, *args, kind=ValueError, **kwargs):
    with pytest.raises(kind, match=culprit) as error:
        open_prepared(*args, **kwargs)
    assert "\n" not in str(error.value)


def test_every_part_of_a_file_can_be_read(tmp_path):
    mask = np.arange(101) % 3 == 0
    tokens = token_folders.counting(tmp_path / "a.bin", 101, mask)
    for start, count in [(0, 101), (0, 0), (101, 0), (7, 13), (100, 1)]:
        ids, counts = tokens.read(start, count)
        assert (ids.dtype, counts.dtype) == (np.int32, np.float32)
        np.testing.assert_array_equal(ids, np.arange(start, start + count))
        np.testing.assert_array_equal(counts, mask[start : start + count])
    for start, count in [(-1, 2), (100, 2), (102, 0), (5, -1)]:
        with pytest.raises(ValueError, match=r"a\.bin has 101 tokens"):
            tokens.read(start, count)


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    assert (id_dtype(65_535), id_dtype(65_536)) == (np.dtype("<u2"), np.dtype("<u4"))
    np.array([70_000, 1, 65_536], "<u4").tofile(tmp_path / "a.bin")
    assert Tokens(tmp_path / "a.bin", 3, 70_001).read(0, 3)[0].tolist() == [70_000, 1, 65_536]


def test_the_layout_is_nanogpts(folder, tokenizer):
    """Little-endian uint16, one after another; read here without the package."""
    prepared, raw = open_prepared(folder), (folder / "train.bin").read_bytes()
    ids = [raw[i] + 256 * raw[i + 1] for i in range(0, len(raw), 2)]
    assert ids == token_folders.held(prepared.train)
    assert len(ids) == prepared.manifest["train"]["tokens"]
    assert max(ids) == tokenizer.eot
    assert len((folder / "train.mask.bin").read_bytes()) == len(ids)


def test_opened_as_prepared(folder, tokenizer):
    prepared = open_prepared(folder, tokenizer, n_vocab=1281)
    assert is_prepared(folder)
    assert prepared.train.n_vocab == 1281
    assert [tokens.n_tokens for tokens in (prepared.train, prepared.val)] == [
        prepared.manifest[name]["tokens"] for name in ("train", "val")
    ]
    assert prepared.digests() == prepared.manifest["sha256"]
    assert json.loads((folder / "tokens.json").read_text()) == prepared.manifest
    prepared.check()


def test_another_vocabulary_is_refused(folder, other, tokenizer):
    assert fingerprint(other) != fingerprint(tokenizer)
    assert fingerprint(gpt2_jax.Tokenizer(tokenizer.tokens, tokenizer.merges)) == fingerprint(tokenizer)
    assert_refused(r"tokens was prepared with a different vocabulary \(1,281 ids", folder, other)
    assert_refused("vocabulary of 1,281 ids, but the model has 1,280", folder, n_vocab=1280)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "train.mask.bin", "val.mask.bin"])
def test_a_damaged_file_is_refused(folder, name):
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert_refused(f"{name} has changed: its sha256 is", folder)
    path.write_bytes(data[:-1])
    assert_refused(f"{name} has .* bytes, but tokens.json says {len(data):,}", folder)
    path.unlink()
    assert_refused(
        "no train.bin" if name == "train.bin" else f"{name} has no bytes", folder, kind=(ValueError, OSError)
    )


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda manifest: manifest | {"gpt2_jax_tokens": 2}, "has version 2; this program reads version 1"),
        (lambda manifest: {"some": "thing"}, "not the manifest"),
        (lambda manifest: [manifest], "not the manifest"),
        (lambda manifest: manifest | {"n_vocab": "1281"}, "is damaged"),
        (lambda manifest: {name: manifest[name] for name in manifest if name != "val"}, "is damaged"),
        (lambda manifest: manifest | {"train": {}}, "is damaged"),
        (lambda manifest: manifest | {"sha256": 5}, "is damaged"),
    ],
)
def test_a_manifest_that_is_none(folder, change, culprit):
    path = folder / "tokens.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert_refused(f"tokens.json {culprit}|{culprit}", folder)
    path.write_text("{")
    assert_refused("is not JSON", folder)


def test_nothing_there(tmp_path):
    assert_refused("no such file or folder", tmp_path / "none", kind=FileNotFoundError)
    assert_refused(r"has no train\.bin: prepare the folder with gpt2-prepare", tmp_path, kind=FileNotFoundError)
    assert not is_prepared(tmp_path)


def test_files_of_nanogpt(tmp_path, tokenizer):
    np.arange(29, dtype="<u2").tofile(tmp_path / "train.bin")
    np.arange(7, dtype="<u2").tofile(tmp_path / "val.bin")
    prepared = open_prepared(tmp_path, tokenizer)
    assert prepared.manifest is None
    assert token_folders.held(prepared.train) == list(range(29))
    assert token_folders.held(prepared.val) == list(range(7))
    assert sorted(prepared.digests()) == ["train.bin", "val.bin"]
    assert open_prepared(tmp_path, n_vocab=29).train.n_vocab == 29
    assert_refused("pass the tokenizer", tmp_path)


def test_a_lone_file(tmp_path, tokenizer):
    np.arange(29, dtype="<u2").tofile(tmp_path / "a.bin")
    prepared = open_prepared(tmp_path / "a.bin", tokenizer)
    assert (prepared.train.n_tokens, prepared.val, prepared.manifest) == (29, None, None)
    assert is_prepared(tmp_path / "a.bin")
    os.truncate(tmp_path / "a.bin", 57)
    assert_refused("57 bytes, which is not a whole number of 2-byte ids", tmp_path / "a.bin", tokenizer)


def test_ids_outside_the_vocabulary_are_found_as_they_are_read(tmp_path, tokenizer):
    np.array([5, 1280, 7, 1281, 9], "<u2").tofile(tmp_path / "a.bin")
    tokens = open_prepared(tmp_path / "a.bin", tokenizer).train
    assert tokens.read(0, 3)[0].tolist() == [5, 1280, 7]
    with pytest.raises(ValueError, match=r"a\.bin: token 3 is the id 1281, outside the vocabulary of 1,281 ids"):
        tokens.read(2, 3)


def test_a_file_that_becomes_shorter(tmp_path):
    tokens = token_folders.counting(tmp_path / "a.bin", 101)
    os.truncate(tokens.path, 40)
    with pytest.raises(OSError, match=r"a\.bin has become shorter: 20 tokens are left"):
        tokens.read(10, 20)


def test_an_id_without_a_row_is_refused_when_it_is_read(folder):
    """An added token of the vocabulary may have no row in the model: JAX would read another row in silence."""
    prepared = open_prepared(folder)
    ids = prepared.train.read(0, prepared.train.n_tokens)[0]
    assert np.array_equal(prepared.within(int(ids.max()) + 1).train.read(0, len(ids))[0], ids)
    with pytest.raises(ValueError, match=rf"has the id {ids.max()}, but the model has only {ids.max():,} rows"):
        prepared.within(int(ids.max())).train.read(0, len(ids))
