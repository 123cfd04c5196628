"""Ctrl-C and SIGTERM end every command cleanly, at any moment; a second Ctrl-C kills."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import commands
import pytest
from strength import campaign

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
SECONDS = 20  # an end within a few seconds, on a busy machine
VERDICT, SHAKESPEARE = commands.ROOT / "examples" / "the-verdict.txt", commands.ROOT / "models" / "shakespeare"

# {script: (arguments, seconds that it runs at least)}
LONG = {
    "generate": (["--prompt=ROMEO:", "--max-new-tokens=100000", "--overflow=slide"], 4),
    "generate --input": (["--input=in.jsonl", "--output=out.jsonl", "--max-new-tokens=200"], 6),
    "evaluate": (["--task=perplexity", VERDICT], 5),
    "convert": ([SHAKESPEARE, "new", "--format=orbax"], 4),
    "prepare_data": ([VERDICT, "--output=new", "--workers=2"], 2),
    "train_tokenizer": ([VERDICT, "--output=new"], 1),
    "train": (["--run=new", f"--data.path={VERDICT}", "--steps=100000", "--batch-size=2"], 6),
    "activations": ([VERDICT, "--capture=resid_post", "--output=new", "--max-tokens=9"], 4),
    "inspect_checkpoint": ([SHAKESPEARE], 3),
    "doctor": ([], 2),
}


@pytest.fixture
def started(tmp_path):
    """started(script, *args) -> the process of a command, whose handlers are installed."""
    (tmp_path / "in.jsonl").write_text('"ROMEO:"\n' * 1000)
    processes = []

    def start(script, *args):
        command = [sys.executable, str(commands.SCRIPTS / f"{script}.py"), *map(str, args)]
        return begin(command, tmp_path)

    def begin(command, cwd):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=cwd, env=os.environ | {"JAX_PLATFORMS": "cpu"}, **pipes)
        processes.append(process)
        while process.poll() is None and not handles(process.pid, signal.SIGTERM):
            time.sleep(0.001)
        return process

    start.code = lambda code: begin([sys.executable, "-c", textwrap.dedent(code)], tmp_path)
    yield start
    for process in processes:
        process.kill()
        process.communicate()


def handles(pid: int, number: int) -> bool:
    """Return whether a process has a handler for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")), 0)
    return bool(caught >> (number - 1) & 1)


def check_end(process, *statuses):
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode in statuses, (process.returncode, err.decode())
    assert b"Traceback" not in err, err.decode()
    assert b"Exception ignored" not in err, err.decode()
    return out.decode(), err.decode()


def test_one_ctrl_c_at_a_random_moment(started, tmp_path):
    """From the first imports on. Nothing is left but part files and unfinished runs."""
    rng = random.Random(campaign(7, time.time_ns()))
    names = list(LONG)
    for i in range(campaign(6, 40)):
        name = names[i % len(names)]
        args, seconds = LONG[name]
        for path in ("new", "out.jsonl", "out.jsonl.part"):
            subprocess.run(["rm", "-rf", str(tmp_path / path)], check=True)
        process = started(name.split()[0], *args)
        time.sleep(rng.uniform(0, seconds) * (0.1 if i % 2 else 1))  # every second one while it imports
        number = rng.choice([signal.SIGINT, signal.SIGINT, signal.SIGTERM])
        process.send_signal(number)
        # 0: it was done before. A signal after the work ends the process as if it had no handler.
        check_end(process, 0, 128 + number, -number)
        left = {path.name for path in tmp_path.iterdir()} - {"in.jsonl", "out.jsonl.part", ".out.jsonl.lock", "new"}
        assert not left, (name, left)


@pytest.mark.parametrize("number", campaign([signal.SIGINT], [signal.SIGINT, signal.SIGTERM]))
def test_each_state_of_a_generation(started, number, tmp_path):
    """The moments that no random delay is sure to meet: between two batches, and while a pipe is read."""
    process = started("generate", "--input=in.jsonl", "--output=out.jsonl", "--max-new-tokens=9")
    part = tmp_path / "out.jsonl.part"
    while not (part.exists() and part.read_bytes().count(b"\n") > 20):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    check_end(process, 128 + number)
    assert part.exists()


def test_a_read_that_waits_ends(tmp_path):
    command = [sys.executable, str(commands.SCRIPTS / "generate.py"), "--prompt-file=-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        while not handles(process.pid, signal.SIGTERM):
            time.sleep(0.001)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(SECONDS) == 130
        finally:
            process.kill()
        assert process.stderr.read() == b""


# ---- single mechanisms, in small processes

BEGIN = """
import gc, os, signal, sys, time
from gpt2_jax.commands import _command, _interrupts, start
sys.argv = ["x", "124M"]
from gpt2_jax.commands import download

def run(args):
"""


def test_a_second_ctrl_c_kills_what_does_not_end(started):
    """Also if the main thread runs no Python code, as while XLA compiles, and if the first was handled."""
    code = """
        import ctypes
        for _ in range(100):
            try:
                print("begun", flush=True)
                ctypes.CDLL(None).sleep(60)
            except KeyboardInterrupt:
                pass
    """
    body = textwrap.indent(textwrap.dedent(code), "    ")
    process = started.code(f"{BEGIN}{body}\ndownload.run = run\nstart.download()")
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "one Ctrl-C does not kill"
    process.send_signal(signal.SIGINT)
    check_end(process, 130)


def test_forgotten_ctrl_cs_never_kill(started):
    """The watching thread may read a signal's byte only after the main thread has handled and forgotten the signal."""
    body = """
    for _ in range(12):
        try:
            print("waits", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            _interrupts.forget()
    """
    process = started.code(f"{BEGIN}{body}\ndownload.run = run\nstart.download()")
    for _ in range(12):
        assert process.stdout.readline() == b"waits\n"
        time.sleep(0.15)  # longer than a wrapper takes to send a signal twice
        process.send_signal(signal.SIGINT)
    check_end(process, 0)


def test_two_signals_at_once_are_one(started):
    """`npm run`, `uv run` and others pass Ctrl-C on to a process that the terminal has already told."""
    body = """
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.5)
        print("cleaned", flush=True)
    """
    process = started.code(f"{BEGIN}{body}\ndownload.run = run\nstart.download()")
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert check_end(process, 130)[0] == "cleaned\n"


def test_an_exception_that_python_discards_comes_again(started):
    """Python discards errors in callbacks of the garbage collector, and JAX has one (jax-ml/jax#18246)."""
    body = """
    def collected(phase, info):
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            pass
    gc.callbacks.append(collected)
    print("begun", flush=True)
    while True:
        gc.collect()
        time.sleep(0.1)
    """
    process = started.code(f"{BEGIN}{body}\ndownload.run = run\nstart.download()")
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGINT)
    check_end(process, 130)


@pytest.mark.parametrize("kind", ["ValueError", "ImportError", "RuntimeError", "SystemExit"])
def test_an_exception_that_became_another(started, kind):
    """Libraries turn it into their own errors."""
    body = f"""
    try:
        print("begun", flush=True)
        time.sleep(60)
    except BaseException as error:
        raise {kind}("wrong") from error
    """
    process = started.code(f"{BEGIN}{body}\ndownload.run = run\nstart.download()")
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGINT)
    assert check_end(process, 130) == ("", "")


def test_a_signal_that_is_ignored_stays_ignored(started):
    """A shell without job control starts `command &` with Ctrl-C ignored."""
    code = """
        import os, signal, sys
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.execv(sys.executable, [sys.executable, "-c", os.environ["CODE"]])
    """
    body = "    os.kill(os.getpid(), signal.SIGINT); time.sleep(0.3); print('still here', flush=True)\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODE", f"{BEGIN}{body}\ndownload.run = run\nstart.download()")
        process = started.code(code)
    assert check_end(process, 0)[0] == "still here\n"


@pytest.mark.parametrize("seconds", [1, 600])
def test_an_import_is_not_cut_in_two(started, tmp_path, seconds):
    """A module in C crashes if its initialization fails half-way. An import that does not end is given up."""
    lines = ["import time", "print('begun', flush=True)", f"end = time.monotonic() + {seconds}"]
    lines += ["while time.monotonic() < end: time.sleep(0.01)", "print('whole', flush=True)"]
    (tmp_path / "slow.py").write_text("\n".join(lines))
    body = """
    import slow
    print("later", flush=True)
    time.sleep(60)
    """
    process = started.code(f"{BEGIN}{body}\ndownload.run = run\nstart.download()")
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGINT)
    assert check_end(process, 130)[0] in (("whole\n", "whole\nlater\n") if seconds == 1 else ("",))
