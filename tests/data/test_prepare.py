"""`prepare`: the same ids for any file type, any cuts and any number of processes; the split; kills and refusals."""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import forks
import numpy as np
import pytest
import vocabularies
from hypothesis import given
from hypothesis import strategies as st
from strength import campaign
from token_folders import DOCUMENTS, expected_ids, held, snapshot, write_jsonl

from gpt2_jax.data import encoding, reading
from gpt2_jax.data._prepare import prepare
from gpt2_jax.data.sources import Fields, Piece, Sources
from gpt2_jax.data.splitting import divide
from gpt2_jax.data.token_files import open_prepared


@pytest.fixture
def made(tmp_path, tokenizer):
    """Give make(*names, ...), which prepares sources, by default without validation, and returns `Prepared`."""

    def make(*names, name="tokens", **settings):
        return prepare(names, tmp_path / name, tokenizer, **{"val_fraction": 0} | settings)

    return make


def write_texts(folder: Path, texts) -> Path:
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text, encoding="utf-8", newline="")
    return folder


# ---- the ids


def test_end_of_text_is_the_id_after_each_document(made, tmp_path, tokenizer):
    """The same characters inside a text stay ordinary text."""
    prepared = made(write_texts(tmp_path / "texts", DOCUMENTS))
    ids = held(prepared.train)
    assert ids == expected_ids(tokenizer, DOCUMENTS)
    assert ids.count(tokenizer.eot) == len(DOCUMENTS)
    assert "<|endoftext|> is text here" in tokenizer.decode(ids)
    assert prepared.val is None
    counts = {name: prepared.manifest[name] for name in ("characters", "bytes", "end_of_text_as_text", "files")}
    text = "".join(DOCUMENTS)
    assert counts == {"characters": len(text), "bytes": len(text.encode()), "end_of_text_as_text": 1, "files": 5}
    assert prepared.manifest["train"] == {"tokens": len(ids), "documents": 5}


def test_a_lone_document_has_none(made, tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(DOCUMENTS[0])
    assert held(made(tmp_path / "a.txt").train) == tokenizer.encode(DOCUMENTS[0])


def test_every_form_gives_the_same_ids(made, tmp_path, tokenizer, monkeypatch):
    expected = expected_ids(tokenizer, DOCUMENTS)
    write_jsonl(tmp_path / "a.jsonl", [{"n": 1, "body": text} for text in DOCUMENTS])
    write_jsonl(tmp_path / "strings.jsonl", DOCUMENTS)
    quoted = ['"' + text.replace('"', '""') + '"' for text in DOCUMENTS]
    (tmp_path / "one.csv").write_text("\r\n".join(["whatever", *quoted]), encoding="utf-8-sig", newline="")
    rows = ["n,body", *(f"{i},{text}" for i, text in enumerate(quoted))]
    (tmp_path / "two.CSV").write_text("\n".join(rows), encoding="utf-8", newline="")
    np.array(expected[:-1], "<u2").tofile(tmp_path / "a.bin")
    for i, (name, field) in enumerate(
        [("a.jsonl", "body"), ("strings.jsonl", "text"), ("one.csv", "text"), ("two.CSV", "body"), ("a.bin", "text")]
    ):
        assert held(made(tmp_path / name, name=f"{i}", field=field).train) == expected, name
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(DOCUMENTS[3].encode())))
    (tmp_path / "b.txt").write_text(DOCUMENTS[1])
    assert held(made("-", tmp_path / "b.txt", name="in").train) == expected_ids(tokenizer, [DOCUMENTS[3], DOCUMENTS[1]])


def test_a_byte_order_mark_is_no_text(made, tmp_path, tokenizer):
    for name, text in [("a.txt", "one"), ("b.jsonl", '{"text": "two"}'), ("c.csv", 'text\n"three"')]:
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    got = made(tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.csv")
    assert held(got.train) == expected_ids(tokenizer, ["one", "two", "three"])


def test_a_folder_is_read_by_name_and_hidden_and_other_files_are_not(made, tmp_path, tokenizer):
    folder = tmp_path / "texts"
    for name in ("b/2.txt", "b/10.txt", "a.TXT", "c.docx", ".hidden.txt", ".git/x.txt", "b.jsonl", "d.MD"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) if name == "b.jsonl" else name)
    expected = ["a.TXT", "b.jsonl", "b/10.txt", "b/2.txt", "d.MD"]
    assert held(made(folder).train) == expected_ids(tokenizer, expected)


def test_empty_documents_are_left_out_and_counted(made, tmp_path, tokenizer):
    (tmp_path / "0.txt").write_text("")
    (tmp_path / "1.csv").write_text('text\n"a b"\n\n""\n')
    write_jsonl(tmp_path / "2.jsonl", [{"text": ""}, {"text": "c"}])
    eot = tokenizer.eot
    np.array([eot, eot, *tokenizer.encode("d"), eot], "<u2").tofile(tmp_path / "3.bin")
    np.array([], "<u2").tofile(tmp_path / "4.bin")
    prepared = made(tmp_path / "0.txt", *(tmp_path / name for name in ("1.csv", "2.jsonl", "3.bin", "4.bin")))
    assert held(prepared.train) == expected_ids(tokenizer, ["a b", "c", "d"])
    assert prepared.manifest["empty_documents"] == 6


def test_documents_in_a_bin_file_are_told_apart_wherever_it_is_cut(tmp_path, tokenizer, monkeypatch):
    documents = [[5, 6, 7], [8], [9, 10], [11] * 5]
    ids = [i for document in documents for i in [*document, tokenizer.eot]]
    for n_last, block in [(0, 2), (0, 4), (0, 6), (0, 8), (0, 14), (1, 4), (1, 10), (2, 6)]:
        np.array(ids[: len(ids) - n_last], "<u2").tofile(tmp_path / "a.bin")
        monkeypatch.setattr(reading, "BLOCK", block)
        found = Sources([tmp_path / "a.bin"], Fields(), tokenizer.n_vocab, tokenizer.eot)
        got = encoding.encode_group(tokenizer, list(found.pieces()))
        assert got.ids.tolist() == ([*ids[:-2], tokenizer.eot] if n_last == 2 else ids), block
        assert found.tally.n_empty == 0


@given(
    text=st.lists(st.sampled_from([*vocabularies.SNIPPETS, "x" * 9, " word"]), max_size=40).map("".join),
    block=st.integers(3, 23),  # the first block must hold a byte order mark
)
def test_pieces_of_a_text_are_tokenised_as_the_whole(tmp_path_factory, tokenizer, text, block):
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK", block)
        pieces = list(Sources([path], Fields()).pieces())
    whole = text.removeprefix("\ufeff")
    assert "".join(piece.text for piece in pieces) == whole
    assert [i for piece in pieces for i in tokenizer.encode(piece.text)] == tokenizer.encode(whole)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)


def test_ordinary_text_is_cut_about_every_block(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 101)
    for end in ("\n", "\r\n"):
        (tmp_path / "a.txt").write_bytes(((" some words of text " * 4).strip() + end).encode() * 83)
        sizes = [len(piece.text) for piece in Sources([tmp_path / "a.txt"], Fields()).pieces()]
        assert len(sizes) > 55
        assert max(sizes) < 130


def test_any_number_of_processes_writes_the_same(made, tmp_path, monkeypatch):
    """Bytes of all files, with pieces small enough that each process gets several."""
    monkeypatch.setattr(encoding, "BLOCK", 499)
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"{text} {i}" * (i % 13)} for i in range(90) for text in DOCUMENTS])
    one = made(tmp_path / "a.jsonl", name="1", n_workers=1, val_fraction=0.2)
    made(tmp_path / "a.jsonl", name="3", n_workers=3, val_fraction=0.2)
    assert one.manifest["split"] == "documents"
    contents = [sorted((path.name, data) for path, data in snapshot(tmp_path / name).items()) for name in "13"]
    assert contents[0] == contents[1]


def test_a_process_that_dies_is_told(tokenizer):
    """The process is killed, as when memory runs out; nothing hangs."""

    def pieces():
        for _ in range(9):
            yield Piece("some words of text" * 2**16)
        multiprocessing.active_children()[0].kill()
        while True:
            yield Piece("some words of text" * 2**16)

    with pytest.raises(OSError, match="a process that encodes text died, perhaps because memory ran out: use fewer"):
        list(encoding.encode_all(pieces(), tokenizer, 2))
    assert not multiprocessing.active_children()


def test_a_program_that_cannot_start_others_is_told_why(tmp_path):
    """It has no `if __name__ == "__main__":`, so each new process would start more processes."""
    (tmp_path / "a.txt").write_text("some words")
    (tmp_path / "program.py").write_text("""if True:
        import gpt2_jax; from gpt2_jax.data._prepare import prepare
        tokenizer = gpt2_jax.load_tokenizer(gpt2_jax.embedded_model())
        prepare(["a.txt"], "tokens", tokenizer, n_workers=2)
    """)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "OSError: a process that encodes text cannot be started: put the code of your program" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "program.py"]


def test_a_large_file_takes_little_memory(tmp_path):
    """30 MB of text in one document, with a tokenizer that takes almost no memory."""

    class Bytes:
        n_vocab, eot, tokens, merges = 257, 256, {}, ()

        def encode(self, text):
            return np.frombuffer(text.encode(), np.uint8)

    line = b"What is in memory does not grow with the text.\n"
    (tmp_path / "a.txt").write_bytes(line * (30 * 2**20 // len(line)))
    tracemalloc.start()
    try:
        prepared = prepare([tmp_path / "a.txt"], tmp_path / "tokens", Bytes(), n_workers=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert prepared.train.n_tokens + prepared.val.n_tokens == (tmp_path / "a.txt").stat().st_size
    assert peak < 15 * 2**20, peak  # several copies of a block of 1 MB; 8 MB at a time when files are divided


# ---- prompts and completions


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_the_completion_and_the_end_after_it_count(made, tmp_path, tokenizer, form):
    pairs = [("Q: who?", " Me."), ("", "no prompt"), ("no completion", ""), ("", ""), ("What now", " Go. Go")]
    if form == "jsonl":
        path = write_jsonl(tmp_path / "a.jsonl", [{"q": prompt, "a": answer} for prompt, answer in pairs])
    else:
        path = tmp_path / "a.csv"
        path.write_text("a,x,q\n" + "".join(f'"{answer}",1,"{prompt}"\n' for prompt, answer in pairs))
    prepared = made(path, prompt_field="q", completion_field="a")
    ids, counts = prepared.train.read(0, prepared.train.n_tokens)
    expected, mask = [], []
    for prompt, answer in [pair for pair in pairs if any(pair)]:
        parts = tokenizer.encode(prompt), [*tokenizer.encode(answer), tokenizer.eot]
        expected += [*parts[0], *parts[1]]
        mask += [0] * len(parts[0]) + [1] * len(parts[1])
    assert ids.tolist() == expected
    assert counts.tolist() == mask
    assert prepared.manifest["train"]["targets"] == sum(mask)
    assert prepared.manifest["empty_documents"] == 1


def test_a_lone_pair_keeps_its_end(made, tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "Who?", "a": " Me."}])
    assert held(made(path, prompt_field="q", completion_field="a").train)[-1] == tokenizer.eot


def test_masks_are_divided_with_their_tokens(made, tmp_path, tokenizer):
    """Prompts are x and completions y: an id says what its mask must be."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "x" * (i % 5 + 1), "a": "y" * (i % 7)} for i in range(97)])
    for split in ("documents", "tail"):
        prepared = made(path, prompt_field="q", completion_field="a", val_fraction=0.3, split=split, name=split)
        for tokens in (prepared.train, prepared.val):
            ids, counts = tokens.read(0, tokens.n_tokens)
            is_prompt = [i != tokenizer.eot and "x" in tokenizer.decode([i]) for i in ids]
            assert (counts == ~np.array(is_prompt)).all()


# ---- the split


@given(n=st.integers(40, 10**9), percent=st.integers(10, 90))
def test_the_tail_is_exact(n, percent):
    division = divide(np.array([n]), percent / 100, "tail", 0)
    assert division.stops.tolist() == [n * (100 - percent) // 100, n]
    assert division.for_val.tolist() == [False, True]


def test_the_embedded_models_split():
    """The numbers of models/shakespeare/README.md: the text is one document, without an end-of-text id."""
    assert (
        divide(np.array([433_552]), 0.1, "auto", 0).stops.tolist() == [int(433552 * 0.9), 433_552] == [390_196, 433_552]
    )


@given(
    lengths=st.lists(st.integers(2, 50), min_size=1, max_size=60), fraction=st.sampled_from([0.1, 0.25, 0.5, 0.9]),
    split=st.sampled_from(["auto", "documents", "tail"]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_every_token_goes_to_one_side(lengths, fraction, split, seed):
    ends = np.cumsum(lengths)
    try:
        division = divide(ends, fraction, split, seed)
    except ValueError:
        assert split == "documents" or ends[-1] * min(fraction, 1 - fraction) < 3
        return
    assert division.stops[-1] == ends[-1]
    assert (np.diff(division.stops, prepend=0) > 0).all()
    assert sum(division.documents.values()) == len(lengths)
    assert division.for_val.any()
    assert not division.for_val.all()
    n_val = int(np.diff(division.stops, prepend=0)[division.for_val].sum())
    if division.split == "documents":
        assert set(division.stops) <= set(ends)
        if split == "auto":
            assert fraction / 2 - 0.05 <= n_val / ends[-1] <= 2 * fraction + 0.05
    else:
        assert abs(n_val - ends[-1] * Fraction(str(fraction))) < 1


def test_a_documents_side_depends_on_seed_and_number_alone():
    """For any lengths of 10,007 documents. The share is the requested one, within four standard deviations."""

    def sides(ends, seed):
        division = divide(ends, 0.1, "documents", seed)
        return division.for_val[np.searchsorted(division.stops, ends)]

    rng = np.random.default_rng(3)
    one, other = (sides(np.cumsum(rng.integers(2, 99, 10_007)), 5) for _ in range(2))
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(sides(np.arange(2, 2000, 2), 5), one[:999])
    assert (sides(np.arange(2, 2000, 2), 6) != one[:999]).any()
    assert abs(one.sum() - 1000.7) < 4 * 30
    assert np.flatnonzero(one)[:5].tolist() == GOLDEN_DRAW


GOLDEN_DRAW = [2, 14, 22, 32, 45]


def test_documents_are_moved_whole_and_in_order(made, tmp_path, tokenizer):
    documents = [f"{text} {i}" for i in range(31) for text in DOCUMENTS]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in documents])
    prepared = made(path, val_fraction=0.3, seed=7, split="documents")
    sides = []
    for tokens in (prepared.train, prepared.val):
        ids = np.array(held(tokens))
        sides.append([part.tolist() for part in np.split(ids, np.flatnonzero(ids == tokenizer.eot) + 1)[:-1]])
    at = [0, 0]
    for document in documents:
        encoded = [*tokenizer.encode(document), tokenizer.eot]
        side = next(i for i in (0, 1) if at[i] < len(sides[i]) and sides[i][at[i]] == encoded)
        at[side] += 1
    assert at == [len(side) for side in sides] == [prepared.manifest[name]["documents"] for name in ("train", "val")]
    assert min(at) > 20


@pytest.mark.parametrize(
    ("lengths", "fraction", "split"),
    [
        ([500], 0.1, "tail"), ([20] * 200, 0.1, "documents"), ([20] * 200, 0, "documents"), ([500], 0, "documents"),
        ([10_000, *[2] * 50], 0.1, "tail"),  # the long document cannot be divided
    ],
)  # fmt: skip
def test_auto(lengths, fraction, split):
    assert divide(np.cumsum(lengths), fraction, "auto", 0).split == split


# ---- killed, refused


def what_is_there(tokens: Path, tokenizer, texts: dict[str, str]) -> str:
    if not tokens.exists():
        return "absent"
    prepared = open_prepared(tokens, tokenizer)
    return texts.get(tokenizer.decode(held(prepared.train) + held(prepared.val)), "something else")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for each kill")
@pytest.mark.parametrize("before", ["old", "absent"])
def test_killed_before_each_file_operation_leaves_old_or_new(tmp_path, tokenizer, before):
    texts = {"old text " * 99: "old", "new " * 77: "new"}
    for text, name in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    tokens, states, killed = tmp_path / "work" / "tokens", [], True
    with forks.Forks("killed_preparer") as fork:
        while killed:
            shutil.rmtree(tokens.parent, ignore_errors=True)
            tokens.parent.mkdir()
            if before == "old":
                prepare([tmp_path / "old.txt"], tokens, tokenizer)
            how = {"operation": campaign(3, 1) * len(states), "folder": tokens.parent}
            ended = fork(source=str(tmp_path / "new.txt"), target=str(tokens), **how)
            assert ended.error == ""
            killed = ended.killed
            states.append(what_is_there(tokens, tokenizer, texts))
    assert states == sorted(states, key=[before, "new"].index), states  # first the old state, then the new one
    assert states.count(before) > campaign(2, 7)
    assert "new" in states
    print(f"\n{len(states)} kills over {before}; the new folder was there after {states.count('new')} of them")


def test_it_replaces_tokens_alone_and_only_when_told(made, tmp_path):
    (tmp_path / "a.txt").write_text("some words of text")
    before = made(tmp_path / "a.txt").manifest
    (tmp_path / "a.txt").write_text("some other words of text")
    with pytest.raises(FileExistsError, match="tokens exists"):
        made(tmp_path / "a.txt")
    after = made(tmp_path / "a.txt", overwrite=True).manifest
    assert after != before
    (tmp_path / "tokens" / "notes.txt").write_text("three weeks of work")
    with pytest.raises(FileExistsError, match=r"files that are not part of prepared text \(notes\.txt\)"):
        made(tmp_path / "a.txt", overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="file is a file"):
        made(tmp_path / "a.txt", name="file", overwrite=True)
    (tmp_path / "bare").mkdir()
    np.arange(9, dtype="<u2").tofile(tmp_path / "bare" / "train.bin")
    with pytest.raises(FileExistsError, match=r"bare contains files that are not part of prepared text"):
        made(tmp_path / "a.txt", name="bare", overwrite=True)


BAD = {
    "a.txt": (b"fine " * 3 + b"\xff", r"a\.txt is not UTF-8 text: byte 0xff at offset 15 \(invalid start byte\)"),
    "b.txt": (b"\xef\xbb\xbfcaf\xc3", r"b\.txt is not UTF-8 text: byte 0xc3 at offset 6 "),
    "c.jsonl": (b'{"text": "a"}\n\n{"text": "\xe9"}\n', r"c\.jsonl is not UTF-8 text: byte 0xe9 at offset 25 "),
    "d.jsonl": (b'{"text": "a"}\n{"text": }\n', r"d\.jsonl, line 2 is not JSON: "),
    "e.jsonl": (b'{"body": "a", "n": 1}\n', r'e\.jsonl, line 1 has no field "text"; it has: body, n'),
    "f.jsonl": (b'{"text": null}\n', r'f\.jsonl, line 1: the field "text" is not a string: \'None\''),
    "g.jsonl": (b"[1]\n", r"g\.jsonl, line 1 is not a JSON object with a text"),
    "h.csv": (b"n,body\n1,a\n", r'h\.csv has no column "text"; its first line names: n, body'),
    "i.csv": (b"n,text\n1,a\n2\n", r"i\.csv, line 3: the row has 1 columns, too few"),
    "j.csv": (b'text\n"a\n', r"j\.csv, line 2 is not CSV: "),
    "k.csv": (b"text\n\xe9\n", r"k\.csv is not UTF-8 text: byte 0xe9 at offset 5 "),
    "l.csv": (b"", r'l\.csv has no column "text"; its first line names: none'),
    "m.bin": (b"\1\0\2", r"m\.bin has 3 bytes, which is not a whole number of 2-byte ids"),
    "n.bin": (b"\1\0\1\5", r"n\.bin: token 1 is the id 1281, outside the vocabulary of 1,281 ids"),
    "o.docx": (b"text", r"o\.docx is not a file of type \.txt, .*, \.bin .*: rename it, or pass its text on standard"),
    "q.zst": (b"text", r"q\.zst is compressed: decompress it to a file of type \.txt"),
    "r.parquet.gz": (b"text", r"r\.parquet\.gz is compressed: decompress it to"),
    "p.txt": (b"", r"there is no text in 1 files with 0 bytes in total"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_sentence_and_leaves_nothing(made, tmp_path, monkeypatch, name):
    data, culprit = BAD[name]
    (tmp_path / name).write_bytes(data)
    before = snapshot(tmp_path)
    for block in (7, 2**20):
        monkeypatch.setattr(reading, "BLOCK", block if name[-3:] == "txt" else 2**20)
        with pytest.raises(ValueError, match=culprit) as error:
            made(tmp_path / name)
        assert "\n" not in str(error.value)
    assert snapshot(tmp_path) == before


def test_settings_that_do_not_fit(made, tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("a b c")
    (tmp_path / "texts").mkdir()
    (tmp_path / "split").mkdir()
    for name in ("train.bin", "val.bin"):
        np.arange(9, dtype="<u2").tofile(tmp_path / "split" / name)
    a = tmp_path / "a.txt"
    before = snapshot(tmp_path)
    for args, settings, culprit in [
        ((), {}, "there is nothing to read"),
        ((tmp_path / "none.txt",), {}, "no such file or folder: .*none.txt"),
        ((tmp_path / "texts",), {}, r"texts has no file of type \.txt"),
        ((tmp_path / "split",), {}, "split contains tokens that are already split: train on this folder directly"),
        (("-", "-"), {}, "- reads all of standard input: name it only once"),
        ((a,), {"prompt_field": "q"}, "go together"),
        (
            (a,),
            {"prompt_field": "q", "completion_field": "a"},
            r"a\.txt: prompts and completions need a \.jsonl",
        ),
        ((a,), {"field": ""}, "the name of the text field is empty"),
        ((a,), {"val_fraction": 1.0}, r"val_fraction must be a number, 0 or more and below 1, not 1\.0"),
        ((a,), {"val_fraction": float("nan")}, "val_fraction"),
        ((a,), {"seed": -1}, r"seed must be a whole number, from 0 to 4294967295, not -1"),
        ((a,), {"n_workers": -1}, "n_workers"),
        ((a,), {"split": "head"}, "split must be one of auto, documents, tail, not 'head'"),
        ((a,), {"split": "documents", "val_fraction": 0.1}, "puts none of the 1 documents into validation"),
        ((a,), {"val_fraction": 0.1}, "3 tokens are too few to keep 0.1 for validation: set val_fraction to 0"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=culprit) as error:
            made(*args, **settings)
        assert "\n" not in str(error.value)
        assert snapshot(tmp_path) == before
    with pytest.raises(ValueError, match="must be a list"):
        prepare(str(a), tmp_path / "tokens", tokenizer)


def test_a_bar_is_shown_when_told(made, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then treats standard error as a terminal
    (tmp_path / "a.txt").write_text("some words")
    made(tmp_path / "a.txt", shown=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "encoding" in err


def test_the_manifest_says_what_was_done(made, tmp_path, tokenizer):
    """It does not depend on the names of files and folders."""
    contents = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        path = write_jsonl(tmp_path / name / f"{name}.jsonl", [{"text": text} for text in DOCUMENTS * 30])
        prepared = made(path, name=f"{name}-tokens", val_fraction=0.2, seed=5)
        contents.append((tmp_path / f"{name}-tokens" / "tokens.json").read_text())
    assert contents[0] == contents[1]
    manifest = prepared.manifest
    assert (manifest["split"], manifest["val_fraction"], manifest["seed"]) == ("documents", 0.2, 5)
    assert (manifest["n_vocab"], manifest["eot"], manifest["dtype"]) == (1281, tokenizer.eot, "uint16")
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((tmp_path / "other-tokens" / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_process_starts_takes_effect_afterwards(number):
    """Otherwise the half started process reports a traceback of its own."""

    class StopError(Exception):
        pass

    def stop(*_):
        raise StopError

    def start_a_process():
        with encoding._without_ctrl_c():
            os.kill(os.getpid(), number)
            done.extend(_ for _ in range(1000))  # Python runs handlers between two instructions

    done = []
    before = signal.signal(number, stop)
    try:
        with pytest.raises(StopError):
            start_a_process()
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)
    assert len(done) == 1000
