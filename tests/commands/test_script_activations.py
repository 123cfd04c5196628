"""scripts/activations.py: only the folder on stdout, sizes and times on stderr, one message for any mistake."""

import json
import re

import commands
import numpy as np
import pytest
from token_folders import DOCUMENTS, snapshot, write_jsonl

from gpt2_jax import research, training
from gpt2_jax.commands import activations
from gpt2_jax.research import _harvest

CAPTURE = ("--capture", "h1/resid_post$", "h0/attn/z")


@pytest.fixture(scope="module")
def main():
    with commands.config_of_jax_kept():
        yield activations.main


@pytest.fixture
def run(main, capfd, tmp_path, monkeypatch):
    """Call the entry point in this process, in the folder of the files."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [{"body": text} for text in ("", *DOCUMENTS)])
    (tmp_path / "b.txt").write_text("What, ho!", encoding="utf-8")
    return commands.caller(main, capfd)


def documents_of(stored):
    """The ids of each document in a folder."""
    return [stored["tokens"][stored["document"][:] == i].tolist() for i in range(max(stored["document"][:]) + 1)]


def test_texts_to_a_folder(run, tmp_path, shakespeare, tokenizer):
    done = run("a.jsonl", "b.txt", *CAPTURE, "-o", "out", "--field", "body")
    assert (done.code, done.out) == (0, "out\n"), done.err
    ids = [tokenizer.encode(text) for text in (*DOCUMENTS, "What, ho!")]
    n = sum(map(len, ids))
    lines = done.err.splitlines()
    assert lines[0] == f"text: {len(ids)} documents, {n} tokens"
    assert lines[1] == "model: the embedded Shakespeare model, 3,553,024 parameters, float32"
    assert re.fullmatch(rf"size: {n * 2060 / 1000:.2f} kB, {n} tokens of 2.06 kB each, in 1 shard", lines[2])
    assert lines[3:] == ["programs: 1, for texts of up to 48 tokens"]
    stored = research.open_activations("out")
    assert documents_of(stored) == ids
    assert stored.manifest["model"] == "the embedded Shakespeare model"
    assert [file["name"] for file in stored.manifest["sources"]] == ["a.jsonl", "b.txt"]
    expected = research.forward(*shakespeare, [ids[2]], capture="h1/resid_post$")[1]["h1/resid_post"][0]
    got = stored["h1/resid_post"][stored["document"][:] == 2]
    assert np.abs(got - np.asarray(expected)).max() < 1e-5  # measured: 9.5e-7
    before = snapshot(tmp_path / "out")
    done = run("a.jsonl", "b.txt", *CAPTURE, "-o", "out", "--field", "body")
    assert (done.code, done.out) == (0, "out\n")
    assert done.err.splitlines()[-1] == "already there: 1 of 1 shard; left: 0 bytes"
    assert snapshot(tmp_path / "out") == before


def test_options(run, tokenizer):
    how = ("--field", "body", "--max-tokens", 5, "--skip-first", 1, "--bos", "--limit", 2, "--store-dtype", "bfloat16")
    done = run("a.jsonl", *CAPTURE, "-o", "out", *how, "--checksums", "--shard-megabytes", 1, "--dtype", "bfloat16")
    assert done.code == 0, done.err
    assert "texts of more than 5 tokens, which are read in windows: " in done.err
    stored = research.open_activations("out")
    ids = [[tokenizer.eot, *tokenizer.encode(text)] for text in DOCUMENTS[:2]]
    assert documents_of(stored) == [[token for t, token in enumerate(row) if t % 5] for row in ids]
    assert stored["h1/resid_post"].dtype == "bfloat16"
    assert stored.manifest["computed"]["dtype"] == "bfloat16"
    stored.check()


def test_prepared_text(run, tmp_path, tokenizer):
    """Both splits of gpt2-prepare, or one of its files."""
    training.prepare(["a.jsonl"], tmp_path / "tokens", tokenizer, field="body", val_fraction=0.3, split="documents")
    assert run("tokens", *CAPTURE, "-o", "all").code == 0
    assert run("tokens/train.bin", *CAPTURE, "-o", "some").code == 0
    found = documents_of(research.open_activations("all"))
    assert sorted(found) == sorted(tokenizer.encode(text) for text in DOCUMENTS)
    train = documents_of(research.open_activations("some"))
    assert 0 < len(train) < len(found)
    assert found[: len(train)] == train
    manifest = json.loads((tmp_path / "tokens" / "tokens.json").read_text())
    (tmp_path / "tokens" / "tokens.json").write_text(json.dumps(manifest | {"tokenizer_sha256": "0" * 64}))
    done = run("tokens", *CAPTURE, "-o", "other")
    assert (done.code, done.out) == (2, "")
    assert "tokens was prepared with a different vocabulary" in done.err


def test_stopped_and_continued(run, tmp_path, monkeypatch):
    """The same command continues. Ctrl-C has its own status."""
    write_jsonl(tmp_path / "many.jsonl", [f"{text} {i}" for i in range(40) for text in DOCUMENTS])
    args = ("many.jsonl", "--capture", ".*/mlp/post", "--shard-megabytes", 1)
    assert run(*args, "-o", "one").code == 0
    starts, start = [], _harvest.Program.start

    def interrupted(*batch):
        if len(starts) == 7:
            raise KeyboardInterrupt
        starts.append(start(*batch))
        return starts[-1]

    with monkeypatch.context() as patch:
        patch.setattr(_harvest.Program, "start", interrupted)
        done = run(*args, "-o", "two")
    assert (done.code, done.out) == (130, "")
    n_shards = len(list((tmp_path / "one").glob("shard-*")))
    n_done = len(list((tmp_path / "two").glob("shard-*")))
    assert 0 < n_done < n_shards
    done = run(*args, "-o", "two")
    assert (done.code, done.out) == (0, "two\n")
    assert f"already there: {n_done} of {n_shards} shards; left: " in done.err
    one, two = snapshot(tmp_path / "one"), snapshot(tmp_path / "two")
    assert [*map(str, one)] == [str(path).replace("/two", "/one") for path in two]
    assert [*one.values()] == [*two.values()]


@pytest.mark.parametrize(
    ("args", "culprit"),
    [
        (
            ("a.jsonl", "--capture", "attn/pattern", "-o", "out"),
            "h0/attn/pattern has as many values per token as its text",
        ),
        (("a.jsonl", "--capture", "(", "-o", "out"), r"'\(' is not a regular expression"),
        (("no.txt", *CAPTURE, "-o", "out"), "no such file or folder: no.txt"),
        (("a.jsonl", *CAPTURE, "-o", "out"), 'a.jsonl, line 1 has no field "text"; it has: body'),
        (("empty.txt", *CAPTURE, "-o", "out"), "there is no text in 1 files with 0 bytes in total"),
        (("b.txt", *CAPTURE, "-o", "out", "--limit", 0), "--limit must be 1 or more, not 0"),
        (("b.txt", *CAPTURE, "-o", "out", "--shard-megabytes", 0), "--shard-megabytes must be 1 or more, not 0"),
        (("b.txt", *CAPTURE, "-o", "out", "--max-tokens", 257), "max_tokens must be a whole number, from 1 to 256"),
        (("b.txt", *CAPTURE, "-o", "out", "--skip-first", 100), "no text has more than 100 tokens"),
        (("b.txt", *CAPTURE, "-o", "full"), r"full contains files that are not part of stored activations \(x\)"),
        (("b.txt", *CAPTURE, "-o", "out", "--model", "nowhere"), "nowhere"),
        (("b.txt", *CAPTURE, "-o", "out", "--mesh.data", 0), "--mesh.data must be 1 or more"),
    ],
)
def test_mistakes(run, tmp_path, args, culprit):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    done = run(*args)
    assert (done.code, done.out) == (2, ""), done
    lines = [line for line in done.err.splitlines() if not re.match("(model|text|size): ", line)]
    assert len(lines) == 1, done.err
    assert lines[0].startswith("gpt2-activations: ")
    assert re.search(culprit, lines[0]), lines[0]
    assert not (tmp_path / "out").exists()


def test_other_work_is_refused(run, tmp_path):
    assert run("b.txt", *CAPTURE, "-o", "out").code == 0
    before = snapshot(tmp_path)
    done = run("b.txt", *CAPTURE, "-o", "out", "--store-dtype", "float16")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1] == (
        "gpt2-activations: out was begun with other activations, or another dtype for them: repeat the command that "
        "began it to continue, or choose another folder"
    )
    assert snapshot(tmp_path) == before


def test_as_a_user_types_it(tmp_path):
    (tmp_path / "b.txt").write_text("What, ho!")
    done = commands.in_a_process("activations", "b.txt", *CAPTURE, "-o", "out", cwd=tmp_path)
    assert (done.code, done.out) == (0, "out\n"), done.err
    done = commands.in_a_process("activations", "b.txt", *CAPTURE, "-o", "out", "--store-dtype=float16", cwd=tmp_path)
    assert (done.code, done.out, "Traceback" in done.err) == (2, "", False)
