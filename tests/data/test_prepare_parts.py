"""`prepare` in several processes: the files of one, for any source; resumed by any number of them; refusals."""

import csv
import io
import itertools
import json
import os
import random
import shutil
import sys

import forks
import numpy as np
import pytest
import several_processes
from hypothesis import given
from hypothesis import strategies as st
from strength import campaign
from token_folders import DOCUMENTS, snapshot, write_jsonl

import gpt2_jax
from gpt2_jax import processes
from gpt2_jax.data import encoding, parts, reading
from gpt2_jax.data._prepare import prepare
from gpt2_jax.data.fields import Fields
from gpt2_jax.data.reading import END
from gpt2_jax.data.sources import Range, Sources

TEXT = ["a", " ", "\n", "\u3000", "caf\xe9", "\U0001f98a", "bc" * 5, '"', ","]
BLOCK = 66  # bytes; units have four


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", BLOCK)
    monkeypatch.setattr(encoding, "BLOCK", 101)
    monkeypatch.setattr(parts, "BLOCKS", (4, 4))
    monkeypatch.setattr(parts, "WAIT", 0.01)
    monkeypatch.setattr(processes, "PATIENCE", 0.05)


def together(count, names, target, tokenizer, link=None, **settings):
    """Prepare in several processes. Return the result or error of each."""

    def one(share):
        try:
            return prepare(names, target, tokenizer, n_workers=1, share=share, **settings)
        except KeyboardInterrupt as stop:
            raise Interrupted from stop

    return several_processes.in_threads(count, one, link)


class Interrupted(Exception):
    """A KeyboardInterrupt of a thread, as a result."""


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- the same files


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def text_of(rng, n):
    words = [*TEXT, "word", "\u6f22\u5b57", "x" * 30, "\r\n", "<|endoftext|>"]
    return "".join(rng.choice(words) + " " * rng.randint(0, 2) for _ in range(n))


def a_text(folder):
    (folder / "a.txt").write_text("\ufeff" + text_of(random.Random(1), 700), encoding="utf-8", newline="")
    return [folder / "a.txt"], {}


def a_text_without_spaces(folder):
    (folder / "a.txt").write_text("caf\xe9" * 300 + " end", encoding="utf-8")
    return [folder / "a.txt"], {}


def short_texts(folder):
    """Fewer documents than processes, and an empty one."""
    for i, text in enumerate(("a", "", "b c")):
        (folder / f"{i}.txt").write_text(text)
    return [folder], {}


def many_texts(folder):
    rng = random.Random(2)
    for i in range(40):
        (folder / f"{i}.txt").write_text(text_of(rng, rng.choice([0, 1, 9, 200])), encoding="utf-8", newline="")
    return [folder], {}


def lines(folder):
    rng = random.Random(3)
    texts = [text_of(rng, rng.choice([0, 0, 1, 5, 120])) for _ in range(90)]
    records = [{"n": i, "body": text} for i, text in enumerate(texts)]
    return [write_jsonl(folder / "a.jsonl", records)], {"field": "body"}


def one_long_line(folder):
    return [write_jsonl(folder / "a.jsonl", ["b", text_of(random.Random(3), 500), ""])], {}


def rows(folder):
    """With line breaks and quotation marks inside fields, quoted or not."""
    rng = random.Random(4)
    path = write_csv(folder / "a.csv", [["n", "text"], *([i, text_of(rng, rng.choice([0, 1, 30]))] for i in range(60))])
    with path.open("a") as file:
        file.write('1,a "b\n\n2,"c\n\n""d"\n' * 30)
    return [path], {}


def ids(folder):
    rng = np.random.default_rng(5)
    eot = gpt2_jax.load_tokenizer(gpt2_jax.embedded_model()).eot
    values = np.where(rng.random(2000) < 0.05, eot, rng.integers(0, 1000, 2000))
    values[100:300] = eot
    values[400:700] = 5
    values[-1] = eot
    values.astype("<u2").tofile(folder / "a.bin")
    return [folder / "a.bin"], {}


def everything(folder):
    for make in (ids, many_texts, rows, a_text):
        (folder / make.__name__).mkdir()
        make(folder / make.__name__)
    write_jsonl(folder / "rows" / "z.jsonl", DOCUMENTS * 9)
    (folder / "empty.txt").write_text("")
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbf")
    return [folder / "rows", folder / "ids" / "a.bin", folder / "empty.txt", folder / "bom.txt", folder], {}


def pairs(folder):
    rng = random.Random(6)
    texts = [(text_of(rng, rng.choice([0, 4])), text_of(rng, rng.choice([0, 1, 40]))) for _ in range(60)]
    write_jsonl(folder / "a.jsonl", [{"q": prompt, "a": answer} for prompt, answer in texts])
    write_csv(folder / "b.csv", [["q", "x", "a"], *([prompt, 1, answer] for prompt, answer in texts)])
    return [folder], {"prompt_field": "q", "completion_field": "a"}


def a_pair(folder):
    path = write_jsonl(folder / "a.jsonl", [{"q": "Who?", "a": " Me."}])
    return [path], {"prompt_field": "q", "completion_field": "a"}


CORPORA = (
    a_text, a_text_without_spaces, short_texts, many_texts, lines, one_long_line, rows, ids, everything, pairs, a_pair,
)  # fmt: skip


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("val_fraction", [0, 0.3])
def test_the_files_of_one_process(corpus, val_fraction, tmp_path, tokenizer):
    (tmp_path / "texts").mkdir()
    names, settings = corpus(tmp_path / "texts")
    settings |= {"val_fraction": 0 if corpus is short_texts else val_fraction}
    prepare(names, tmp_path / "one", tokenizer, n_workers=1, **settings)
    for count in (2, 3, 5):
        found = together(count, names, tmp_path / f"{count}", tokenizer, **settings)
        assert [getattr(prepared, "manifest", prepared) for prepared in found] == [found[0].manifest] * count
        assert contents(tmp_path / f"{count}") == contents(tmp_path / "one")
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "one", "2", "3", "5"}


@pytest.mark.parametrize("corpus", [a_text, lines, ids])
def test_each_process_reads_its_share(corpus, tmp_path, tokenizer, monkeypatch):
    """Of a single file, and in a text the block before each unit of four, twice. Lines are shorter than a block."""
    block = 30 * BLOCK
    monkeypatch.setattr(reading, "BLOCK", block)
    monkeypatch.setattr(reading, "BUFFER", 64)
    names, settings = corpus(tmp_path)
    names[0].write_bytes(names[0].read_bytes() * 30)
    total, n_read = names[0].stat().st_size, []
    for index in range(3):
        found = Sources(names, Fields(settings.get("field", "text")), tokenizer.n_vocab, tokenizer.eot)
        work = parts._Parts(tmp_path / "out", found, tokenizer)
        work.begin()
        n_units = len(work.sizes)
        assert n_units == -(-total // (4 * block)) > 12
        units = range(n_units * index // 3, n_units * (index + 1) // 3)
        assert list(work.encode(units, 1, lambda: None)) == list(units)
        n_read.append(found.n_read / total)
    assert max(n_read) < (0.56 if corpus is a_text else 0.5), n_read  # measured 0.546, 0.354 and 0.340


# ---- the same pieces


def ranges_of(path, blocks, field="text"):
    """Return the pieces and the number of empty documents of a file: of the whole, and of ranges of so many blocks."""
    results = []
    size, ends = path.stat().st_size, itertools.accumulate(b * reading.BLOCK for b in blocks)
    stops = [*(stop for stop in ends if stop < size), END]
    for ranges in ([Range(0)], [Range(0, *edges) for edges in itertools.pairwise([0, *stops])]):
        found = Sources([path], Fields(field), 1281, 1280)
        pieces = [piece for _, some in found.read(ranges) for piece in some]
        results.append((pieces, found.tally.n_empty))
    return results


@given(
    texts=st.lists(st.lists(st.sampled_from(TEXT), max_size=30).map("".join), max_size=6),
    block=st.integers(3, 23),
    blocks=st.lists(st.integers(1, 3), max_size=40),
    bom=st.booleans(),
)
def test_ranges_have_the_pieces_of_the_whole(tmp_path_factory, texts, block, blocks, bom):
    folder, encoding = tmp_path_factory.getbasetemp(), "utf-8-sig" if bom else "utf-8"
    (folder / "r.txt").write_text("".join(texts), encoding=encoding, newline="")
    (folder / "r.jsonl").write_text("\n\n".join(map(json.dumps, texts)), encoding=encoding)
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([["text"], *([text] for text in texts)])
    (folder / "r.csv").write_text(buffer.getvalue() + 'a"b\n', encoding=encoding, newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK", block)
        for kind in ("txt", "jsonl", "csv"):
            whole, found = ranges_of(folder / f"r.{kind}", blocks)
            assert found == whole, kind


@given(
    values=st.lists(st.sampled_from([1280, 1280, 5, 6]), max_size=40),
    block=st.integers(1, 5),
    blocks=st.lists(st.integers(1, 3), max_size=40),
)
def test_ranges_have_the_ids_of_the_whole(tmp_path_factory, tokenizer, values, block, blocks):
    path = tmp_path_factory.getbasetemp() / "r.bin"
    np.array(values, "<u2").tofile(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK", 2 * block)
        whole, found = ranges_of(path, blocks)
    for pieces, n_empty in (whole, found):
        assert n_empty == whole[1]
        assert encoding.encode_group(tokenizer, pieces).ids.tolist() == (
            encoding.encode_group(tokenizer, whole[0]).ids.tolist()
        )


@given(sizes=st.lists(st.integers(0, 2000), min_size=1, max_size=30), most=st.integers(1, 5))
def test_every_byte_is_in_one_range(sizes, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "BLOCKS", (most, most))
        ranges = parts.divided(sizes)
    for file, size in enumerate(sizes):
        own = [it for it in ranges if it.file == file]
        assert [own[0].start, own[-1].stop] == [0, END]
        assert all(one.stop == next_one.start < size for one, next_one in itertools.pairwise(own))
        assert all(it.start % BLOCK == 0 for it in own)
    units = {}
    for it in ranges:
        units[it.unit] = units.get(it.unit, 0) + min(it.stop, sizes[it.file]) - it.start
    assert list(units) == list(range(len(units)))
    assert max(units.values()) <= most * BLOCK
    assert all(n > (most - 1) * BLOCK for n in list(units.values())[:-1])  # but the last, each is almost full


# ---- resumed


def interrupted_at(monkeypatch, n):
    """Interrupt the process that encodes group number n, from 0. Return the groups that were encoded."""
    encode, calls, numbers = encoding.encode_group, [], itertools.count()

    def interrupted(tokenizer, group):
        if group and next(numbers) == n:
            raise KeyboardInterrupt
        calls.append([piece.text for piece in group])
        return encode(tokenizer, group)

    monkeypatch.setattr(encoding, "encode_group", interrupted)
    return calls


@pytest.mark.parametrize("counts", [(3, 3), (3, 2), (2, 5), (2, 1), (2, 3, 1)])
def test_resumed_by_any_number_of_processes(counts, tmp_path, tokenizer, monkeypatch):
    (tmp_path / "texts").mkdir()
    names, settings = lines(tmp_path / "texts")
    prepare(names, tmp_path / "one", tokenizer, n_workers=1, **settings)
    target, times = tmp_path / "out", []
    for count in counts[:-1]:
        with monkeypatch.context() as patch:
            interrupted_at(patch, 9)
            found = together(count, names, target, tokenizer, **settings)
        assert sum(isinstance(error, Interrupted) for error in found) == 1, found
        assert sum("was interrupted" in str(error) for error in found) == count - 1
        assert not target.exists()
        parts_now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.parts").glob("*.part")}
        assert len(parts_now) > len(times)
        assert parts_now.items() >= dict(times).items()  # none was written again
        times = parts_now.items()
    finished = sorted(int(name.removesuffix(".part")) for name, _ in times)
    if counts[-1] > 1:
        with monkeypatch.context() as patch:
            calls = interrupted_at(patch, -1)
            together(counts[-1], names, target, tokenizer, **settings)
        work = parts._Parts(target, Sources(names, Fields("body")), tokenizer)
        ranges = [it for it in work.ranges if it.unit not in finished]
        texts = [piece.text for _, some in Sources(names, Fields("body")).read(ranges) for piece in some]
        assert sorted(itertools.chain(*calls)) == sorted(texts)
    else:
        prepare(names, target, tokenizer, n_workers=1, **settings)  # as a user who has one machine left
    assert contents(target) == contents(tmp_path / "one")
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "one", "out"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for each kill")
def test_killed_before_file_operations(tmp_path, tokenizer, monkeypatch):
    """The same command then gives the files of an uninterrupted one; or they are there already."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "work").mkdir()
    names, _ = a_text(tmp_path / "texts")
    target = tmp_path / "work" / "out"
    prepare(names, tmp_path / "one", tokenizer, n_workers=1)
    with monkeypatch.context() as patch:
        interrupted_at(patch, 9)
        together(2, names, target, tokenizer)
    shutil.copytree(tmp_path / "work" / "out.parts", tmp_path / "some.parts")
    ends = []
    with forks.Forks("killed_preparer") as fork:
        killed, step = True, 0
        while killed:
            shutil.rmtree(tmp_path / "work")
            shutil.copytree(tmp_path / "some.parts", tmp_path / "work" / "out.parts")
            how = {"operation": step, "folder": tmp_path / "work", "small": BLOCK}
            ended = fork(source=str(names[0]), target=str(target), **how)
            assert ended.error == ""
            killed, there, left = ended.killed, target.exists(), (tmp_path / "work" / "out.parts").exists()
            ends.append((there, left))
            if not there or left:
                prepare(names, target, tokenizer, n_workers=1, overwrite=there)
            assert contents(target) == contents(tmp_path / "one")
            assert not (tmp_path / "work" / "out.parts").exists()
            step += campaign(19, 1)
    assert len(ends) > campaign(8, 40)
    assert ends[0] == (False, True)
    assert ends[-1] == (True, False)


# ---- refused


SOURCES = "source files with other names, sizes or times"
CHANGES = {
    "other files": (lambda path: {"names": [path, path]}, SOURCES),
    "another text": (lambda path: path.write_text("[]") and {}, SOURCES),
    "another time": (lambda path: os.utime(path, (1, 1)) or {}, SOURCES),
    "another field": (lambda path: {"field": "n"}, "other fields"),
    "both": (lambda path: os.utime(path, (1, 1)) or {"field": "n"}, SOURCES + " and other fields"),
    "another vocabulary": (lambda path: {"tokenizer": other_tokenizer()}, "another vocabulary"),
}


def other_tokenizer():
    tokenizer = gpt2_jax.load_tokenizer(gpt2_jax.embedded_model())
    tokens = [token for token in tokenizer.tokens if len(token) == 1]
    return gpt2_jax.Tokenizer({token: i for i, token in enumerate([*tokens, "<|endoftext|>"])}, [])


@pytest.mark.parametrize("change", CHANGES)
def test_parts_of_other_work_are_refused(change, tmp_path, tokenizer, monkeypatch):
    (path,), settings = lines(tmp_path)
    with monkeypatch.context() as patch:
        interrupted_at(patch, 9)
        together(2, [path], tmp_path / "out", tokenizer, **settings)
    make, what = CHANGES[change]
    work = {"names": [path], "tokenizer": tokenizer} | settings | make(path)
    before = snapshot(tmp_path)
    first, second = together(2, target=tmp_path / "out", **work)
    assert str(first).startswith(f"{tmp_path / 'out.parts'} was started with {what}")
    assert str(first).endswith("run with the same ones to resume, or delete it to start again")
    assert isinstance(second, processes.PeerError)
    assert snapshot(tmp_path) == before


def test_folders_and_files_that_are_no_parts(tmp_path, tokenizer, monkeypatch):
    names, settings = lines(tmp_path)
    (tmp_path / "out.parts").mkdir()
    first, _ = together(2, names, tmp_path / "out", tokenizer, **settings)
    assert "out.parts exists and is not unfinished work: move it away" in str(first)
    (tmp_path / "out.parts").rmdir()
    with monkeypatch.context() as patch:
        interrupted_at(patch, 9)
        together(2, names, tmp_path / "out", tokenizer, **settings)
    damaged = next((tmp_path / "out.parts").glob("*.part"))
    whole = damaged.read_bytes()
    for data in (whole[:-1], whole[:-200], b"mine"):
        damaged.write_bytes(data)
        first, _ = together(2, names, tmp_path / "out", tokenizer, **settings)
        assert f"{damaged} is damaged: delete it, and run the same command again" in str(first)
        assert not (tmp_path / "out").exists()
    damaged.unlink()
    assert together(2, names, tmp_path / "out", tokenizer, **settings)[0].manifest


def test_processes_that_do_not_see_the_same(tmp_path, tokenizer):
    for i in range(2):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "a.txt").write_text("a b" * (i + 1))

    def one(share):
        return prepare([tmp_path / f"{share.index}" / "a.txt"], tmp_path / "out", tokenizer, share=share)

    for error in several_processes.in_threads(2, one):
        assert "has source files with other names, sizes or times: all processes need the same files" in str(error)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_standard_input_and_existing_folders_are_refused(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    for error in together(2, ["-"], tmp_path / "out", tokenizer):
        assert "only one process has standard input" in str(error) or isinstance(error, processes.PeerError)
    (tmp_path / "a.txt").write_text("some words " * 99)
    together(2, [tmp_path / "a.txt"], tmp_path / "out", tokenizer)
    for error in together(2, [tmp_path / "a.txt"], tmp_path / "out", tokenizer):
        assert "out exists" in str(error)
    (tmp_path / "a.txt").write_text("some other words " * 99)
    _, prepared = together(2, [tmp_path / "a.txt"], tmp_path / "out", tokenizer, overwrite=True)
    assert prepared.manifest["characters"] == 17 * 99
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "out"}


BAD = {
    "a.jsonl": b'"fine"\n' * 150 + b'{"text": }\n' + b'"fine"\n' * 150,
    "b.jsonl": b'"fine"\n\n' * 150 + b'{"body": 1}\n',
    "c.jsonl": b'"fine"\n' * 200 + b'"\xff"\n' + b'"fine"\n' * 100,
    "d.txt": b"fine " * 200 + b"\xff" + b" fine" * 200,
    "e.txt": b"caf\xc3\xa9 " * 200 + b"\xc3 " + b"fine " * 200,
    "f.csv": b"n,text\n" + b'1,"a\n"\n' * 120 + b"2\n" + b"1,a\n" * 200,
    "g.csv": b"text\n" + b'"a\n"\n' * 120 + b'"a"b\n' + b"a\n" * 200,
    "h.bin": b"\1\0" * 700 + b"\1\5" + b"\1\0" * 700,
    "i.bin": b"\1\0" * 700 + b"\1",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_the_sentence_of_one_process(name, tmp_path, tokenizer):
    (tmp_path / name).write_bytes(BAD[name])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as alone:
        prepare([tmp_path / name], tmp_path / "one", tokenizer)
    found = together(3, [tmp_path / name], tmp_path / "out", tokenizer)
    own = [str(error) for error in found if isinstance(error, ValueError)]
    assert own
    assert set(own) == {str(alone.value)}
    others = [str(error) for error in found if isinstance(error, processes.PeerError)]
    assert len(own) + len(others) == 3
    assert all(text.endswith(f"failed: {alone.value}") for text in others)
    assert not (tmp_path / "out").exists()


def test_the_bar_shows_the_whole(tmp_path, tokenizer, monkeypatch):
    """In process 0, also what others have done, and what was there before."""
    names, settings = lines(tmp_path)
    with monkeypatch.context() as patch:
        interrupted_at(patch, 9)
        together(2, names, tmp_path / "out", tokenizer, **settings)
    updates = []

    class Bars:
        shown = True

        def __init__(self, shown):
            self.shown = shown is not False

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, title, done, total):
            updates.append((title, done, total))

    monkeypatch.setattr(parts.progress, "bars", lambda *columns, shown: Bars(shown))
    together(2, names, tmp_path / "out", tokenizer, **settings)
    total = names[0].stat().st_size
    encoding_updates = [update for update in updates if update[0] == "encoding"]
    assert 0 < encoding_updates[0][1] < encoding_updates[-1][1] == total
    assert encoding_updates == sorted(encoding_updates)
    assert {update[2] for update in encoding_updates} == {total}
    assert "joining" in {update[0] for update in updates}
