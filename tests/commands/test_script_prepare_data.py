"""scripts/prepare_data.py: only the folder on stdout, a table of counts on stderr, one message for any mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import several_processes
import token_folders
from token_folders import DOCUMENTS, expected_ids, held, write_jsonl

from gpt2_jax.commands import prepare
from gpt2_jax.data.token_files import open_prepared


@pytest.fixture
def run(capfd):
    return commands.caller(prepare.main, capfd)


def table(text: str) -> dict[str, list[str]]:
    lines = [line.split() for line in text.splitlines()]
    return {line[0]: line[1:] for line in lines if line and line[0] in ("tokens", "training", "validation")}


def test_text_to_a_folder(run, tmp_path, tokenizer):
    documents = [f"{text} {i}" for i in range(40) for text in DOCUMENTS]
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": text} for text in documents])
    out = tmp_path / "tokens"
    done = run(path, "--output", out, "--field", "body", "--val-fraction", 0.25, "--seed", 3, "--workers", 1)
    assert (done.code, done.out) == (0, f"{out}\n"), done.err
    prepared = open_prepared(out, tokenizer)
    counts = {name: prepared.manifest[name] for name in ("train", "val")}
    for name, title in (("train", "training"), ("val", "validation")):
        assert table(done.err)[title] == [f"{counts[name]['tokens']:,}", f"{counts[name]['documents']:,}"]
    assert "validation: drawn by document" in done.err
    assert "1,281 ids, of the embedded Shakespeare model" in done.err
    assert "note: the text has the characters <|endoftext|> 40 times" in done.err
    assert "if they separate documents, pass --end-of-text split" in done.err
    n_tokens = prepared.train.n_tokens + prepared.val.n_tokens
    assert n_tokens == len(expected_ids(tokenizer, documents))
    assert (prepared.manifest["seed"], prepared.manifest["val_fraction"]) == (3, 0.25)


def test_what_is_left_out_is_told(run, tmp_path, tokenizer):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a.zst", "b.zst", "c.zst", "d.pdf"):
        (folder / name).write_bytes(b"")
    (folder / "README.md").write_bytes(b"")
    (folder / "e.csv").write_bytes("label;text\n1;caf\xe9<|endoftext|>bar\n2\n".encode("cp1252"))
    options = ("--encoding", "cp1252", "--end-of-text", "split", "--skip-bad-rows", "--val-fraction", 0)
    done = run(folder, "-o", tmp_path / "t", *options)
    assert done.code == 0, done.err
    assert "files: 1 .csv, 1 .md\n" in done.err
    assert "left out: 3 .zst, 1 .pdf\n" in done.err
    assert "1 .csv file: fields are divided by ;\n" in done.err
    place = f"{folder / 'e.csv'}, line 3: the row has 1 columns, too few"
    assert f"left out: 1 bad record, the first is {place}\n" in done.err
    assert "note:" not in done.err
    assert held(open_prepared(tmp_path / "t").train) == expected_ids(tokenizer, ["caf\xe9", "bar"])


def test_pairs_show_their_targets(run, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "Who?", "a": " Me."}, {"q": "", "a": ""}])
    done = run(path, "-o", tmp_path / "t", "--prompt-field", "q", "--completion-field", "a", "--val-fraction", 0)
    assert done.code == 0, done.err
    assert table(done.err)["tokens"] == ["documents", "targets"]
    counts = open_prepared(tmp_path / "t").manifest["train"]
    assert table(done.err)["training"] == [f"{counts[name]}" for name in ("tokens", "documents", "targets")]
    assert "left out: 1 document without text" in done.err
    assert "validation: none" in done.err


def test_another_models_vocabulary(run, tmp_path, tokenizer):
    """A folder that has only a vocabulary works too."""
    (tmp_path / "model").mkdir()
    tokens = {token: i for i, token in enumerate([token for token in tokenizer.tokens if len(token) == 1])}
    (tmp_path / "model" / "encoder.json").write_text(json.dumps(tokens | {"<|endoftext|>": len(tokens)}))
    (tmp_path / "model" / "vocab.bpe").write_text("#version: 0.2\n")
    (tmp_path / "a.txt").write_text("Wer?")
    done = run(tmp_path / "a.txt", "-o", tmp_path / "t", "--tokenizer", tmp_path / "model", "--val-fraction", 0)
    assert done.code == 0, done.err
    assert held(open_prepared(tmp_path / "t").train) == [tokens[character] for character in "Wer?"]


def test_overwriting(run, tmp_path):
    (tmp_path / "a.txt").write_text("some words of text, and more of them")
    assert run(tmp_path / "a.txt", "-o", tmp_path / "t").code == 0
    before = token_folders.snapshot(tmp_path)
    done = run(tmp_path / "a.txt", "-o", tmp_path / "t")
    assert (done.code, done.out) == (2, "")
    what = "choose another folder, or replace prepared text in it with --overwrite"
    assert done.err == f"gpt2-prepare: {tmp_path / 't'} exists: {what}\n"
    assert token_folders.snapshot(tmp_path) == before
    assert run(tmp_path / "a.txt", "-o", tmp_path / "t", "--overwrite", "--val-fraction", 0.5).code == 0


@pytest.mark.parametrize(
    ("args", "culprit"),
    [
        (("none.txt",), "no such file or folder: none.txt"),
        ((), "there is nothing to read"),
        (("a.txt", "--val-fraction", 1), "val_fraction must be a number, 0 or more and below 1, not 1.0"),
        (("a.txt", "--prompt-field", "q"), "go together"),
        (("a.txt", "--tokenizer", "no/such/model/here"), "no/such/model/here"),
        (
            ("bad.txt",),
            "bad.txt is not UTF-8 text: byte 0xff at offset 4 (invalid start byte); if the file has",
        ),
        (("a.txt", "--encoding", "none"), "encoding must be a text encoding of Python"),
    ],
)
def test_a_mistake_is_a_sentence(run, tmp_path, monkeypatch, args, culprit):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("some words of text")
    Path("bad.txt").write_bytes(b"some\xff")
    done = run(*args, "-o", "t")
    assert (done.code, done.out) == (2, "")
    assert culprit in done.err
    assert done.err.startswith("gpt2-prepare: ")
    assert done.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "bad.txt"]


def test_as_a_user_runs_it_with_text_from_a_pipe(tmp_path, tokenizer):
    """In a process of its own, from another folder, with a tilde, and with several processes that encode."""
    text = "The quality of mercy is not strain'd.\n" * 99
    done = subprocess.run(
        [sys.executable, str(commands.SCRIPTS / "prepare_data.py"), "-", "-o", "~/tokens", "--workers", "2"],
        input=text, cwd=tmp_path, env=os.environ | {"HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'tokens'}\n"), done.stderr
    prepared = open_prepared(tmp_path / "tokens", tokenizer)
    assert held(prepared.train) + held(prepared.val) == tokenizer.encode(text)


def test_two_processes_write_the_files_of_one(run, tmp_path):
    """Started as a user does. Process 0 prints the folder and the table."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{text} {i}"} for i in range(40) for text in DOCUMENTS])
    assert run(path, "-o", tmp_path / "one").code == 0
    both = several_processes.run_command("prepare_data.py", path, "-o", tmp_path / "two")
    assert both[1] == (0, "", ""), both[1].err
    assert both[0][:2] == (0, f"{tmp_path / 'two'}\n"), both[0].err
    assert "training" in table(both[0].err)
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert {file.name for file in tmp_path.iterdir()} == {"a.jsonl", "one", "two"}
