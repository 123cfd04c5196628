"""scripts/generate.py with --input and --output that are no files: pipes, sockets and devices."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import commands
import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="names of POSIX")
OPTIONS = ["--max-new-tokens", "5", "--seed", "3"]
PROMPTS = ["ROMEO:", "To be", "O"]
LINES = "".join(f"{json.dumps(prompt)}\n" for prompt in PROMPTS)


@pytest.fixture
def run(tmp_path):
    """run(*options, stdin, redirection) -> the result of the command in a shell."""

    def call(*options, stdin=subprocess.DEVNULL, text=None, redirection=""):
        script = [sys.executable, str(commands.SCRIPTS / "generate.py"), *OPTIONS, *map(str, options)]
        how = {"input": text} if text is not None else {"stdin": stdin}
        done = subprocess.run(
            ["bash", "-c", f'"$@" {redirection}', "bash", *script],
            cwd=tmp_path,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            encoding="utf-8",
            check=False,
            **how,
        )
        return commands.Run(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The output file for PROMPTS."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "in").write_text(LINES)
    done = commands.in_a_process("generate", "--input=in", "--output=out", *OPTIONS, cwd=folder)
    assert done.code == 0, done.err
    return (folder / "out").read_text(encoding="utf-8")


def test_from_a_pipe_into_a_pipe(run, whole):
    """The lines are those of the files, also under the system's names of the streams."""
    for source, target in (("-", "-"), ("/dev/stdin", "/dev/stdout")):
        done = run("--input", source, "--output", target, text=LINES)
        assert (done.code, done.out) == (0, whole), done.err
        assert "the output is not a file: an interrupted run cannot resume" in done.err


def test_from_a_file_into_a_pipe(run, whole, tmp_path):
    (tmp_path / "in").write_text(LINES)
    assert run("--input=in", "--output=-").out == whole
    (tmp_path / "in").write_text(LINES + "no JSON\n")
    done = run("--input=in", "--output=-")
    assert (done.code, done.out) == (2, ""), "a bad line of a file shows before anything is done"
    assert "in, line 4 is not JSON" in done.err
    done = run("--input=in", "--output=-", "--skip-bad-lines")
    assert (done.code, done.out[: len(whole)], done.err.count("line 4")) == (0, whole, 1)
    assert json.loads(done.out[len(whole) :])["line"] == 4
    done = run("--input=-", "--output=-", text=LINES + "no JSON\n")
    assert (done.code, done.out) == (2, whole), "lines of a pipe are completed up to a bad one"
    assert "standard input, line 4 is not JSON" in done.err


def test_from_a_pipe_into_a_file(run, whole, tmp_path):
    """It resumes if the same lines come again."""
    assert run("--input=-", "--output=out", text=LINES).code == 0
    assert (tmp_path / "out").read_text(encoding="utf-8") == whole
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_an_answer_comes_before_the_next_question(tmp_path, whole):
    """A program may wait for each line before it writes the next."""
    script = [sys.executable, str(commands.SCRIPTS / "generate.py"), *OPTIONS, "--input=-", "--output=-"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(script, cwd=tmp_path, env=env, encoding="utf-8", bufsize=1, **pipes) as process:
        for line, answer in zip(LINES.splitlines(keepends=True), whole.splitlines(keepends=True), strict=True):
            process.stdin.write(line)
            process.stdin.flush()
            assert process.stdout.readline() == answer
        process.stdin.close()
        assert process.wait() == 0


def test_a_child_of_node(tmp_path, whole):
    """Node gives its children sockets, which cannot be opened under their names."""
    script = [sys.executable, str(commands.SCRIPTS / "generate.py"), *OPTIONS]
    for options, sent, expected in (
        ([], b"To be\n", r"To be(?s:.+)"),
        (["--prompt-file=/dev/stdin"], b"To be\n", r"To be(?s:.+)"),
        (["--input=/dev/stdin", "--output=/dev/stdout"], LINES.encode(), re.escape(whole)),
    ):
        (ours, theirs), (out, their_out) = socket.socketpair(), socket.socketpair()
        ours.sendall(sent)
        ours.close()
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [*script, *options],
            stdin=theirs,
            stdout=their_out,
            stderr=subprocess.PIPE,
            env=env,
            cwd=tmp_path,
            check=False,
        )
        their_out.close()
        theirs.close()
        with out, out.makefile(encoding="utf-8") as file:
            assert re.fullmatch(expected, file.read()), done.stderr
        assert done.returncode == 0


def test_devices(run, tmp_path):
    """What is written to /dev/null is gone. A shell's file is not "complete" because it exists."""
    (tmp_path / "in").write_text(LINES)
    done = run("--input=in", "--output=/dev/null")
    assert (done.code, done.out) == (0, ""), done.err
    assert "3 prompts in" in done.err
    done = run("--input=in", "--output=/dev/stdout", redirection=">shown")
    assert done.code == 0, done.err
    assert [json.loads(line)["prompt"] for line in (tmp_path / "shown").read_text().splitlines()] == PROMPTS
    if Path("/dev/full").exists():
        done = run("--input=in", "--output=/dev/full")
        assert (done.code, done.out, done.err.count("Errno 28")) == (2, "", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "shown"}


def test_a_closed_standard_input(run):
    done = run("--input=-", "--output=-", redirection="<&-")
    assert (done.code, done.out) == (2, "")
    assert done.err == "gpt2-generate: standard input is closed: prompts cannot be read from it\n"


def test_a_reader_that_leaves(run, tmp_path):
    (tmp_path / "in").write_text(LINES * 200)
    done = run("--input=in", "--output=-", "--batch-size=1", redirection="| head -1")
    assert (done.code, done.out.count("\n")) == (0, 1)
    assert "Traceback" not in done.err
    assert "prompts in" not in done.err
