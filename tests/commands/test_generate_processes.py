"""gpt2-generate --input over several processes: the file of one process, byte for byte."""

import itertools
import json
import os
import subprocess
import sys
import threading

import commands
import pytest
import several_processes

import gpt2_jax
from gpt2_jax import processes
from gpt2_jax.commands import generate
from gpt2_jax.processes import Share

OPTIONS = ["--max-new-tokens", 7, "--seed", 5, "--num-samples", 2, "--batch-size", 4]


@pytest.fixture
def source(tmp_path):
    """Return prompts of several lengths; some lines are bad, and some have settings of their own."""
    lines = [json.dumps({"prompt": "To be, or not " * (i % 3) + "O"}) for i in range(15)]
    lines[3] = "{"
    lines[7] = json.dumps({"prompt": "x " * 400})
    path = tmp_path / "in"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def run_in_threads(count, monkeypatch, *args):
    """Run the command in several processes."""
    parsed, here = commands.parse("gpt2-generate", *map(str, args)), threading.local()
    monkeypatch.setattr(processes, "share", lambda: getattr(here, "share", Share()))

    def one(share):
        here.share = share
        return generate.run(parsed)

    with commands.config_of_jax_kept():
        return several_processes.in_threads(count, one)


@pytest.mark.parametrize("own_settings", [False, True])
def test_the_file_of_one_process(source, tmp_path, monkeypatch, own_settings):
    """Several samples, log-probabilities, bad lines, and lines with their own settings."""
    if own_settings:
        lines = source.read_text(encoding="utf-8").split("\n")
        for i, settings in ((1, {"temperature": 0}), (12, {"seed": 3, "top_k": 5}), (14, {"temperature": 0})):
            lines[i] = json.dumps(json.loads(lines[i]) | {"settings": settings})
        source.write_text("\n".join(lines), encoding="utf-8")
    options = [*OPTIONS, "--batch-size", 2, "--skip-bad-lines", "--logprobs", 2, "--prompt-logprobs"]
    files = []
    for count in (1, 2, 3):
        target = tmp_path / f"out{count}"
        found = run_in_threads(count, monkeypatch, "--input", source, "--output", target, *options)
        assert found == [None] * count
        files.append(target.read_bytes())
    assert files[0] == files[1] == files[2]
    assert len(files[0].splitlines()) == 15
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out1", "out2", "out3"}


REFUSED = {
    "standard input": (["--input", "-", "--output", "out"], "--input - is not a file"),
    "standard input by its name": (["--input", "/dev/stdin", "--output", "out"], "--input /dev/stdin is not a file"),
    "another device": (["--input", "/dev/null", "--output", "out"], "--input /dev/null is not a file"),
    "standard output": (["--input", "in", "--output", "-"], "--output - is not a file"),
    "a device as output": (["--input", "in", "--output", "/dev/null"], "--output /dev/null is not a file"),
    "a prompt": (["--prompt", "O"], "several processes divide the lines of --input"),
    "a terminal": (["--interactive"], "several processes divide the lines of --input"),
    "a bad line": (["--input", "in", "--output", "out"], "in, line 4 is not JSON"),
}


@pytest.mark.parametrize(("args", "culprit"), REFUSED.values(), ids=REFUSED)
def test_refused_by_each_process(source, monkeypatch, args, culprit):
    """Before the weights are loaded."""
    monkeypatch.setattr(gpt2_jax, "load", None)
    monkeypatch.chdir(source.parent)
    for error in run_in_threads(2, monkeypatch, *args):
        assert culprit in str(error)
    assert [path.name for path in source.parent.iterdir()] == ["in"]


def test_errors_before_the_first_batch_reach_the_others(source, tmp_path, monkeypatch):
    """Such as weights that are missing on one machine."""
    load, calls = gpt2_jax.load, itertools.count()

    def missing(*args, **more):
        if next(calls) == 0:
            raise FileNotFoundError("no such model here")
        return load(*args, **more)

    monkeypatch.setattr(gpt2_jax, "load", missing)
    args = ["--input", source, "--output", tmp_path / "out", "--skip-bad-lines", *OPTIONS]
    messages = sorted(str(error) for error in run_in_threads(2, monkeypatch, *args))
    assert messages[0] == "no such model here"
    assert messages[1].endswith("failed: no such model here")


ALONE = """
import sys

from gpt2_jax import processes
from gpt2_jax.commands import _generate_files, generate

index, count, stops = map(int, sys.argv[1:4])
processes.share = lambda: processes.Share(index, count)
complete, calls = _generate_files._Lines.complete, []


def stopping(self, lines, indices):
    calls.append(indices)
    if len(calls) == stops:
        print("stops", flush=True)
        sys.stdin.read()
    return complete(self, lines, indices)


_generate_files._Lines.complete = stopping
generate.main(sys.argv[4:])
print(len(calls))
"""


@pytest.mark.skipif(os.name != "posix", reason="kills")
def test_one_is_killed_and_started_again(source, tmp_path, monkeypatch):
    """Alone: nothing connects the processes, and the others wait for its lines. It repeats no finished batch."""
    args = ["--input", source, "--skip-bad-lines", *OPTIONS]
    run_in_threads(1, monkeypatch, *args, "--output", tmp_path / "whole")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = os.environ | {"JAX_PLATFORMS": "cpu"}

    def start(index, stops=0):
        numbers = [index, 3, stops]
        command = [sys.executable, "-c", ALONE, *map(str, [*numbers, *args, "--output", tmp_path / "out"])]
        return subprocess.Popen(command, env=env, **pipes)

    children = [start(0), start(1, stops=2), start(2)]
    try:
        assert children[1].stdout.readline() == "stops\n", children[1].communicate()
        children[1].kill()
        children[1].communicate()
        children[1] = start(1)
        ends = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert [child.returncode for child in children] == [0] * 3, ends
    assert [out for out, _ in ends] == ["3\n", "2\n", "2\n"]  # 8 batches, one of them by the killed process
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "whole"}


def test_processes_that_jax_connects(source, tmp_path, monkeypatch):
    """Two with two devices each: the model is on the process's own devices."""
    source.write_text("".join(f'"O {i}"\n' for i in range(7)), encoding="utf-8")
    args = ["--input", source, "--mesh.data", 2, *OPTIONS]
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_cpu_parallel_codegen_split_count=1"}
    for count in (1, 2):
        output = ["--output", tmp_path / f"out{count}"]
        with several_processes.started(count, "generate", *args, *output, cwd=tmp_path, **env) as children:
            for child in children:
                _, err = child.communicate(timeout=120)
                assert child.returncode == 0, err
    assert (tmp_path / "out1").read_bytes() == (tmp_path / "out2").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out1", "out2"}


def test_the_command_in_two_processes(source, tmp_path):
    """In the second round, one process cannot load the model. It says so, and the other one ends with status 75."""
    source.write_text("".join(f'"O {i}"\n' for i in range(7)), encoding="utf-8")

    args = ["--input", source, "--output", tmp_path / "out", *OPTIONS]
    first, second = several_processes.run_command("generate.py", *args)
    assert (first.code, second) == (0, (0, "", "")), first.err
    assert len((tmp_path / "out").read_text().splitlines()) == 7
    (tmp_path / "out").unlink()
    each = [], ["--model", tmp_path / "none"]
    first, second = several_processes.run_command("generate.py", *args, each=each)
    assert second.code == 2
    assert second.err.startswith("gpt2-generate: process 1: ")
    assert second.err.count("\n") == 1
    assert first.code == 75
    assert first.err.endswith(
        "gpt2-generate: process 0: another process of this run ended: start all processes again\n"
    )
    assert "Traceback" not in first.err
