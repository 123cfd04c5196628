"""Token files of other programs: llm.c's are read, others are refused with a sentence, and ours never are."""

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from token_folders import expected_ids, held

from gpt2_jax.data._prepare import prepare
from gpt2_jax.data.bare import layout_of
from gpt2_jax.data.encoding import encode_documents, encode_group
from gpt2_jax.data.fields import Fields
from gpt2_jax.data.reading import END
from gpt2_jax.data.sources import Range, Sources
from gpt2_jax.data.token_files import open_prepared

TEXT = Path(__file__).parents[2] / "examples" / "the-verdict.txt"
U2 = np.dtype("<u2")


@pytest.fixture(scope="module")
def ids(tokenizer):
    return np.array(tokenizer.encode(TEXT.read_text(encoding="utf-8")), "<u2")


def llmc(ids, magic=20240520, version=1, n_tokens=None) -> bytes:
    """As write_datafile of karpathy/llm.c, dev/data/data_common.py."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if n_tokens is None else n_tokens
    return header.tobytes() + np.asarray(ids, "<u2").tobytes()


def refused(path, tokenizer, culprit):
    """Opened to train on, and read by gpt2-prepare."""
    for read in (
        lambda: open_prepared(path, tokenizer),
        lambda: list(Sources([path], Fields(), tokenizer.n_vocab, tokenizer.eot).pieces()),
    ):
        with pytest.raises(ValueError, match=culprit) as error:
            read()
        assert "\n" not in str(error.value)
        assert path.stem in str(error.value)


# ---- llm.c


def test_files_of_llmc_are_read(tmp_path, tokenizer, ids):
    for name, some in (("train", ids[:-999]), ("val", ids[-999:])):
        (tmp_path / f"{name}.bin").write_bytes(llmc(some))
    data = open_prepared(tmp_path, tokenizer)
    assert held(data.train) == ids[:-999].tolist()
    assert held(data.val) == ids[-999:].tolist()
    assert data.train.read(5, 7)[0].tolist() == ids[5:12].tolist()


@pytest.mark.parametrize("block", [2, 6, 1024, 2**20])
def test_their_documents_are_prepared(tmp_path, tokenizer, monkeypatch, block):
    monkeypatch.setattr("gpt2_jax.data.reading.BLOCK", block)
    expected = expected_ids(tokenizer, ["Some words.", "Others.", "And more of them"])
    (tmp_path / "a.bin").write_bytes(llmc([tokenizer.eot, *expected[:-1]]))  # llm.c puts the id before each document
    prepared = prepare([tmp_path / "a.bin"], tmp_path / "t", tokenizer, val_fraction=0)
    assert held(prepared.train) == expected
    assert prepared.manifest["empty_documents"] == 1
    found = Sources([tmp_path / "a.bin"], Fields(), tokenizer.n_vocab, tokenizer.eot)
    assert sum(map(len, encode_documents(found.pieces(), tokenizer))) == len(expected) - 3
    edges = [0, *range(block, 1024 + 2 * len(expected), block), END]
    pieces = [piece for _, some in found.read([Range(0, *pair) for pair in pairwise(edges)]) for piece in some]
    assert encode_group(tokenizer, pieces).ids.tolist() == expected


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"version": 2}, "is a token file of llm.c in version 2; this program reads version 1"),
        ({"n_tokens": 50}, "has 1,222 bytes, but its header says 50 ids, which need 1,124"),
        ({"magic": 20240801}, "it is a file of llm.c with the ids of Llama 3"),
        ({"magic": 20240522}, "it is a file of llm.c with questions"),
    ],
)
def test_other_files_of_llmc_are_refused(tmp_path, tokenizer, change, culprit):
    (tmp_path / "a.bin").write_bytes(llmc(range(99), **change))
    refused(tmp_path / "a.bin", tokenizer, culprit)


def test_gpt2s_ids_for_a_larger_vocabulary(tmp_path):
    (tmp_path / "a.bin").write_bytes(llmc(range(99)))
    with pytest.raises(ValueError, match="with GPT-2's ids, but the vocabulary is larger"):
        open_prepared(tmp_path / "a.bin", n_vocab=70_000)


# ---- refused


@pytest.mark.parametrize("dtype", ["<u4", "<i4", "<i8"])
@pytest.mark.parametrize("count", [40, 10_000])
def test_wider_ids(tmp_path, tokenizer, ids, dtype, count):
    """As uint16 they would be an id and a 0 in turn: every one is in the vocabulary."""
    np.resize(ids, count).astype(dtype).tofile(tmp_path / "a.bin")
    refused(
        tmp_path / "a.bin", tokenizer, rf"a\.bin has ids of {dtype[-1]} bytes, but the ids .* of 1,281 have 2 bytes"
    )


def test_wider_ids_of_a_larger_vocabulary(tmp_path, ids):
    (ids.astype("<u4") * 100).tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match="has ids of 4 bytes"):
        open_prepared(tmp_path / "a.bin", n_vocab=60_000)


def test_the_characters_of_nanogpt(tmp_path, tokenizer):
    """Its data/shakespeare_char. The pickle is never read."""
    text = TEXT.read_text(encoding="utf-8")
    numbers = {character: i for i, character in enumerate(sorted(set(text)))}
    for name in ("train", "val"):
        np.array([numbers[character] for character in text], "<u2").tofile(tmp_path / f"{name}.bin")
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    culprit = "train.bin has ids of another vocabulary, the characters in meta.pkl beside it: prepare the text itself"
    with pytest.raises(ValueError, match=culprit):
        open_prepared(tmp_path, tokenizer)
    refused(tmp_path / "train.bin", tokenizer, culprit)
    assert open_prepared(tmp_path, n_vocab=len(numbers)).train.n_tokens == len(text)  # a model of these characters
    (tmp_path / "meta.pkl").unlink()
    with pytest.warns(UserWarning, match="the ids are all below 256, in a vocabulary of 1,281") as caught:
        open_prepared(tmp_path / "val.bin", tokenizer)
    assert len(caught) == 1


def test_text_and_ids_of_one_byte(tmp_path):
    """Two letters are an id of GPT-2."""
    data = np.frombuffer(TEXT.read_bytes(), np.uint8)
    for name, content in (("text", data), ("characters", np.unique(data, return_inverse=True)[1].astype(np.uint8))):
        content[: len(content) // 2 * 2].tofile(tmp_path / f"{name}.bin")
        with pytest.raises(ValueError, match=f"{name}.bin has one byte for each character or id"):
            open_prepared(tmp_path / f"{name}.bin", n_vocab=50257)


def test_arrays_and_archives(tmp_path, tokenizer, ids):
    buffer = io.BytesIO()
    np.save(buffer, ids)
    for data, what in [
        (buffer.getvalue(), r"an array of NumPy \(\.npy\)"), (b"PK\x03\x04" + bytes(96), "a file of PyTorch"),
        (b"\x1f\x8b" + bytes(98), "compressed with gzip"), (b"LITPKDS" + bytes(93), "packed by LitGPT"),
    ]:  # fmt: skip
        (tmp_path / "a.bin").write_bytes(data)
        refused(tmp_path / "a.bin", tokenizer, what)


# ---- no false alarms


def test_real_ids_are_not_refused(tmp_path, ids):
    rng = np.random.default_rng(3)
    n = 20_000
    ranks = np.minimum(rng.zipf(1.2, n), 50_257) - 1
    files = {
        "the embedded vocabulary": (ids, 1281),
        "few ids": (ids[:17], 1281),
        "empty": (ids[:0], 1281),
        "Zipf": (ranks, 50_257),
        "uniform": (rng.integers(0, 65_535, n), 65_535),
        "uniform, half": (rng.integers(0, 32_768, n), 65_535),
        "zeros": (np.zeros(n), 256),
        "ones": (np.ones(n), 256),
        "counting": (np.arange(n), 50_257),
        "bytes without merges": (rng.integers(0, 256, n), 257),
        "letters": (rng.integers(0, 65, n), 65),
        "every second one is !": (np.where(np.arange(n) % 2, ranks, 0), 50_257),
        "pairs": (np.where(np.arange(n) % 2, 5, ranks), 50_257),
        "sums modulo 97": ((np.arange(n) * 5) % 97, 97),
    }
    for i, (name, (values, n_vocab)) in enumerate(files.items()):
        np.asarray(values).astype("<u2").tofile(tmp_path / f"{i}.bin")
        assert layout_of(tmp_path / f"{i}.bin", U2, n_vocab) == (0, len(values)), name
    (np.arange(99, dtype="<u4")).tofile(tmp_path / "wide.bin")
    assert layout_of(tmp_path / "wide.bin", np.dtype("<u4"), 70_000) == (0, 99)


def test_one_bad_id_is_found_before_training(tmp_path, tokenizer, ids):
    """It would end the run at the step that reads it, and again after each resume."""
    many = np.resize(ids, 700_000)
    many[650_001] = 1281
    many.tofile(tmp_path / "a.bin")
    data = open_prepared(tmp_path / "a.bin", tokenizer)
    with pytest.raises(ValueError, match=r"a\.bin: token 650,001 is the id 1281, outside the vocabulary of 1,281 ids"):
        data.digests()
    many[650_001] = 1280
    many.tofile(tmp_path / "a.bin")
    assert list(data.digests()) == ["a.bin"]
    with pytest.raises(ValueError, match="has the id 1280, but the model has only 1,280 rows"):
        data.within(1280).digests()
