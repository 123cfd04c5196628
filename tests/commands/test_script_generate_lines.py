"""scripts/generate.py --input: settings of a line, bad lines, special ids, log-probabilities, and which weights."""

import json
import re
import shutil

import numpy as np
import pytest

import gpt2_jax
from gpt2_jax.commands import generate
from gpt2_jax.generation import Settings, complete, score

SEED, N_NEW = 5, 7
OPTIONS = ["--max-new-tokens", N_NEW, "--seed", SEED, "--batch-size", 4]


@pytest.fixture
def finished(run, tmp_path):
    """finished(lines, *options) -> the result of the command, and its output lines."""

    def call(lines, *options):
        (tmp_path / "in").write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        done = run("--input", tmp_path / "in", "--output", tmp_path / "out", *OPTIONS, *options)
        out = tmp_path / "out"
        records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        out.unlink(missing_ok=True)
        return done, records

    return call


# ---- settings of a line


def test_each_line_has_its_settings_and_its_own_draws(finished, shakespeare, tokenizer):
    """Lines with equal settings run together, in order, and a row draws with its number in the file."""
    given = [
        {}, {"temperature": 0}, {"seed": 9}, {"temperature": 0}, {"max_new_tokens": 3, "top_k": 0}, {},
        {"stop": "e", "logprobs": 1}, {"stop": ["e", "o"], "stop_at_eot": False}, {"temperature": 0, "seed": 5},
    ]  # fmt: skip
    lines = [{"prompt": "ROMEO:", "settings": settings} if settings else '"ROMEO:"' for settings in given]
    done, records = finished(lines, "--num-samples", 2)
    assert done.code == 0, done.err
    assert [record.get("settings", {}) for record in records] == given
    assert [record["index"] for record in records] == list(range(len(given)))
    ids = tokenizer.encode("ROMEO:")
    for i, (record, line) in enumerate(zip(records, given, strict=True)):
        stops = line.get("stop", ())
        stop_ids = [tokenizer.eot] if line.get("stop_at_eot", True) else []
        settings = {"max_new_tokens": N_NEW, "top_k": 40, "seed": SEED}
        settings |= {name: value for name, value in line.items() if not name.startswith("stop")}
        settings |= {"stop_strings": [stops] if isinstance(stops, str) else list(stops), "stop_ids": stop_ids}
        for k, sample in enumerate(record["samples"]):
            (alone,) = complete(*shakespeare, [ids], tokenizer, Settings(**settings), 2 * i + k)
            assert (sample["text"], sample["stop"]) == (alone.text, alone.stop)
            assert ("logprobs" in sample) == ("logprobs" in line)
    texts = [record["samples"][0]["text"] for record in records]
    assert texts[1] == texts[3] == texts[8]
    assert len({texts[0], texts[2], texts[5]}) == 3


WRONG = {
    "not an object": ({"settings": [1]}, '"settings" must be an object'),
    "an unknown name": ({"settings": {"temprature": 0}}, "unknown name, 'temprature'.*temperature"),
    "not for a line": ({"settings": {"num_samples": 2}}, "'num_samples'"),
    "a wrong value": ({"settings": {"top_p": 2}}, "top_p.*2"),
    "a wrong type": ({"settings": {"temperature": "hot"}}, "temperature.*'hot'"),
    "a wrong stop": ({"settings": {"stop": 5}}, "stop must be"),
    "a wrong stop in a list": ({"settings": {"stop": [5]}}, "5"),
    "a wrong choice": ({"settings": {"overflow": ["error"]}}, "overflow"),
    "no true or false": ({"settings": {"allow_special": 1}}, "allow_special must be true or false"),
    "too long": ({"settings": {"max_new_tokens": 256}}, "n_ctx"),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG)
def test_wrong_settings_are_named_before_the_weights_are_read(finished, monkeypatch, fields, message):
    monkeypatch.setattr(gpt2_jax, "load", None)
    done, records = finished(['"a"', {"prompt": "b", **fields}])
    assert (done.code, done.err.count("\n"), records) == (2, 1, [])
    assert re.search(f"in, line 2: .*{message}", done.err), done.err


@pytest.fixture
def broken(shakespeare, tokenizer, tmp_path):
    """The embedded model. Its logits are NaN from the fifth token of a text on."""
    config, params = shakespeare
    gpt2_jax.save(tmp_path / "nan", config, params | {"wpe": params["wpe"].at[4].set(np.nan)}, tokenizer=tokenizer)
    return tmp_path / "nan"


@pytest.mark.filterwarnings("ignore:.*NaN")
def test_errors_of_a_batch_name_the_prompt(run, finished, broken, tmp_path):
    """Not its place in a batch: --batch-size is 4, and two samples of a prompt are two rows."""
    lines = [{"prompt": "a", "settings": {"max_new_tokens": 1}}] * 6 + ['"b"', '"c"']
    done, _ = finished(lines, "--num-samples", 2, "--model", broken)
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("gpt2-generate: the prompt with index 6: the logits are NaN"), done.err
    (tmp_path / "out.part").unlink()
    lines = ['"a"', '"b"', '"I am not what I am"']
    done, _ = finished(lines, "--max-new-tokens", 0, "--model", broken, "--prompt-logprobs")
    assert done.err.splitlines()[-1].startswith("gpt2-generate: the prompt with index 2: the logits are NaN"), done.err
    prompts = [word for letter in "abcdefg" for word in ("--prompt", letter)]
    done = run(*prompts, "--prompt", "I am not what I am", *OPTIONS, "--max-new-tokens", 1, "--model", broken)
    assert done.err.splitlines()[-1].startswith("gpt2-generate: prompts[7]: the logits are NaN"), done.err


def test_fields_that_look_like_settings(finished):
    """They were always copied. Now a line says that they have no effect."""
    done, records = finished([{"prompt": "a", "temperature": 0, "id": 3}, {"prompt": "b", "temperature": 1}])
    assert [record["temperature"] for record in records] == [0, 1]
    assert done.err.count('note: "temperature" of a line has no effect') == 1
    assert '"id"' not in done.err


# ---- bad lines


def test_bad_lines_are_skipped_by_option(finished):
    """Their output lines say what is wrong. The draws of the other prompts do not change."""
    lines = ['"ROMEO:"', "no JSON", '{"text": "x"}', '{"prompt": "x", "index": 1}', "", json.dumps("x " * 300)]
    lines += ['{"prompt": "x", "settings": {"seed": -1}}', '"To be"']
    done, _ = finished(lines)
    assert done.code == 2
    assert "line 2 is not JSON" in done.err
    done, records = finished(lines, "--skip-bad-lines")
    assert done.code == 0, done.err
    assert [record["index"] for record in records] == list(range(7))
    assert [record.get("line") for record in records] == [None, 2, 3, 4, 6, 7, None]
    for record, message in zip(records[1:6], ("JSON", "not a prompt", '"index"', "n_ctx", "seed"), strict=True):
        assert record.keys() == {"line", "error", "index"}
        assert f"line {record['line']}" in record["error"]
        assert message in record["error"]
    assert len(re.findall("^skipped: .*line", done.err, flags=re.MULTILINE)) == 5
    assert "lines skipped: 5" in done.err
    whole = finished(['"ROMEO:"', *['"x"'] * 5, '"To be"'])[1]
    assert [records[i] for i in (0, 6)] == [whole[i] for i in (0, 6)]


# ---- special ids, and log-probabilities of the prompt


def test_the_end_of_text_in_a_prompt(run, finished, shakespeare, tokenizer):
    """An option makes it the special id; by default its characters are text."""
    text = "Enough.<|endoftext|>KING"
    done = run("--prompt", text, "--allow-special", "--prompt-logprobs", *OPTIONS)
    assert "'<|endoftext|>'" in done.out
    assert "'<|endoftext|>'" not in run("--prompt", text, "--prompt-logprobs", *OPTIONS).out
    ids = tokenizer.encode(text, allow_special=True)
    assert tokenizer.eot in ids
    lines = [{"prompt": text}, {"prompt": text, "settings": {"allow_special": True}}]
    _, records = finished(lines, "--prompt-logprobs")
    assert [token["id"] for token in records[0]["prompt_logprobs"]] == tokenizer.encode(text)
    assert [token["id"] for token in records[1]["prompt_logprobs"]] == ids
    settings = Settings(N_NEW, top_k=40, seed=SEED, stop_ids=[tokenizer.eot])
    (alone,) = complete(*shakespeare, [ids], tokenizer, settings, 1)
    assert records[1]["samples"][0]["text"] == alone.text
    _, records = finished(lines, "--allow-special", "--prompt-logprobs")
    assert [[token["id"] for token in record["prompt_logprobs"]] for record in records] == [ids, ids]


def test_log_probabilities_of_a_prompt(run, finished, shakespeare, tokenizer):
    """Those of `score`; the first token has none. A token inside a character has its bytes (ollama/ollama#13497)."""
    text = "To be \U0001f98a caf\xe9"
    _, records = finished([json.dumps(text), '""'], "--prompt-logprobs", "--logprobs", 2)
    tokens = records[0]["prompt_logprobs"]
    ids = tokenizer.encode(text)
    assert [token["id"] for token in tokens] == ids
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode() == text
    assert sum(token["token"] == "\ufffd" for token in tokens) >= 4, "no token lies inside a character"
    assert tokens[0]["logprob"] is None
    (expected,) = score(*shakespeare, [ids])
    np.testing.assert_allclose([token["logprob"] for token in tokens[1:]], expected.logprobs, atol=1e-5)  # 2e-6
    assert records[1]["prompt_logprobs"] == [
        {"token": "<|endoftext|>", "id": tokenizer.eot, "bytes": list(b"<|endoftext|>"), "logprob": None}
    ]
    done = run("--prompt", text, "--prompt-logprobs", "--num-samples", 2, *OPTIONS)
    assert done.out.count("logprob       p  token") == 1
    shown = re.findall(r"^ *(-\d+\.\d{3}) ", done.out, flags=re.MULTILINE)
    np.testing.assert_allclose(np.array(shown, float), expected.logprobs, atol=6e-4)  # three digits: 5e-4


# ---- the same weights


@pytest.fixture
def moving(tmp_path, shakespeare, tokenizer):
    """A model in a folder of its own."""
    gpt2_jax.save(tmp_path / "model", *shakespeare, format="huggingface", tokenizer=tokenizer)
    return tmp_path / "model"


@pytest.fixture
def interrupted(run, tmp_path, monkeypatch, moving):
    """Options of a command that was interrupted in the middle, and its part file."""
    (tmp_path / "in").write_text("\n".join(f'"prompt {i}"' for i in range(12)))
    options = ["--input", tmp_path / "in", "--output", tmp_path / "out", *OPTIONS]
    complete_rows = generate.Model.complete

    def stopping(self, rows):
        if rows[0].number >= 4:
            raise KeyboardInterrupt
        return complete_rows(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(generate.Model, "complete", stopping)
        assert run(*options, "--model", moving).code == 130
    return options, tmp_path / "out.part"


def test_other_weights_under_the_same_path_are_refused(run, interrupted, moving, shakespeare, tokenizer, tmp_path):
    """One value of one tensor is enough. Otherwise one file would hold the samples of two models."""
    options, part = interrupted
    before = part.read_bytes()
    config, params = shakespeare
    changed = params | {"ln_f": params["ln_f"] | {"b": params["ln_f"]["b"].at[0].add(1e-6)}}
    shutil.rmtree(moving)
    gpt2_jax.save(moving, config, changed, format="huggingface", tokenizer=tokenizer)
    done = run(*options, "--model", moving)
    assert (done.code, done.out, part.read_bytes()) == (2, "", before)
    assert re.search(r"out\.part was started with other weights: .* delete it", done.err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["tensorflow", "huggingface", "orbax"])
def test_the_same_weights_elsewhere_resume(run, interrupted, moving, shakespeare, tokenizer, tmp_path, form):
    """Also in another format: the values count."""
    options, _ = interrupted
    assert run(*options[:3], tmp_path / "whole", *OPTIONS, "--model", moving).code == 0
    shutil.rmtree(moving)
    gpt2_jax.save(tmp_path / "moved", *shakespeare, format=form, tokenizer=tokenizer)
    done = run(*options, "--model", tmp_path / "moved")
    assert (done.code, done.out) == (0, ""), done.err
    assert "\n8 prompts in" in done.err
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_part_file_of_an_earlier_version(run, interrupted, moving, monkeypatch):
    """It does not say which weights it has: it is refused before any are read, and not touched."""
    options, part = interrupted
    header, rest = part.read_bytes().split(b"\n", 1)
    fields = json.loads(header)
    del fields["model_sha256"]
    part.write_bytes(json.dumps(fields).encode() + b"\n" + rest)
    before = part.read_bytes()
    monkeypatch.setattr(gpt2_jax, "load", None)
    done = run(*options, "--model", moving)
    assert (done.code, part.read_bytes()) == (2, before)
    assert re.search(r"earlier version, which did not record the weights: .*delete it", done.err)
