"""What all commands share: how they start and end, and that `--help` and a typo answer before JAX is imported."""

import contextlib
import dataclasses
import importlib
import io
import re
import subprocess
import sys
import tomllib

import commands
import pytest

from gpt2_jax.commands import _command

ENTRY_POINTS = tomllib.loads((commands.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
SCRIPTS = {
    "generate": "gpt2-generate", "download": "gpt2-download", "convert": "gpt2-convert", "train": "gpt2-train",
    "finetune": "gpt2-finetune", "inspect_checkpoint": "gpt2-inspect", "prepare_data": "gpt2-prepare",
    "train_tokenizer": "gpt2-train-tokenizer", "evaluate": "gpt2-evaluate", "doctor": "gpt2-doctor",
}  # fmt: skip
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "tensorflow", "torch", "transformers", "safetensors", "matplotlib"}
HEAVY |= {"huggingface_hub", "tokenizers", "tiktoken", "grain"}


def test_a_script_a_command():
    """Each installed command has its script in the clone, and the other way round; both are the same function."""
    assert {path.stem for path in commands.SCRIPTS.glob("*.py")} == SCRIPTS.keys()
    assert ENTRY_POINTS.keys() == set(SCRIPTS.values())
    for script, command in SCRIPTS.items():
        module, _, function = ENTRY_POINTS[command].partition(":")
        assert callable(getattr(importlib.import_module(module), function))
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


# ---- the start and the end of a command


@dataclasses.dataclass
class Args:
    """Do what a test says.

    And more.
    """

    number: int = 3
    """A number."""


@pytest.fixture
def run(capfd):
    """run(function, ...) -> what the command gpt2-test does whose `run` is the function."""

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
    with pytest.raises(RuntimeError):  # a mistake of ours is no mistake of the user's
        run(raising(RuntimeError("wrong")), text=text)


def test_a_start_that_fails_is_an_error_too(run):
    def start():
        raise ValueError("no such recipe")

    assert run(print, start=start) == (2, "", "gpt2-test: no such recipe\n")


def test_a_reader_who_leaves_ends_a_text_alone(run):
    """Where a file's name is written, a pipe that breaks is one within, say to a process that encodes: a failure."""
    error = BrokenPipeError("broken pipe")
    assert run(raising(error), text=True) == (0, "begun\n", "")
    assert run(raising(error)) == (2, "begun\n", "gpt2-test: broken pipe\n")


@pytest.mark.parametrize("script", ["download", "generate"])
def test_a_reader_who_leaves_help(script):
    """`--help | head -1`, of a command that writes names too: no complaint, also when the interpreter ends."""
    command = [sys.executable, str(commands.SCRIPTS / f"{script}.py"), "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_a_character_that_cannot_be_shown(monkeypatch):
    """In a text it becomes a question mark; the name of a file must not become another."""
    for text, shown in ((True, b"caf?\n"), (False, b"")):
        out = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
        with contextlib.nullcontext() if text else pytest.raises(SystemExit, match="2"):
            _command.call("gpt2-test", Args, lambda args: print("caf\xe9"), [], text=text)
        assert out.getvalue() == shown


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no /dev/full")
def test_a_full_disk_is_said_once():
    """Not a second time when the interpreter ends, with a status of its own."""
    code = "from gpt2_jax.commands import download; download.run = lambda args: print('x' * {}); download.main(['1'])"
    for size in (10, 100_000):
        with open("/dev/full", "w") as full:  # noqa: PTH123
            done = subprocess.run(
                [sys.executable, "-c", code.format(size)], stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert done.stderr.startswith("gpt2-download: [Errno 28] ")
