"""`records`: every record of a table, whatever its form, with its place; malformed files are a sentence."""

import csv
import gzip
import io
import json
import re
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.data import reading
from gpt2_jax.data.fields import Fields
from gpt2_jax.data.tables import records

ROWS = [
    {"text": "First, line\nand another", "label": "a"},
    {"text": 'caf\xe9 "\u6f22\u5b57" \U0001f98a', "label": ""},
    {"text": "", "label": "x;y\tz"},
]


def as_csv(rows, delimiter=","):
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, rows[0], delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def as_lines(rows):
    return "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


FORMS = {
    "a.jsonl": as_lines(ROWS),
    "a.ndjson": as_lines(ROWS),
    "a.json": json.dumps(ROWS, indent=1),
    "lines.json": as_lines(ROWS),
    "one.JSON": " ".join(json.dumps(row, indent=2) for row in ROWS),
    "a.csv": as_csv(ROWS),
    "b.csv": as_csv(ROWS, ";"),
    "c.csv": as_csv(ROWS, "\t"),
    "a.tsv": as_csv(ROWS, "\t"),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
@pytest.mark.parametrize("block", [5, 2**20])
def test_every_form_has_the_same_records(tmp_path, monkeypatch, encoding, block):
    monkeypatch.setattr(reading, "BLOCK", block)
    for name, text in FORMS.items():
        (tmp_path / name).write_bytes(text.encode(encoding))
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode(encoding)))
        for file in (name, f"{name}.gz"):
            assert [record for record, _ in records(tmp_path / file, encoding)] == ROWS, file


def test_parquet(tmp_path):
    parquet, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = [{"text": f"{i}", "label": i, "none": None} for i in range(601)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=97)
    assert [record for record, _ in records(tmp_path / "a.parquet")] == rows
    assert [place for _, place in records(tmp_path / "a.parquet")][300] == f"{tmp_path / 'a.parquet'}, row 301"
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"b\.parquet is not a complete \.parquet file: "):
        list(records(tmp_path / "b.parquet"))


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r'a\.parquet needs pyarrow: pip install "gpt2-jax\[parquet\]"'):
        list(records(tmp_path / "a.parquet"))


def test_places_are_lines(tmp_path):
    """Of .csv the line where a row ends, as an editor counts; of .json the line where a value begins."""
    for name, lines in [("a.jsonl", [1, 3, 5]), ("a.csv", [3, 4, 5]), ("a.json", [2, 6, 10])]:
        (tmp_path / name).write_text(FORMS[name], encoding="utf-8")
        expected = [f"{tmp_path / name}, line {line}" for line in lines]
        assert [place for _, place in records(tmp_path / name)] == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 500) | st.text('a[]{},:" \n\\\u6f22', max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab]", max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(
    rows=st.lists(st.dictionaries(st.text("ab]", max_size=3), JSON, max_size=3), max_size=6), block=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 3]), array=st.booleans(), space=st.sampled_from(["", "\n ", "\r\n\t"]),
)  # fmt: skip
def test_json_is_read_as_by_the_standard_library(tmp_path_factory, rows, block, indent, array, space):
    path = tmp_path_factory.getbasetemp() / "values.json"
    whole = json.dumps(rows, indent=indent) if array else "\n".join(json.dumps(row, indent=indent) for row in rows)
    path.write_text(space + whole + space, newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK", block)
        assert [record for record, _ in records(path)] == rows


def test_a_number_is_not_cut_in_two(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text('[1234, {"a": 1}]')
    monkeypatch.setattr(reading, "BLOCK", 3)
    skipped = []
    assert [record for record, _ in records(tmp_path / "a.json", "utf-8", True, skipped.append)] == [{"a": 1}]
    assert skipped == [f"{tmp_path / 'a.json'}, line 1 is not a JSON object: 1234"]


BAD = {
    "a.json": ('[{"a": 1}\n{"a": 2}]', "line 2 is not JSON: { instead of a comma or ]"),
    "b.json": ('[{"a": 1},\n{"a": }]', "line 2 is not JSON: Expecting value"),
    "c.json": ('[{"a": 1},\n', "line 2 is not JSON: Expecting value"),
    "d.json": ('[{"a": 1}\n', "line 2 is not JSON: the array does not end"),
    "e.json": ('[{"a": 1}]\n[', r"line 2 is not JSON: \[ after the end of the array"),
    "f.json": ('{"a": 1}]', "line 1 is not JSON: Expecting value"),
    "g.json": ("[" * 100_000, "line 1 is not JSON: "),
    "a.jsonl": ('{"a": 1}\n{"a": }\n', "line 2 is not JSON: Expecting value"),
    "b.jsonl": ('{"a": 1}\n[1]\n', r"line 2 is not a JSON object: \[1\]"),
    "a.csv": ("a,b\n1,2\n3\n", "line 3: the row has 1 columns, too few"),
    "b.csv": ("a,b\n1,2\n1,hello, world\n", "line 3: the row has 3 columns, but the first line names 2: put quotes"),
    "c.csv": ("a,b,a\n1,2,3\n", 'the first line names the column "a" twice'),
    "d.csv": ('a,b\n1,"2\n3,4\n', "line 3 is not CSV: unexpected end of data"),
    "e.csv": ('a,b\n1,"2"3\n', "line 2 is not CSV: "),
    "f.csv": ("", "is empty: its first line must name the columns"),
    "a.txt": ("text", r"has no records: use a \.jsonl"),
    "a.jsonl.gz": ("text", "is not a complete gzip file: Not a gzipped file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_file_is_a_sentence(tmp_path, name):
    text, culprit = BAD[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(name) + f",? {culprit}|{culprit}") as error:
        list(records(tmp_path / name))
    assert str(error.value).startswith(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_compressed_file_that_is_cut_short(tmp_path):
    data = gzip.compress(as_lines(ROWS * 99).encode())
    for n_bytes in (len(data) - 9, len(data) // 2, 5):
        (tmp_path / "a.jsonl.gz").write_bytes(data[:n_bytes])
        with pytest.raises(ValueError, match=r"a\.jsonl\.gz is not a complete gzip file"):
            list(records(tmp_path / "a.jsonl.gz"))


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl", "a.csv", "b.csv", "e.csv"])
def test_bad_records_are_skipped_if_told(tmp_path, name):
    (tmp_path / name).write_text(BAD[name][0] + ("7,8\n" if name.endswith("csv") else '{"a": 7}\n'))
    skipped = []
    got = [record["a"] for record, _ in records(tmp_path / name, skip_bad=True, on_skip=skipped.append)]
    assert got == {"jsonl": [1, 7], "csv": ["1", "7"] if name != "e.csv" else ["7"]}[name.split(".")[1]]
    assert len(skipped) == 1
    assert re.search(BAD[name][1], skipped[0])


@pytest.mark.parametrize("name", ["b.json", "d.csv"])
def test_what_would_take_the_rest_of_the_file_is_never_skipped(tmp_path, name):
    (tmp_path / name).write_text(BAD[name][0])
    with pytest.raises(ValueError, match=BAD[name][1]):
        list(records(tmp_path / name, skip_bad=True))


def test_empty_columns_at_the_end_are_no_columns(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2,,\n")
    assert [record for record, _ in records(tmp_path / "a.csv")] == [{"a": "1", "b": "2"}]


def test_no_such_encoding(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    for encoding in ("none", "base64", "", "a\0", 5):
        with pytest.raises(ValueError, match="encoding must be a text encoding of Python, such as utf-8"):
            list(records(tmp_path / "a.jsonl", encoding))


def test_another_encoding_is_suggested(tmp_path):
    for encoding, likely in [("cp1252", "cp1252"), ("utf-16", "utf-16")]:
        (tmp_path / "a.jsonl").write_bytes('{"text": "caf\xe9"}'.encode(encoding))
        with pytest.raises(ValueError, match=f"is not UTF-8 text: byte .* name it, for example encoding {likely}"):
            list(records(tmp_path / "a.jsonl"))


def test_fields_go_together():
    with pytest.raises(ValueError, match="go together"):
        Fields(prompt="a")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz"])
def test_a_large_file_takes_little_memory(tmp_path, name):
    rows = [{"n": i, "text": "What is in memory does not grow with the file.\n" * 20} for i in range(13_000)]
    text = json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_bytes(gzip.compress(text.encode(), 1) if name.endswith(".gz") else text.encode())
    count, n_bytes = len(rows), len(text)
    del rows, text
    tracemalloc.start()
    try:
        assert sum(1 for _ in records(tmp_path / name)) == count
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n_bytes > 12e6
    assert peak < 8e6, peak  # measured 4.7e6
