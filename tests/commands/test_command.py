"""What all commands share: how they start and end, and that `--help` answers without importing JAX."""

import dataclasses
import importlib
import io
import os
import re
import subprocess
import sys

import commands
import pytest

from gpt2_jax.commands import _command, _model, start

SCRIPTS = {
    "generate": "gpt2-generate", "download": "gpt2-download", "convert": "gpt2-convert", "train": "gpt2-train",
    "finetune": "gpt2-finetune", "inspect_checkpoint": "gpt2-inspect", "prepare_data": "gpt2-prepare",
    "train_tokenizer": "gpt2-train-tokenizer", "evaluate": "gpt2-evaluate", "doctor": "gpt2-doctor",
    "activations": "gpt2-activations", "classify": "gpt2-classify",
}  # fmt: skip
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "tensorflow", "torch", "transformers", "safetensors", "matplotlib"}
HEAVY |= {"huggingface_hub", "tokenizers", "tiktoken", "grain"}


def test_a_script_a_command():
    """Each installed command has a script, and each script has a command. Both call the same function."""
    assert {path.stem for path in commands.SCRIPTS.glob("*.py")} == SCRIPTS.keys()
    assert commands.ENTRY_POINTS.keys() == set(SCRIPTS.values())
    for script, command in SCRIPTS.items():
        module, _, function = commands.ENTRY_POINTS[command].partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        main, _, name = start.MAINS[function].partition(".")
        assert callable(getattr(importlib.import_module(f"gpt2_jax.commands.{main}"), name))
        source = (commands.SCRIPTS / f"{script}.py").read_text(encoding="utf-8")
        assert f"from {module} import {function}\n" in source
        assert source.endswith(f'if __name__ == "__main__":\n    {function}()\n')


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_heavy(tmp_path, script):
    """As a user types it, from another folder."""
    done = commands.in_a_process(script, "--help", cwd=tmp_path, python=("-X", "importtime"))
    assert done.code == 0, done.err
    assert re.sub(r"\x1b\[[0-9;]*m", "", done.out).startswith(f"usage: {SCRIPTS[script]} [-h] ")
    imported = {line.rpartition("|")[2].strip() for line in done.err.splitlines() if line.startswith("import time:")}
    assert "argparse" in imported
    assert {name.partition(".")[0] for name in imported} & HEAVY == set()


@pytest.mark.parametrize("command", ["generate", "evaluate", "convert", "inspect", "prepare", "doctor", "activations"])
def test_help_names_every_kind_of_model(capfd, command):
    """In the same words in each command."""
    done = commands.caller(importlib.import_module(f"gpt2_jax.commands.{command}").main, capfd)("--help")
    plain = re.sub(r"\x1b\[[0-9;]*m|[│\n ]+", " ", done.out)
    assert re.sub(" +", " ", plain).count(_model.OTHER_SOURCES) == 1
    for text in ("124M", "OpenAI's", "Flax", "Orbax", "nanoGPT", "run1/model-1000", "llm.c", "owner/name@revision"):
        assert text in _model.SOURCES


# ---- the start and the end of a command


@dataclasses.dataclass
class Args:
    """Do what a test says.

    More text.
    """

    number: int = 3
    """A number."""


@pytest.fixture
def run(capfd):
    """run(function, *args) -> the result of a command gpt2-test whose `run` is the function."""

    def call(function, *args, **more):
        return commands.caller(lambda argv: _command.call("gpt2-test", Args, function, argv, **more), capfd)(*args)

    return call


def raising(error):
    def function(args):
        print("begun", flush=True)
        raise error

    return function


def test_arguments_reach_the_command(run):
    assert run(lambda args: print(args.number), "--number", 5) == (0, "5\n", "")
    assert run(lambda args: print(args.number), start=lambda: Args(7)) == (0, "7\n", "")
    assert run(lambda args: 4) == (4, "", "")
    done = run(print, "--help")
    assert (done.code, done.err) == (0, "")
    assert "Do what a test says.\n" in re.sub(r"\x1b\[[0-9;]*m", "", done.out)
    assert run(print, "--none").code == 2


@pytest.mark.parametrize("text", [True, False])
def test_an_error_is_a_line_and_a_status(run, text):
    for error in (ValueError("wrong"), FileNotFoundError("wrong"), UnicodeDecodeError("utf-8", b"", 0, 1, "wrong")):
        assert run(raising(error), text=text) == (2, "begun\n", f"gpt2-test: {error}\n")
    assert run(raising(KeyboardInterrupt()), text=text) == (130, "begun\n", "")
    with pytest.raises(RuntimeError):  # an error in our code is not reported as the user's
        run(raising(RuntimeError("wrong")), text=text)


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (MemoryError(), ""),
        (MemoryError("Unable to allocate 4.00 GiB"), "Unable to allocate 4.00 GiB"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating\n 8 bytes"), "Out of memory allocating 8 bytes"),
    ],
)
def test_too_little_memory_is_a_line_and_a_status(run, error, detail):
    """The second is NumPy's message, the third JAX's."""
    done = run(raising(error))
    assert (done.code, done.out, done.err.count("\n")) == (2, "begun\n", 1)
    assert done.err.startswith("gpt2-test: not enough memory: use a smaller model")
    assert detail in done.err


def test_too_little_memory_is_said_once(run):
    """The sentence of the library says what to do, and more exactly."""
    said = "not enough memory to decode 16 rows of up to 1024 tokens together: this takes about 3.4 GB; use bfloat16"
    assert run(raising(MemoryError(said))) == (2, "begun\n", f"gpt2-test: {said}\n")


def test_jax_reports_memory_as_we_expect(run):
    """An array that no machine can hold."""
    import jax.numpy as jnp

    done = run(lambda args: jnp.zeros((2**20, 2**20, 2**10), jnp.float32).block_until_ready())
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert done.err.startswith("gpt2-test: not enough memory: ")


def test_text_that_is_not_utf8():
    assert list(_command.check_text("--x", ["caf\xe9", "\U0001f98a"])) == ["caf\xe9", "\U0001f98a"]
    for text, shown in (("caf\udce9", r"b'caf\\xe9'"), ("\ud83d!", r"b'\?!'")):
        with pytest.raises(ValueError, match=f"--x is not UTF-8 text: {shown}"):
            _command.check_text("--x", ["fine", text])


def test_a_start_that_fails_is_an_error_too(run):
    def begin():
        raise ValueError("no such recipe")

    assert run(print, start=begin) == (2, "", "gpt2-test: no such recipe\n")


def test_a_reader_who_leaves_ends_a_text_alone(run):
    """A command that prints file names fails on a broken pipe: it may be a pipe to one of its own processes."""
    error = BrokenPipeError("broken pipe")
    assert run(raising(error), text=True) == (0, "begun\n", "")
    assert run(raising(error)) == (2, "begun\n", "gpt2-test: broken pipe\n")


@pytest.mark.parametrize("script", ["download", "generate"])
def test_a_reader_who_leaves_help(script):
    """`--help | head -1`: no error message, also when the interpreter exits, and also if the command prints names."""
    command = [sys.executable, str(commands.SCRIPTS / f"{script}.py"), "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


@pytest.mark.skipif(os.name == "nt", reason="file names are bytes on POSIX only")
def test_a_character_that_cannot_be_shown(monkeypatch):
    """In text it becomes a question mark. A file name must not change: its own bytes are written, also strange ones."""
    for text, shown in ((True, b"caf??\n"), (False, os.fsencode("caf\xe9") + b"\xff\n")):
        out = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
        _command.call("gpt2-test", Args, lambda args: print("caf\xe9\udcff"), [], text=text)
        assert out.getvalue() == shown


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no /dev/full")
def test_a_full_disk_is_said_once():
    """The interpreter does not report it again when it exits, and does not change the status."""
    code = "from gpt2_jax.commands import download; download.run = lambda args: print('x' * {}); download.main(['1'])"
    for size in (10, 100_000):
        with open("/dev/full", "w") as full:  # noqa: PTH123
            done = subprocess.run(
                [sys.executable, "-c", code.format(size)], stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert done.stderr.startswith("gpt2-download: [Errno 28] ")


def test_a_warning_is_one_line():
    """Without the place in the code, and the line there, which Python adds. Other categories are for developers."""
    code = """
import dataclasses, warnings
from gpt2_jax.commands import _command

@dataclasses.dataclass
class Args:
    "Warn."

def run(args):
    warnings.warn("left out: 1 bad record")
    warnings.warn("soon gone", FutureWarning)

_command.call("gpt2-x", Args, run, [])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, *others = done.stderr.splitlines()
    assert first == "gpt2-x: warning: left out: 1 bad record"
    assert "FutureWarning: soon gone" in others[0]
