"""scripts/doctor.py --verify: checks of known values, exit status 1 if one fails, and measures beside the paper's."""

import json
import re
import shutil

import checkpoint_forms as forms
import commands
import fake_release
import pytest
import tiny_models

import gpt2_jax
from gpt2_jax import evaluate
from gpt2_jax.commands import _doctor_verify
from gpt2_jax.commands import doctor as command
from gpt2_jax.inspection.known_values import KNOWN
from gpt2_jax.release import known

PASSAGES = ["Give me my robe, put on my crown", "What, ho! my lord, my noble lord", "Long live the king"]
VERSE = "Shall I compare thee to a summer 's day ?\nThou art more lovely and more temperate .\n"


@pytest.fixture(scope="module", autouse=True)
def _tensorflow():
    """Import TensorFlow once, and ignore its own warnings."""
    forms.import_tensorflow()


@pytest.fixture
def run(capfd, cache):
    """Call the entry point in this process."""
    return commands.caller(command.main, capfd)


def results(found) -> dict[str, str]:
    return {check["check"]: check["result"] for check in found["checks"]}


def test_the_embedded_model(run, cache, tmp_path):
    done = run("--verify", "shakespeare")
    assert done.code == 0, done.err
    assert done.err == "model: shakespeare, 3,553,024 parameters, float32\n"
    rows = [re.split(r" {2,}", line.strip()) for line in done.out.splitlines()]
    assert ["parameters", "3,553,024", "3,553,024", "pass"] in rows
    assert ["wte[0, 0]", "0.03548277", "0.03548277", "pass"] in rows
    assert ["id of 'ROMEO'", "858", "858", "pass"] in rows
    assert done.out.endswith(f"{gpt2_jax.embedded_model()}: 19 pass.\n")
    found = commands.report(run, "--verify", "shakespeare")
    assert (found["known"], found["passed"], found["measures"]) == ("shakespeare", True, [])
    assert set(results(found).values()) == {"pass"}
    assert commands.tree(tmp_path) == set()  # no copy, no compiled programs


@pytest.fixture(scope="module")
def copy(tmp_path_factory, shakespeare, tokenizer):
    """A function that saves the embedded model with changed params."""

    def save(name, change=lambda params: params):
        directory = tmp_path_factory.mktemp("models") / name
        config, params = shakespeare
        gpt2_jax.save(directory, config, change(dict(params)), "huggingface", tokenizer=tokenizer)
        return directory

    return save


def test_other_weights_fail(run, copy):
    directory = copy("tuned", lambda params: params | {"wte": params["wte"].at[1, 0].add(1e-4)})
    done = run("--verify", directory)
    assert done.code == 1
    assert re.search(r"^wte\[1, 0\] +-0.1082753 +-0.1081753 +FAIL *$", done.out, re.MULTILINE)
    assert "These are not the published weights of shakespeare" in done.out.splitlines()[-1]
    found = commands.report(run, "--verify", directory, code=1)
    assert not found["passed"]
    assert {name for name, result in results(found).items() if result == "fail"} == {"wte[1, 0]"}


def test_a_shape_of_which_nothing_is_known(run, tmp_path):
    config = tiny_models.CONFIG
    gpt2_jax.save(tmp_path / "tiny", config, tiny_models.random_params(config, 29), "huggingface")
    found = commands.report(run, "--verify", tmp_path / "tiny")
    assert found["known"] is None
    assert results(found) == {
        "hyperparameters": "not applicable",
        "parameters": "pass",
        "names and shapes": "pass",
        "every value is finite": "pass",
        "values of tensors": "not applicable",
        "vocabulary": "not applicable",
        "logits of a forward pass": "pass",
        "greedy continuation": "not applicable",
    }
    assert "not applicable: the model has no vocabulary" in run("--verify", tmp_path / "tiny").out


def test_damaged_files_fail(run, tmp_path):
    for name in known.FILES:
        shutil.copy(gpt2_jax.embedded_model() / name, tmp_path)
    data = (tmp_path / known.DATA).read_bytes()
    (tmp_path / known.DATA).write_bytes(data[:1000] + b"!!!!" + data[1004:])
    done = run("--verify", tmp_path)
    assert done.code == 1
    assert re.search(r"^the files are readable +yes +.*damaged.* FAIL *$", done.out, re.MULTILINE)
    assert "The files are damaged" in done.out.splitlines()[-1]
    (tmp_path / known.DATA).write_bytes(data)
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nx y z\n")
    found = commands.report(run, "--verify", tmp_path, code=1)
    assert {name for name, result in results(found).items() if result == "fail"} == {"the vocabulary is readable"}


def test_a_released_size(run, cache, monkeypatch):
    """A size is read from the cache folder, and is not downloaded. This stand-in is another model."""
    done = run("--verify", "gpt2")
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert done.err.endswith("download 124M first with gpt2-download 124M\n")
    assert not cache.exists()
    files = fake_release.embedded()
    fake_release.use(monkeypatch, files)
    fake_release.put(cache / "models" / "124M", files)
    found = commands.report(run, "--verify", "gpt2", code=1)
    assert found["known"] == "124M"
    assert results(found)["files"] == "pass"
    assert results(found)["hyperparameters"] == "fail"
    fake_release.put(cache / "models" / "124M", files | {"vocab.bpe": files["vocab.bpe"] + b"\n"})
    [check, *_] = commands.report(run, "--verify", "124M", code=1)["checks"]
    assert (check["check"], check["result"]) == ("files", "fail")
    assert check["found"].startswith("vocab.bpe: it has")
    assert commands.tree(cache) == {"models", "models/124M", *(f"models/124M/{name}" for name in files)}


def test_measures(run, shakespeare, tokenizer, tmp_path):
    (tmp_path / "passages.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in PASSAGES))
    (tmp_path / "wiki.txt").write_text(VERSE)
    files = ["--lambada", tmp_path / "passages.jsonl", "--wikitext", tmp_path / "wiki.txt"]
    found = commands.report(run, "--verify", "shakespeare", *files)
    lambada = evaluate.lambada(*shakespeare, tokenizer, PASSAGES)
    wikitext = evaluate.perplexity(*shakespeare, tokenizer, VERSE, detokenizer="wikitext", per="word")
    measures = {row["measure"]: row["found"] for row in found["measures"]}
    assert len(measures) == 7
    assert measures["LAMBADA perplexity per word"] == pytest.approx(lambada.perplexity_per_word, rel=1e-6)
    assert measures["WikiText-2 perplexity per word"] == pytest.approx(wikitext.perplexity, rel=1e-6)
    done = run("--verify", "shakespeare", *files, "--limit", 1)
    assert done.code == 0
    lambada = evaluate.lambada(*shakespeare, tokenizer, PASSAGES[:1])
    line = VERSE.splitlines(keepends=True)[0]
    wikitext = evaluate.perplexity(*shakespeare, tokenizer, line, detokenizer="wikitext", per="word")
    assert re.search(rf"LAMBADA perplexity per word +{lambada.perplexity_per_word:.2f} ", done.out)
    assert re.search(rf"WikiText-2 perplexity per word +{wikitext.perplexity:.2f} ", done.out)
    assert "Only the first 1 passages or lines were measured." in done.out


def test_the_papers_figures_stand_beside_a_released_size(shakespeare, tokenizer):
    texts = {"lambada": PASSAGES, "wikitext": [VERSE]}
    rows = _doctor_verify._measure(*shakespeare, tokenizer, texts, KNOWN["774M"])
    assert [row["paper"] for row in rows] == [0.6012, None, 10.87, 10.87, 19.93, 19.93, None]


# ---- mistakes

BAD = {
    "lambada alone": (["--lambada", "x.jsonl"], "--lambada needs --verify MODEL"),
    "wikitext alone": (["--wikitext", "x.txt"], "--wikitext needs --verify MODEL"),
    "limit alone": (["--limit", "3"], "--limit needs --verify MODEL"),
    "limit without a file": (["--verify", "shakespeare", "--limit", "3"], "--limit needs --lambada FILE or "),
    "limit of none": (
        ["--verify", "shakespeare", "--lambada", "x", "--limit", "0"],
        "--limit must be 1 or more, not 0",
    ),
    "no model": (["--verify", "nowhere"], "no such model: 'nowhere'"),
    "no file": (["--verify", "shakespeare", "--lambada", "none.jsonl"], "no such file: none.jsonl"),
    "json lines": (
        ["--verify", "shakespeare", "--wikitext", "passages.jsonl"],
        "passages.jsonl must be the plain test ",
    ),
    "an empty folder": (["--verify", "."], "holds no model"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(run, tmp_path, monkeypatch, case):
    args, told = BAD[case]
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path / "texts")
    if case == "json lines":
        (tmp_path / "texts" / "passages.jsonl").write_text('{"text": "to be"}\n')
    done = run(*args)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("gpt2-doctor: ")
    assert told in done.err


def test_measures_without_a_vocabulary(run, tmp_path):
    config = tiny_models.CONFIG
    gpt2_jax.save(tmp_path / "tiny", config, tiny_models.random_params(config, 29), "huggingface")
    (tmp_path / "wiki.txt").write_text(VERSE)
    done = run("--verify", tmp_path / "tiny", "--wikitext", tmp_path / "wiki.txt")
    assert (done.code, done.out) == (2, "")
    assert "has no vocabulary" in done.err
