"""scripts/generate.py on a terminal: streamed text, the interactive mode and Ctrl-C; and what a pipe gets instead."""

import os
import re
import subprocess
import sys
from pathlib import Path

import commands
import pytest

pytest.importorskip("pty", reason="no such terminals here")

ENDLESS = ["--overflow", "slide", "--max-new-tokens", 1_000_000]


@pytest.fixture(scope="module")
def greedy(tmp_path_factory):
    """Return the command's continuation of ROMEO:, longer than n_ctx. All these tests use its compiled programs."""
    options = ["--prompt", "ROMEO:", "--temperature", 0, "--overflow", "slide", "--max-new-tokens", 300]
    done = commands.in_a_process("generate", *options, cwd=tmp_path_factory.mktemp("greedy"))
    return done.out.removeprefix("ROMEO:").removesuffix("\n")


def test_a_conversation(tmp_path, greedy):
    """Text comes in pieces. Ctrl-C stops a sample and not the program; Ctrl-D ends the program. The arrow keys recall
    earlier prompts, also in the next run."""
    with commands.OnATerminal("generate", "--interactive", "--temperature", 0, *ENDLESS, cwd=tmp_path) as user:
        user.until("Ctrl-D ends the program.\n> ")
        user.type("ROMEO:\n")
        user.until("ROMEO:\nROMEO:")
        text = user.until(re.escape(greedy[:150]))
        assert text == greedy[:150]
        assert user.process.poll() is None
        user.type("\x03")
        user.until(r"\[stopped\]\n> ")
        user.type("To be\n")
        user.until(r"To be\nTo be(?s:.{30})")
        user.type("\x03")
        user.until(r"\[stopped\]\n> ")
        user.type("\x1b[A\x1b[A")
        user.until("ROMEO:$")
        user.type("\n")
        user.until(re.escape("ROMEO:" + greedy[:20]))
        user.type("\x03")
        user.until(r"\[stopped\]\n> ")
        user.until_idle()
        user.type("no\x03")
        user.until("Ctrl-D ends the program.\n> ")
        user.type("\x04")
        assert user.end() == 0
        assert "Traceback" not in user.shown
    assert (Path(os.environ["GPT2_JAX_CACHE"]) / "history").read_text().splitlines()[-3:] == [
        "ROMEO:",
        "To be",
        "ROMEO:",
    ]
    with commands.OnATerminal("generate", "--interactive", "--max-new-tokens", 3, cwd=tmp_path) as user:
        user.until("Ctrl-D ends the program.\n> ")
        user.type("\x1b[A\x1b[A")
        user.until("To be$")
        user.type(" " + "x " * 300 + "\n")
        user.until("gpt2-generate: .*n_ctx is 256.*\n> ")
        user.type("\x04")
        assert user.end() == 0


def test_a_conversation_survives_every_ctrl_c(tmp_path):
    """At the prompt again and again, and then in a sample."""
    with commands.OnATerminal("generate", "--interactive", "--temperature", 0, *ENDLESS, cwd=tmp_path) as user:
        for _ in range(6):
            user.until("Ctrl-D ends the program.\n> ")
            user.until_idle()
            user.type("\x03")
        user.until("Ctrl-D ends the program.\n> ")
        for _ in range(2):
            user.type("To be\n")
            user.until(r"To be\nTo be(?s:.{30})")
            user.type("\x03")
            user.until(r"\[stopped\]\n> ")
        user.until_idle()
        user.type("\x04")
        assert user.end() == 0
        assert "Traceback" not in user.shown


def test_a_conversation_from_a_pipe(tmp_path):
    """One prompt per line, no prompt signs. The end of the input ends the program. Each prompt has its own seed."""
    options = ["--interactive", "--max-new-tokens", "60", "--seed", "3"]
    done = subprocess.run(
        [sys.executable, str(commands.SCRIPTS / "generate.py"), *options],
        input="ROMEO:\n\nROMEO:\n",
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert ">" not in done.stdout
    assert done.stdout.startswith("ROMEO:")
    last = commands.in_a_process("generate", "--prompt", "ROMEO:", "--max-new-tokens", 60, "--seed", 5, cwd=tmp_path)
    assert done.stdout.endswith("\n" + last.out)
    assert not done.stdout.startswith(last.out[:50])


def test_prompts_of_several_lines(tmp_path):
    """They begin and end with three quotes; the end of the input ends one too. Ctrl-C in one drops it."""
    lines = ['"""', "First Citizen:", "", "Speak.", '"""', '"""one line"""', 'a "quoted" line', '"""to the', "end"]
    done = subprocess.run(
        [sys.executable, str(commands.SCRIPTS / "generate.py"), "--interactive", "--max-new-tokens=0"],
        input="\n".join(lines) + "\n",
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert done.stdout == '\nFirst Citizen:\n\nSpeak.\n\none line\na "quoted" line\nto the\nend\n'
    with commands.OnATerminal("generate", "--interactive", "--max-new-tokens", 0, cwd=tmp_path) as user:
        user.until('begins and ends with """')
        user.until("Ctrl-D ends the program.\n> ")
        user.type('"""KING\n')
        user.until(r"KING\n\. ")
        user.until_idle()
        user.type("\x03")
        user.until("Ctrl-D ends the program.\n> ")
        user.type('"""ROMEO:\n')
        user.until(r"ROMEO:\n\. ")
        user.type('Ay me"""\n')
        user.until('Ay me"""\nROMEO:\nAy me\n> ')
        user.until_idle()
        user.process.terminate()
        assert user.end() == 143
        assert "Traceback" not in user.shown


def test_a_text_comes_as_it_is_made(tmp_path, greedy):
    """The command does not read the terminal without --interactive. Ctrl-C ends it with status 130."""
    with commands.OnATerminal("generate", "--prompt", "ROMEO:", "--temperature", 0, *ENDLESS, cwd=tmp_path) as user:
        user.until("ROMEO:")
        pieces = [user.more(60) for _ in range(3)]
        assert all(pieces)
        assert len("".join(pieces)) < 300
        assert user.process.poll() is None
        user.until("".join(re.escape(word) for word in greedy[200:250]))
        user.type("\x03")
        assert user.end() == 130
        assert "Traceback" not in user.shown
        assert user.shown.endswith("\n")
    with commands.OnATerminal("generate", "--max-new-tokens", 20, cwd=tmp_path) as user:
        assert user.end() == 0


@pytest.fixture
def started(tmp_path):
    """started(*args) -> the process of the command; its output is a pipe."""
    processes = []

    def start(*args):
        command = [sys.executable, str(commands.SCRIPTS / "generate.py"), *map(str, args)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "bufsize": 0}
        processes.append(subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"JAX_PLATFORMS": "cpu"}, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_pipe_gets_a_text_whole(started, greedy):
    process = started("--prompt", "ROMEO:", "--temperature", 0, "--overflow", "slide", "--max-new-tokens", 300)
    first = os.read(process.stdout.fileno(), 2**16).decode()  # not a few tokens; the end of the line may come after
    assert first.removesuffix("\n") == f"ROMEO:{greedy}"
    assert first + process.stdout.read().decode() == f"ROMEO:{greedy}\n"
    assert process.wait() == 0


def test_a_reader_that_leaves(started):
    """`| head -1` ends it without a message, long before all text is written."""
    process = started("--num-samples", 100_000, "--batch-size", 1, "--max-new-tokens", 250)
    assert process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(60) == 0
    assert re.fullmatch(r"model: .*\n(--- sample \d+ of 100000\n)+", err), err[-1000:]
