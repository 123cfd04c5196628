"""Text as it is found: other forms, compressed, linked, in other encodings, with bad rows, divided by a marker.

Each is read by one process and by several, in whole and in parts, with the same files as a result.
"""

import csv
import gzip
import io
import itertools
import json
import random

import pytest
import several_processes
from hypothesis import given
from hypothesis import strategies as st
from token_folders import DOCUMENTS, expected_ids, held, write_jsonl

from gpt2_jax import processes
from gpt2_jax.data import encoding, parts, reading
from gpt2_jax.data._prepare import prepare
from gpt2_jax.data.encoding import encode_documents
from gpt2_jax.data.fields import Fields
from gpt2_jax.data.sources import END, Range, Sources

EOT = "<|endoftext|>"


@pytest.fixture
def made(tmp_path, tokenizer, monkeypatch):
    """Give make(*names, ...) -> Prepared. Three processes with small blocks must write the same files."""
    monkeypatch.setattr(parts, "WAIT", 0.01)
    monkeypatch.setattr(processes, "PATIENCE", 0.05)

    def make(*names, **settings):
        number = sum(1 for path in tmp_path.iterdir() if path.name.startswith("made"))
        one, three = tmp_path / f"made{number}", tmp_path / f"made{number}-three"
        settings = {"val_fraction": 0, "n_workers": 1} | settings
        prepared = prepare(names, one, tokenizer, **settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reading, "BLOCK", 66)
            patch.setattr(encoding, "BLOCK", 101)
            patch.setattr(parts, "BLOCKS", (4, 4))
            several_processes.in_threads(3, lambda share: prepare(names, three, tokenizer, share=share, **settings))
        assert {path.name: path.read_bytes() for path in one.iterdir()} == {
            path.name: path.read_bytes() for path in three.iterdir()
        }
        return prepared

    return make


def as_csv(rows, delimiter=","):
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter).writerows(rows)
    return buffer.getvalue()


# ---- forms


def test_every_form_gives_the_same_ids(made, tmp_path, tokenizer):
    texts = DOCUMENTS * 9
    records = [{"n": i, "text": text} for i, text in enumerate(texts)]
    forms = {
        "a.ndjson": "\n".join(map(json.dumps, records)),
        "a.json": json.dumps(records, indent=1),
        "b.json": "\n".join(map(json.dumps, records)),
        "a.tsv": as_csv([["n", "text"], *enumerate(texts)], "\t"),
        "semicolon.csv": as_csv([["n", "text"], *enumerate(texts)], ";"),
        "tab.csv": as_csv([["text", "n"], *((text, i) for i, text in enumerate(texts))], "\t"),
        "one.csv": as_csv([["what, ever"], *([text] for text in texts)]),
        "a.jsonl": "\n".join(map(json.dumps, records)),
    }
    expected = expected_ids(tokenizer, texts)
    for name, text in forms.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        for file in (name, f"{name}.gz"):
            assert held(made(tmp_path / file).train) == expected, file
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(texts):
        zipped = i % 3 == 2
        name = f"{i:02}{('.txt', '.md', '.txt.gz')[i % 3]}"
        (tmp_path / "texts" / name).write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    prepared = made(tmp_path / "texts")
    assert held(prepared.train) == expected
    assert prepared.manifest["file_types"] == {".md": 15, ".txt": 15, ".txt.gz": 15}


def test_parquet(made, tmp_path, tokenizer):
    parquet, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    table = pa.table({"n": list(range(45)), "body": DOCUMENTS * 9, "rest": [None] * 45})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    assert held(made(tmp_path / "a.parquet", field="body").train) == expected_ids(tokenizer, DOCUMENTS * 9)
    with pytest.raises(ValueError, match=r'a\.parquet has no column "text"; it has: n, body, rest'):
        prepare([tmp_path / "a.parquet"], tmp_path / "t", tokenizer)
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: the field \"rest\" is not a string: 'None'"):
        prepare([tmp_path / "a.parquet"], tmp_path / "t", tokenizer, field="rest")


def test_pairs_of_the_other_forms(made, tmp_path, tokenizer):
    """Alpaca's file is an array of objects."""
    rows = [{"instruction": "Who?", "input": "", "output": " Me."}, {"instruction": "", "output": " No one."}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    prepared = made(tmp_path / "a.json", prompt_field="instruction", completion_field="output")
    assert prepared.manifest["train"]["documents"] == 2
    ids, counts = prepared.train.read(0, prepared.train.n_tokens)
    assert tokenizer.decode(ids[counts == 1].tolist()) == f" Me.{EOT} No one.{EOT}"


@pytest.mark.parametrize(
    ("text", "field", "culprit"),
    [
        ("label;content\n1;hello\n", "text", r'has no column "text"; .* names: label, content \(divided by ;\)'),
        ("label\tcontent\n1\thello\n", "text", r"names: label, content \(divided by a tab\)"),
        ("text\nhello, world\n", "text", "line 2: the row has 2 columns, but the first line names 1: put quotes"),
        ("label;text\n1;hello; world\n", "text", "line 2: the row has 3 columns, .* field that contains ;"),
        ("a;b\n1;hello\n", "c", 'has no column "c"'),
    ],
)
def test_a_table_that_would_be_misread(tmp_path, tokenizer, text, field, culprit):
    """It was one column with the text "1;hello", or a text that ended at its first comma."""
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=culprit):
        prepare([tmp_path / "a.csv"], tmp_path / "t", tokenizer, field=field)


def test_the_delimiter_is_told(made, tmp_path, tokenizer):
    (tmp_path / "a.csv").write_text("label;text\n1;hello, world\n")
    (tmp_path / "b.csv").write_text("text,label\na;b,1\n")
    (tmp_path / "c.csv").write_text("text;one, two, or three\na,b;1\n")  # where the name is found, not the most columns
    prepared = made(*(tmp_path / f"{name}.csv" for name in "abc"))
    assert held(prepared.train) == expected_ids(tokenizer, ["hello, world", "a;b", "a,b"])
    assert prepared.manifest["delimiters"] == {";": 2}


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.csv.gz", "a.json.gz"])
def test_a_damaged_archive_is_a_sentence(tmp_path, tokenizer, name):
    data = gzip.compress(as_csv([["text"], *([str(i)] for i in range(9999))]).encode())
    for bad in (data[:-9], data[:200] + b"\0" * 99 + data[299:], b"text"):
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(ValueError, match=r"\.gz is not a complete gzip file: |is not JSON"):
            prepare([tmp_path / name], tmp_path / "t", tokenizer)


def test_which_files_are_divided(tmp_path):
    names = ["a.csv", "a.jsonl", "a.jsonl.gz", "a.txt", "b.json", "b.parquet", "c.bin"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    for name_of_encoding, divided in (("utf-8", ["a.csv", "a.jsonl", "a.txt", "c.bin"]), ("cp1252", ["c.bin"])):
        found = Sources([tmp_path], Fields(), 1281, 1280, encoding=name_of_encoding)
        assert [file.name for file in found.files] == names
        assert [name for i, name in enumerate(names) if not found.is_whole(i)] == divided


@given(sizes=st.lists(st.sampled_from([0, 1, 3, 2**20, 9 * 2**20, 50 * 2**20]), min_size=1, max_size=9), data=st.data())
def test_units_of_files_that_are_not_divided(sizes, data):
    """Units follow one another, and only a file that is not divided makes one larger than 8 MiB."""
    whole = data.draw(st.sets(st.integers(0, len(sizes) - 1)))
    ranges = parts.divided(sizes, whole)
    assert sorted(ranges) == ranges
    assert [it.unit for it in ranges] == sorted(it.unit for it in ranges)
    assert {it.unit for it in ranges} == set(range(ranges[-1].unit + 1))
    for file, size in enumerate(sizes):
        own = [it for it in ranges if it.file == file]
        assert [it.start for it in own] == [0, *(it.stop for it in own[:-1])]
        assert own[-1].stop == END
        assert file not in whole or len(own) == 1
        assert file in whole or all(min(it.stop, size) - it.start <= 8 * 2**20 for it in own)
    for unit in range(ranges[-1].unit + 1):
        own = [it for it in ranges if it.unit == unit]
        n_bytes = sum(min(it.stop, sizes[it.file]) - it.start for it in own)
        large = [it for it in own if it.file in whole and sizes[it.file] > 8 * 2**20]
        assert n_bytes <= 8 * 2**20 or large
        assert not large or [it for it in own if sizes[it.file] > 0] == large


# ---- folders


def test_what_a_folder_leaves_out_is_counted(made, tmp_path):
    folder = tmp_path / "corpus"
    for name in ("a.txt", "b.docx", "c.zst", "d/e.zst", "d/LICENSE", ".git/config", "d/.x.zst", "f.parquet.gz"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")
    (folder / "link.txt").symlink_to(folder / "nothing.txt")
    manifest = made(folder).manifest
    assert manifest["left_out"] == {"": 1, ".docx": 1, ".parquet.gz": 1, ".zst": 2, "broken link": 1}
    (folder / "a.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"corpus has no file of type .*; it has 2 \.zst, 1 without a suffix"):
        Sources([folder], Fields())


def test_linked_folders_are_followed_and_loops_are_not(made, tmp_path, tokenizer):
    (tmp_path / "elsewhere" / "inner").mkdir(parents=True)
    (tmp_path / "elsewhere" / "inner" / "b.txt").write_text("second")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("first")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "inner" / "back").symlink_to(tmp_path / "corpus")
    (tmp_path / "elsewhere" / "self").symlink_to(tmp_path / "elsewhere")
    assert held(made(tmp_path / "corpus").train) == expected_ids(tokenizer, ["first", "second"])


# ---- encodings

WORDS = ["a", " ", "\n", "\u3000", "caf\xe9", "bc" * 5, '"', ",", "\r\n", EOT, " word"]


@pytest.mark.parametrize("name", ["cp1252", "utf-16", "utf-16-le", "utf-8-sig", "shift_jis", "utf-7", "latin-1"])
def test_encodings(made, tmp_path, tokenizer, name):
    rng = random.Random(5)
    words = [word for word in [*WORDS, "\u6f22\u5b57", "\xdf"] if word.encode(name, "ignore").decode(name) == word]
    texts = ["".join(rng.choices(words, k=n)) for n in (300, 1, 0, 40)]
    (tmp_path / "a.txt").write_bytes(texts[0].encode(name))
    (tmp_path / "b.jsonl").write_bytes("\n".join(json.dumps(text, ensure_ascii=False) for text in texts).encode(name))
    (tmp_path / "c.csv").write_bytes(as_csv([["text"], *([text] for text in texts[:2])]).encode(name))
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(texts[3].encode(name)))
    prepared = made(*(tmp_path / file for file in ("a.txt", "b.jsonl", "c.csv", "d.txt.gz")), encoding=name)
    assert held(prepared.train) == expected_ids(tokenizer, filter(None, [texts[0], *texts, *texts[:2], texts[3]]))
    assert prepared.manifest["encoding"] == reading.check_encoding(name)


@pytest.mark.parametrize("block", [3, 2**20])
def test_bytes_of_another_encoding(tmp_path, monkeypatch, block):
    monkeypatch.setattr(reading, "BLOCK", block)
    (tmp_path / "a.txt").write_bytes("fine words \u6f22".encode("shift_jis") + b"\x82")
    with pytest.raises(ValueError, match=r"a\.txt is not SHIFT_JIS text: byte 0x82 at offset 13"):
        list(Sources([tmp_path / "a.txt"], Fields(), encoding="shift_jis").pieces())
    with pytest.raises(ValueError, match=r"byte 0x8a at offset 11 .*; if the file has another encoding, name it"):
        list(Sources([tmp_path / "a.txt"], Fields()).pieces())


# ---- bad rows


def test_bad_rows_are_skipped_and_counted(made, tmp_path, tokenizer):
    good = [f"{text} {i}" for i in range(20) for text in DOCUMENTS]
    bad = ['{"text": }', '{"body": "a"}', '{"text": 5}', "[1]", "5"]
    lines = [json.dumps(text) for text in good]
    for i, line in enumerate(bad):
        lines.insert(90 + i, line)
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines))
    rows = [["n", "text"], [1, "one"], [2], [3, "three, and more", "x"], [4, "four"]]
    (tmp_path / "b.csv").write_text(as_csv(rows) + '5,"fi"ve\n6,six\n')
    (tmp_path / "c.json").write_text(json.dumps([{"text": "seven"}, {}, {"text": None}]))
    names = [tmp_path / name for name in ("a.jsonl", "b.csv", "c.json")]
    prepared = made(*names, skip_bad_rows=True)
    assert held(prepared.train) == expected_ids(tokenizer, [*good, "one", "four", "six", "seven"])
    assert prepared.manifest["skipped_rows"] == 10
    first = prepared.manifest["first_skipped_row"]
    assert first.startswith(f"{tmp_path / 'a.jsonl'}, line 181 is not JSON: Expecting value")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 181 is not JSON: Expecting value") as alone:
        prepare(names, tmp_path / "t", tokenizer)
    assert str(alone.value) == first


# ---- divided by a marker


def whole(tokenizer, text):
    """The ids of a text in which each marker is the end of a document; documents without text are left out."""
    return [i for part in text.split(EOT) if part for i in [*tokenizer.encode(part), tokenizer.eot]]


@given(
    text=st.lists(st.sampled_from([*WORDS, EOT, EOT + "\n", "<|endof", "text|>"]), max_size=40).map("".join),
    block=st.integers(3, 40),
    blocks=st.lists(st.integers(1, 3), max_size=40),
)
def test_a_marker_ends_a_document_wherever_the_text_is_cut(tmp_path_factory, tokenizer, text, block, blocks):
    path = tmp_path_factory.getbasetemp() / "marked.txt"
    path.write_bytes(text.encode())
    expected = whole(tokenizer, text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK", block)
        stops = [stop for stop in (block * sum(blocks[: i + 1]) for i in range(len(blocks))) if stop < len(text)]
        for edges in ([0, END], [0, *stops, END]):
            found = Sources([path], Fields(), splits=True)
            ranges = [Range(0, *pair) for pair in itertools.pairwise(edges)]
            pieces = [piece for _, some in found.read(ranges) for piece in some]
            documents = encode_documents(pieces, tokenizer)
            assert [i for ids in documents for i in [*ids.tolist(), tokenizer.eot]] == expected
            assert not any(EOT in piece.text for piece in pieces)
            assert all(piece.text for piece in pieces)


def test_documents_divided_by_the_marker(made, tmp_path, tokenizer):
    text = "".join(f"{document}{EOT}" for document in [*DOCUMENTS[:4], *(f"Story {i}.\n" for i in range(90))])
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    write_jsonl(tmp_path / "b.jsonl", [{"text": f"one{EOT}two"}, {"text": f"{EOT}{EOT}three{EOT}"}])
    prepared = made(tmp_path / "a.txt", tmp_path / "b.jsonl", end_of_text="split")
    assert held(prepared.train) == whole(tokenizer, text) + whole(tokenizer, f"one{EOT}two{EOT}three")
    assert prepared.manifest["train"]["documents"] == 97
    assert (prepared.manifest["end_of_text_as_text"], prepared.manifest["end_of_text"]) == (0, "split")
    assert made(tmp_path / "a.txt").manifest["end_of_text_as_text"] == 94


def test_the_ids_are_those_with_the_special_token_allowed(made, tmp_path, tokenizer):
    text = f"The quality{EOT}\n of mercy {EOT}  is not {EOT}strain'd"
    (tmp_path / "a.txt").write_text(text)
    prepared = made(tmp_path / "a.txt", end_of_text="split")
    assert held(prepared.train) == [*tokenizer.encode(text, allow_special=True), tokenizer.eot]


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"end_of_text": "other"}, "end_of_text must be one of text, split, not 'other'"),
        ({"encoding": "none"}, "encoding must be a text encoding of Python, such as utf-8 or cp1252, not 'none'"),
        (
            {"end_of_text": "split", "prompt_field": "a", "completion_field": "b"},
            r"prompts and completions cannot be split at <\|endoftext\|>",
        ),
    ],
)
def test_settings_that_do_not_fit(tmp_path, tokenizer, settings, culprit):
    write_jsonl(tmp_path / "a.jsonl", ["text"])
    with pytest.raises(ValueError, match=culprit):
        prepare([tmp_path / "a.jsonl"], tmp_path / "t", tokenizer, **settings)


@pytest.mark.parametrize("changed", [{"encoding": "latin-1"}, {"end_of_text": "split"}, {"skip_bad_rows": True}])
def test_parts_with_other_settings_are_refused(tmp_path, tokenizer, changed):
    write_jsonl(tmp_path / "a.jsonl", ["text", "more"])
    work = parts._Parts(tmp_path / "t", Sources([tmp_path / "a.jsonl"], Fields()), tokenizer)
    work.begin()
    with pytest.raises(ValueError, match=r"t\.parts was started with other settings: run with the same ones"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "t", tokenizer, **changed)
