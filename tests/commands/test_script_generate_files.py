"""scripts/generate.py --input --output: the library's texts, row by row, also after interruptions."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest
from strength import full_only

import gpt2_jax
from gpt2_jax.commands import _generate_files, generate

PROMPTS = ["ROMEO:", "", "My lord, ", "caf\xe9 \U0001f98a", "O", "O"]
OPTIONS = ["--max-new-tokens", 11, "--seed", 5, "--num-samples", 2, "--batch-size", 4]


@pytest.fixture
def source(tmp_path):
    """Return a file with objects that have other fields, strings, and blank lines."""
    lines = [
        json.dumps({"id": i, "prompt": prompt, "clé": None}) if i % 2 == 0 else json.dumps(prompt)
        for i, prompt in enumerate(PROMPTS)
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def samples(shakespeare, tokenizer):
    """Return the texts of the two samples of each of PROMPTS, with OPTIONS, in other batches than the script's."""
    rows = [tokenizer.encode(prompt) or [tokenizer.eot] for prompt in PROMPTS for _ in range(2)]
    texts = []
    for first in range(0, len(rows), 3):
        part = rows[first : first + 3]
        part = gpt2_jax.generate(*shakespeare, part, 11, top_k=40, seed=5, stop_ids=[tokenizer.eot], first_row=first)
        texts += map(tokenizer.decode, part)
    return [texts[i : i + 2] for i in range(0, len(texts), 2)]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_a_line_a_prompt(run, source, samples, tmp_path):
    """The lines are in order, with the fields of the input and the library's samples. stdout is empty, and stderr has
    no progress bar, because it is not a terminal."""
    done = run("--input", source, "--output", tmp_path / "out.jsonl", *OPTIONS)
    assert (done.code, done.out) == (0, "")
    records = read(tmp_path / "out.jsonl")
    assert [record["prompt"] for record in records] == PROMPTS
    assert [record["index"] for record in records] == list(range(6))
    assert [record.get("id") for record in records] == [0, None, 2, None, 4, None]
    assert all(("clé" in record) == (record["index"] % 2 == 0) for record in records)
    assert [[sample["text"] for sample in record["samples"]] for record in records] == samples
    assert {sample["finish_reason"] for record in records for sample in record["samples"]} == {"length"}
    assert re.fullmatch(r"model: [^\n]*\n6 prompts in [^\n]*\n", done.err)
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "out.jsonl"}


@pytest.mark.parametrize(("line", "n_calls"), [({}, 5), ({"settings": None}, 5), ({"settings": {"top_k": 1}}, 1)])
def test_the_input_is_read_once(run, tmp_path, monkeypatch, line, n_calls):
    """Lines with their own settings are completed in larger groups, which is known when all lines were read."""
    (tmp_path / "in").write_text("\n".join([json.dumps({"prompt": "O"} | line), *['"settings"'] * 4]), encoding="utf-8")
    read_bytes, reads, complete, calls = Path.read_bytes, [], _generate_files._Lines.complete, []
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path.name) or read_bytes(path))
    monkeypatch.setattr(_generate_files._Lines, "complete", lambda *args: calls.append(1) or complete(*args))
    options = ["--max-new-tokens", 1, "--batch-size", 1]
    assert run("--input", tmp_path / "in", "--output", tmp_path / "out", *options).code == 0
    assert (reads.count("in"), len(calls), len(read(tmp_path / "out"))) == (1, n_calls, 5)


def test_stops_and_log_probabilities(run, shakespeare, tokenizer, tmp_path):
    """A sample has the reason for its end, and for each token the values of --logprobs."""
    ids, (given,) = gpt2_jax.generate(*shakespeare, [tokenizer.encode("ROMEO:")], 11, temperature=0, logprobs=3)
    text = tokenizer.decode(ids[0])
    (tmp_path / "in").write_text('"ROMEO:"\n"To be"', encoding="utf-8")
    options = ["--max-new-tokens", 11, "--temperature", 0, "--logprobs", 3, "--batch-size", 1, "--stop", text[-7:]]
    assert run("--input", tmp_path / "in", "--output", tmp_path / "out", *options).code == 0
    (sample,), (other,) = (record["samples"] for record in read(tmp_path / "out"))
    assert (sample["text"], sample["finish_reason"], sample["stop"]) == (text[:-7], "stop", text[-7:])
    assert (other["finish_reason"], other["stop"]) == ("length", None)
    assert len(other["logprobs"]) == 11
    assert 0 < len(sample["logprobs"]) < 11
    for i, token in enumerate(sample["logprobs"]):
        assert (token["token"], token["id"]) == (tokenizer.decode([ids[0][i]]), ids[0][i])
        assert bytes(token["bytes"]) == tokenizer.token_bytes(ids[0][i])
        assert token["logprob"] == pytest.approx(given.chosen[i], abs=1e-6)
        assert [top["id"] for top in token["top"]] == given.top_ids[i].tolist()
        assert [top["token"] for top in token["top"]] == [tokenizer.decode([j]) for j in given.top_ids[i].tolist()]
        assert [bytes(top["bytes"]) for top in token["top"]] == [
            tokenizer.token_bytes(j) for j in given.top_ids[i].tolist()
        ]
        assert [top["logprob"] for top in token["top"]] == pytest.approx(given.top[i].tolist(), abs=1e-6)


def test_names_with_a_home(run, tmp_path, monkeypatch):
    """`~` means the home folder, also where the shell does not replace it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "in").write_text('"a"', encoding="utf-8")
    assert run("--input=~/in", "--output=~/out", "--max-new-tokens", 0).code == 0
    assert read(tmp_path / "out")[0]["samples"] == [{"text": "", "finish_reason": "length", "stop": None}]


def test_interrupted_and_gone_on_with(run, source, tmp_path, monkeypatch):
    """Other settings are rejected and named. The same settings, with another batch size, finish the work: the bytes
    are those of an uninterrupted run."""
    assert run("--input", source, "--output", tmp_path / "whole", *OPTIONS).code == 0
    complete = generate.Model.complete

    def interrupted(self, rows):
        if rows[0].number >= 4:
            raise KeyboardInterrupt
        return complete(self, rows)

    files = ["--input", source, "--output", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(generate.Model, "complete", interrupted)
        assert run(*files, *OPTIONS).code == 130
    part = (tmp_path / "out.part").read_bytes()
    assert part.count(b"\n") == 3
    with monkeypatch.context() as patch:
        patch.setattr(gpt2_jax, "load", None)
        for changed, sentence in {
            "--seed=6": "seed was 5 and is 6",
            "--num-samples=3": "num_samples was 2 and is 3",
            "--top-p-rule=common": 'top_p_rule was "original" and is "common"',
            "--dtype=bfloat16": 'dtype was null and is "bfloat16"',
            "--stop=x": "stop_strings was",
            "--no-stop-at-eot": "stop_ids was",
            "--allow-special": "allow_special was false and is true",
            "--prompt-logprobs": "prompt_logprobs was false and is true",
        }.items():
            done = run(*files, *OPTIONS, changed)
            assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done
            assert sentence in done.err
            assert (tmp_path / "out.part").read_bytes() == part
    done = run(*files, *OPTIONS, "--batch-size", 5)
    assert done.code == 0
    assert "\n4 prompts in" in done.err
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "out.part").exists()


REFUSED = {
    "an output that exists": ('"a"', "done", "done.* exists"),
    "the input as output": ('"a"', "in", "is the input"),
    "no folder": ('"a"', "no/such/out", "no such folder"),
    "a line that is no prompt": ('"a"\n{"text": "b"}', "out", "line 2"),
    "a line that is no JSON": ('"a"\n\n"b', "out", "line 3"),
    "a field that the output needs": ('{"prompt": "a", "samples": 3}', "out", '"samples"'),
    "a prompt too long": ('"a"\n' * 5 + json.dumps("x " * 300) + '\n"a"', "out", "line 6: the prompt .*n_ctx"),
}


@pytest.mark.parametrize(("data", "output", "culprit"), REFUSED.values(), ids=REFUSED)
def test_refused_before_the_weights_are_read(run, tmp_path, monkeypatch, data, output, culprit):
    """Also an error that would otherwise appear only after hours: a prompt that does not fit."""
    monkeypatch.setattr(gpt2_jax, "load", None)
    (tmp_path / "in").write_text(data, encoding="utf-8")
    (tmp_path / "done").write_text("three weeks of work", encoding="utf-8")
    done = run("--input", tmp_path / "in", "--output", tmp_path / output)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done
    assert re.search(culprit, done.err), done.err
    assert {path.name for path in tmp_path.iterdir()} == {"in", "done"}
    assert (tmp_path / "done").read_text(encoding="utf-8") == "three weeks of work"
    assert run("--input", tmp_path / "nothing", "--output", tmp_path / "out").code == 2


def test_long_prompts_may_slide(run, tmp_path):
    (tmp_path / "in").write_text(json.dumps("x " * 300), encoding="utf-8")
    files = ["--input", tmp_path / "in", "--output", tmp_path / "out"]
    assert run(*files, "--max-new-tokens", 0, "--overflow", "slide").code == 0


@pytest.mark.skipif(not hasattr(signal, "SIGKILL") or not hasattr(os, "openpty"), reason="kills, and needs a terminal")
@full_only("test_jsonl.py kills the same code")
def test_killed_at_random_moments(run, tmp_path):
    """The real process is killed several times. The last one, on a terminal, resumes and shows its progress."""
    rng = random.Random(3)
    source, target, part = tmp_path / "in", tmp_path / "out", tmp_path / "out.part"
    source.write_text("\n".join(json.dumps(f"{prompt} {i}") for i in range(30) for prompt in PROMPTS), encoding="utf-8")
    options = ["--input", source, "--max-new-tokens", 11, "--num-samples", 2, "--batch-size", 4]
    assert run(*options, "--output", tmp_path / "whole").code == 0
    command = [sys.executable, str(commands.SCRIPTS / "generate.py"), *map(str, options), "--output", str(target)]
    n_lines, grown = 0, 0
    for _ in range(3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        while process.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") <= max(n_lines, 1)):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.wait()
        assert not target.exists(), "all was done before the kill: more prompts are needed"
        lines = part.read_bytes().split(b"\n", 1)[1]
        assert (tmp_path / "whole").read_bytes().startswith(lines)
        grown += part.read_bytes().count(b"\n") > n_lines
        n_lines = part.read_bytes().count(b"\n")
    assert grown == 3
    with commands.OnATerminal("generate", *options, "--output", target, cwd=tmp_path, COLUMNS="100") as terminal:
        assert terminal.end() == 0
    shown = re.findall(r"(\d+)/180", terminal.shown)
    assert int(shown[0]) >= n_lines - 1 > 0
    assert shown[-1] == "180"
    assert target.read_bytes() == (tmp_path / "whole").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "whole"}
