"""gpt2-generate, gpt2-inspect and gpt2-convert on folders that other programs wrote."""

import warnings

import checkpoint_forms as forms
import commands
import pytest
from wild_forms import FORMS

import gpt2_jax
from gpt2_jax.commands import convert, generate, inspect

# Extra tensors, fewer ids than rows, another library's names; more ids than rows, `<|endoftext|>` with id 0 or absent.
NAMES = ["DialoGPT", "50304-rows", "nanogpt-folder", "PAD-not-resized", "CodeParrot-folder", "no-endoftext-folder"]
ROWS = {row.name: row for row in FORMS}
PARITY = [pytest.mark.parity]


@pytest.fixture(scope="module", params=[pytest.param(n, marks=PARITY if ROWS[n].needs else []) for n in NAMES])
def made(request, tmp_path_factory):
    """Return the folder, and the model that was written."""
    row = ROWS[request.param]
    for library in row.needs:
        pytest.importorskip(library, reason="needs the `parity` extra: pip install -e '.[parity]'")
    folder = tmp_path_factory.mktemp("forms") / "model"
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that write
        return folder, row.make(folder)


@pytest.fixture(autouse=True)
def _warnings_are_shown(monkeypatch, tmp_path):
    """In a user's process a warning is a line on standard error."""
    monkeypatch.setenv("GPT2_JAX_CACHE", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield


def call(main, capfd, *args) -> commands.Run:
    with commands.config_of_jax_kept():
        done = commands.caller(main, capfd)(*args)
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    return done


def test_generate(made, capfd):
    """Three tokens are sampled and shown."""
    done = call(generate.main, capfd, "--model", made[0], "--prompt", "hi", "--max-new-tokens", "3", "--seed", "7")
    assert done.out.strip()


def test_generate_without_a_prompt(made, capfd):
    """The model begins with its end-of-text token. Without it, or without a row for it, one sentence says so."""
    args = ("--model", made[0], "--max-new-tokens", "3", "--seed", "7")
    with commands.config_of_jax_kept():
        done = commands.caller(generate.main, capfd)(*args)
    eot = gpt2_jax.load_tokenizer(made[0]).eot
    if eot is None or eot >= gpt2_jax.load_config(made[0]).n_vocab:
        assert (done.code, done.out) == (2, "")
        assert "end-of-text token" in done.err
        assert "Traceback" not in done.err
    else:
        assert done.code == 0, done.err


def test_inspect(made, capfd):
    folder, source = made
    report = commands.report(lambda *args: call(inspect.main, capfd, *args), folder)
    shapes = {row["name"]: tuple(row["shape"]) for row in report["tensors"]}
    assert shapes == {name: array.shape for name, array in source.flat.items()}


def test_convert(made, capfd, tmp_path):
    """The same config, bits and ids come back."""
    folder, source = made
    done = call(convert.main, capfd, folder, tmp_path / "out", "--format", "huggingface")
    assert done.out.strip() == str(tmp_path / "out")
    assert gpt2_jax.load_config(tmp_path / "out") == gpt2_jax.load_config(folder)
    assert forms.difference(gpt2_jax.load(tmp_path / "out")[1], source.flat) == ""
    assert_same_tokenizer(folder, tmp_path / "out")


def test_convert_to_a_format_with_two_vocabulary_files(made, capfd, tmp_path):
    """A vocabulary that OpenAI's two files cannot hold is written in Hugging Face's files."""
    folder, source = made
    call(convert.main, capfd, folder, tmp_path / "out", "--format", "orbax")
    assert forms.difference(gpt2_jax.load(tmp_path / "out")[1], source.flat) == ""
    assert_same_tokenizer(folder, tmp_path / "out")


def assert_same_tokenizer(before, after):
    before, after = gpt2_jax.load_tokenizer(before), gpt2_jax.load_tokenizer(after)
    assert (before.eot, before.n_vocab) == (after.eot, after.n_vocab)
    text = "To be, or not to be: <|endoftext|>[PAD] 12345 Schöne\n\n"
    for special in (False, True):
        ids = before.encode(text, allow_special=special)
        assert after.encode(text, allow_special=special) == ids
        assert after.decode(ids) == before.decode(ids)
