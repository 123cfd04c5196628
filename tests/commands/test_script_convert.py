"""scripts/convert.py: every format to every format, only the folder on stdout, one clear message for any mistake."""

import json
import re

import checkpoint_forms as forms
import commands
import pytest
from checkpoint_forms import FORMATS
from strength import full_only

import gpt2_jax
from gpt2_jax.commands import convert

# As many ids as the embedded vocabulary has, so that its tokenizer fits.
CONFIG = gpt2_jax.GPT2Config(n_vocab=1281, n_ctx=11, n_embd=6, n_head=3, n_layer=2)


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """Call the entry point in this process. Output of C++ code is captured too."""
    forms.import_tensorflow()
    monkeypatch.setenv("GPT2_JAX_CACHE", str(tmp_path / "cache"))

    return commands.caller(convert.main, capfd)


@pytest.fixture
def source(tmp_path, model_dir):
    directory = forms.write_tensorflow(tmp_path / "source", CONFIG, forms.random_model(CONFIG))
    forms.copy_vocabulary(model_dir, directory)
    return directory


def assert_refused(done: commands.Run, culprit: str) -> None:
    assert done.code == 2, done
    assert done.out == ""
    assert "Traceback" not in done.err
    assert "Error(" not in done.err
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.err)
    assert re.search(culprit, plain), plain


def assert_one_line(done: commands.Run) -> None:
    """stderr is one message, which may have an indented list below it."""
    lines = [line for line in done.err.splitlines() if not re.match(r"  |[IWE]\d{4} |WARNING: All log", line)]
    assert len(lines) == 1, done.err
    assert lines[0].startswith("gpt2-convert: ")


def test_round_trip_through_every_form(run, source, tmp_path, model_dir):
    """Weights (bit for bit), config and vocabulary are the same again. stdout is only the destination."""
    at = source
    for i, form in enumerate([*FORMATS, *reversed(FORMATS)]):
        done = run(at, tmp_path / f"{i}", "--format", form)
        assert (done.code, done.out) == (0, f"{tmp_path / str(i)}\n"), done.err
        at = tmp_path / f"{i}"
        forms.assert_loads_as(at, CONFIG, forms.random_model(CONFIG))
    assert at.name == "5"
    for name in ("encoder.json", "vocab.bpe"):
        assert (at / name).read_bytes() == (model_dir / name).read_bytes()


@pytest.mark.parametrize("form", FORMATS)
def test_a_dtype(run, source, tmp_path, form):
    done = run(source, tmp_path / "out", "--format", form, "--dtype", "bfloat16")
    assert (done.code, done.out) == (0, f"{tmp_path / 'out'}\n")
    flat = {name: array.astype("bfloat16") for name, array in forms.random_model(CONFIG).items()}
    forms.assert_loads_as(tmp_path / "out", CONFIG.replace(param_dtype="bfloat16"), flat)


def test_a_model_without_a_vocabulary(run, source, tmp_path):
    (source / "encoder.json").unlink()
    (source / "vocab.bpe").unlink()
    done = run(source, tmp_path / "out", "--format", "huggingface")
    assert done.code == 0, done.err
    forms.assert_loads_as(tmp_path / "out", CONFIG, forms.random_model(CONFIG))


def test_half_a_vocabulary_is_not_dropped_in_silence(run, source, tmp_path):
    (source / "vocab.bpe").unlink()
    assert_refused(run(source, tmp_path / "out", "--format", "huggingface"), r"vocab\.bpe")
    assert not (tmp_path / "out").exists()


def test_hugging_faces_own_layout_is_a_source(run, tmp_path, model_dir):
    flat = forms.random_model(CONFIG)
    source = forms.write_huggingface(tmp_path / "source", CONFIG, forms.hf_tensors(flat), shards=3)
    forms.write_tokenizer_json(source / "tokenizer.json", model_dir, pairs=True)
    done = run(source, tmp_path / "out", "--format", "tensorflow")
    assert done.code == 0, done.err
    forms.assert_loads_as(tmp_path / "out", CONFIG, flat)
    for name in ("encoder.json", "vocab.bpe"):
        assert (tmp_path / "out" / name).read_bytes() == (model_dir / name).read_bytes()


def test_a_destination_that_exists(run, source, tmp_path):
    """It is rejected without --overwrite. With it, a model is replaced, and anything else is still rejected."""
    out = tmp_path / "out"
    gpt2_jax.save(out, CONFIG, forms.nested(forms.random_model(CONFIG, seed=1)), format="orbax")
    done = run(source, out, "--format", "huggingface")
    assert_refused(done, "overwrite")
    assert_one_line(done)
    forms.assert_loads_as(out, CONFIG, forms.random_model(CONFIG, seed=1))
    assert run(source, out, "--format", "huggingface", "--overwrite").code == 0
    forms.assert_loads_as(out, CONFIG, forms.random_model(CONFIG))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    for more in ([], ["--overwrite"]):
        assert_refused(run(source, tmp_path / "photos", "--format", "orbax", *more), "photos")
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "cat"


@pytest.mark.parametrize("form", FORMATS)
def test_onto_itself(run, source, form):
    """The source is read completely before it is replaced."""
    done = run(source, source, "--format", form, "--overwrite")
    if done.code == 0:
        forms.assert_loads_as(source, CONFIG, forms.random_model(CONFIG))
    else:
        assert_refused(done, "source")
        forms.assert_loads_as(source, CONFIG, forms.random_model(CONFIG))


MISTAKES = [
    ([], "format"), (["--format", "pickle"], "tensorflow.*huggingface.*orbax"), (["--format"], "format"),
    (["--format", "orbax", "--dtype", "int8"], "dtype"), (["--format", "orbax", "--no-such-option"], "no-such-option"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "culprit"), MISTAKES, ids=str)
def test_wrong_options(run, source, tmp_path, options, culprit):
    assert_refused(run(source, tmp_path / "out", *options), f"(?s){culprit}")
    assert not (tmp_path / "out").exists()


def test_wrong_sources(run, tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("empty", "file", "nowhere", "125M", ""):
        done = run(name, tmp_path / "out", "--format", "orbax")
        assert_refused(done, name)
        assert_one_line(done)
    content = json.loads((source / "hparams.json").read_text())
    (source / "hparams.json").write_text(json.dumps(content | {"n_ctx": 12}))
    assert_refused(run(source, tmp_path / "out", "--format", "orbax"), "wpe")
    assert not (tmp_path / "out").exists()


def test_help_names_every_option(run):
    done = run("--help")
    assert done.code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.out)
    assert [option for option in ("--format", "--dtype", "--overwrite") if option not in plain] == []


@full_only("the tests above do it in this process")
def test_in_a_process(tmp_path, source):
    """From another directory, with relative paths."""
    done = commands.in_a_process("convert", "source", "out", "--format", "huggingface", cwd=tmp_path)
    assert (done.code, done.out) == (0, "out\n"), done.err
    assert len(done.err.splitlines()) <= 3, done.err
    wrong = commands.in_a_process("convert", "nowhere", "other", "--format", "orbax", cwd=tmp_path)
    assert_refused(wrong, "nowhere")
    assert_one_line(wrong)
    again = commands.in_a_process("convert", "source", "out", "--format", "orbax", cwd=tmp_path)
    assert_refused(again, "--overwrite")
