"""Commands of several processes: their options, their start, and the end of all when one of them ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest
from process_groups import ENDED, SCRIPT, SECONDS, SOON, Group, free_port, until_gone

from gpt2_jax.commands import _processes, train
from gpt2_jax.processes import PeerError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="waits for processes by pidfd")


@pytest.fixture
def group(tmp_path):
    started = Group(tmp_path)
    yield started
    started.close()


# ---- options


def test_options():
    assert commands.parse("gpt2-train").processes == _processes.Processes(1, None, None, False, 300)
    given = ["--processes.count=3", "--processes.index=2", "--processes.coordinator=a:1", "--processes.timeout=7"]
    assert commands.parse("gpt2-train", *given).processes == _processes.Processes(3, 2, "a:1", False, 7)
    assert commands.parse("gpt2-finetune", "--processes.auto").processes == _processes.Processes(auto=True)


@pytest.mark.parametrize(
    ("options", "several"),
    [
        ({}, False),
        ({"index": 0, "coordinator": "host:1"}, False),  # a script that is started with N = 1
        ({"count": 2, "index": 1, "coordinator": "host:1"}, True),
        ({"count": 2, "index": 0, "coordinator": "[::1]:65535"}, True),
        ({"auto": True}, True),
    ],
)
def test_several(options, several):
    assert _processes.Processes(**options).several() is several


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("count=0", "--processes.count must be 1 or more, not 0"),
        ("count=2 coordinator=a:1", "--processes.count 2 needs --processes.index"),
        ("count=2 index=0", "--processes.count 2 needs --processes.coordinator"),
        ("count=2 index=2 coordinator=a:1", "--processes.index must be 0 to 1 (count - 1), not 2"),
        ("count=2 index=-1 coordinator=a:1", "--processes.index must be 0 to 1 (count - 1), not -1"),
        ("index=1 coordinator=a:1", "--processes.index must be 0 to 0 (count - 1), not 1"),
        ("count=2 index=0 coordinator=a", "--processes.coordinator must be HOST:PORT, not a"),
        ("count=2 index=0 coordinator=a:0", "--processes.coordinator must be HOST:PORT, not a:0"),
        ("count=2 index=0 coordinator=a:65536", "--processes.coordinator must be HOST:PORT, not a:65536"),
        ("count=2 index=0 coordinator=:80", "--processes.coordinator must be HOST:PORT, not :80"),
        ("auto count=2", "--processes.auto finds count, index and coordinator: leave them out"),
        ("auto index=0", "--processes.auto finds count, index and coordinator: leave them out"),
        ("auto timeout=0", "--processes.timeout must be 1 or more, not 0"),
    ],
)
def test_refused_options(capfd, options, message):
    """Without a child."""
    run = commands.caller(train.main, capfd)
    assert run(*(f"--processes.{option}" for option in options.split())) == (2, "", f"gpt2-train: {message}\n")


def test_a_call_in_python_starts_no_process(capfd):
    """The command line of this process is not that of the command."""
    done = commands.caller(train.main, capfd)("--processes.auto")
    message = "several processes need the command gpt2-...: in Python, call jax.distributed.initialize"
    assert done == (2, "", f"gpt2-train: {message}\n")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            ValueError("UNKNOWN: Gloo AllGather failed: [pair.cc:538] Connection reset by peer"),
            True,
        ),
        (RuntimeError("UNAVAILABLE: Failed to send RPC to coordination service."), True),
        (RuntimeError("INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited"), True),
        (RuntimeError("INTERNAL: NCCL operation ncclCommInitRank() failed: unhandled system error"), False),
        (RuntimeError("UNAVAILABLE: TPU initialization failed: the device is busy"), False),
        (ConnectionResetError("Connection reset by peer"), False),
        (PeerError("the process with index 1 failed: wrong"), True),
    ],
)
def test_errors_of_another_end(monkeypatch, error, expected):
    """Of connected processes alone, and also as the cause of another error."""
    wrapped = RuntimeError("the checkpoint was not saved")
    wrapped.__cause__ = error
    assert not _processes.peer_ended(error)
    monkeypatch.setattr(_processes._State, "connected", True)
    assert _processes.peer_ended(error) is _processes.peer_ended(wrapped) is expected


def test_one_process_pays_nothing(tmp_path):
    """No child, and no import of what several processes need."""
    code = """
import os, sys
from gpt2_jax.commands import start, train
def run(args):
    print(os.getppid(), sorted({"gpt2_jax.commands._supervisor", "jax"} & set(sys.modules)))
train.run = run
start.train()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "--processes.index=0"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == (f"{os.getpid()} []\n", "")


# ---- the start


def test_the_result_of_process_0_alone(group):
    """Three processes count one another in five rounds. Standard output has nothing of C++ code, and of no other."""
    group.start(3, "--rounds=5")
    assert group.end(0) == (0, "15\n", "ordinary message\n")
    assert group.end(1) == group.end(2) == (0, "", "")


def test_slurm(group):
    """JAX finds the processes of srun."""
    for index in range(2):
        names = {"JOB_ID": "7", "STEP_NODELIST": "localhost", "NTASKS": "2", "PROCID": str(index), "LOCALID": "0"}
        variables = {f"SLURM_{name}": value for name, value in names.items()}
        group.add("--processes.auto", "--rounds=5", JAX_COORDINATOR_PORT=str(group.port), **variables)
    assert group.end(0) == (0, "10\n", "ordinary message\n")
    assert group.end(1) == (0, "", "")


def test_no_cluster(group):
    group.add("--processes.auto")
    assert group.end(0) == (2, "", f"gpt2-train: {_processes.NO_CLUSTER}\n")


def test_a_coordinator_that_never_comes(group):
    """JAX aborts the process. Process 0 waits for the others in the same way."""
    group.add(*group.address(2, 1), "--processes.timeout=1")
    group.add(*group.address(2, 0)[:2], f"--processes.coordinator=localhost:{free_port()}", "--processes.timeout=1")
    done, first = group.end(0), group.end(1)
    late = r"gpt2-train: process {}: not all processes connected to the coordinator of \S+:\d+ within 1 s: start all "
    for run, index in ((done, 1), (first, 0)):
        assert (run.code, run.out, run.err.count("\n")) == (75, "", 1), run.err
        assert re.match(late.format(index), run.err)


def test_a_port_in_use(group):
    with socket.create_server(("127.0.0.1", group.port)):
        group.add(*group.address(2, 0))
        message = f"port {group.port} of --processes.coordinator is used by another program"
        assert group.end(0) == (75, "", f"gpt2-train: process 0: {message}\n")


def test_a_signal_before_all_are_connected(group):
    """The process waits in C++ code, and has nothing to save."""
    with socket.create_server(("127.0.0.1", group.port)) as server:
        server.settimeout(SECONDS)
        group.add(*group.address(2, 1))
        connection, _ = server.accept()
        group.parents[0].terminate()
        message = "gpt2-train: process 1: killed, because it did not end after SIGTERM\n"
        assert group.end(0) == (143, "", message)
        connection.close()


# ---- the end


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others(group, victim):
    """Process 0 has JAX's coordinator."""
    group.start(3)
    group.until_working(3)
    os.kill(group.children[victim], signal.SIGKILL)
    for index in range(3):
        done = group.end(index, SOON)
        messages = done.err.removeprefix("ordinary message\n")
        if index != victim:
            assert (done.code, messages) == (75, f"gpt2-train: process {index}: {ENDED}")
        else:
            assert done.code == 128 + signal.SIGKILL
            assert messages.endswith(f"gpt2-train: process {index}: ended by SIGKILL\n")
        until_gone(group.helpers[index])


def test_a_killed_parent_leaves_no_process(group):
    group.start(2)
    group.until_working(2)
    group.parents[1].kill()
    until_gone(group.children[1])
    until_gone(group.helpers[1])
    assert group.end(0, SOON) == (75, "", f"ordinary message\ngpt2-train: process 0: {ENDED}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_process_once(group, number):
    """A second SIGINT would end it at once. The processes of this command agree to stop."""
    group.start(2)
    group.until_working(2)
    group.parents[1].send_signal(number)
    first, other = group.end(0), group.end(1)
    assert (first.code, first.err) == (128 + signal.SIGTERM, "ordinary message\n")
    assert int(first.out) > 0
    assert other == (128 + signal.SIGTERM, "", "")


def test_a_signal_to_a_process_alone_ends_the_others(group):
    """The command does not handle the signal itself. JAX must not swallow it."""
    group.start(2, "--no-agree")
    group.until_working(2)
    group.parents[1].terminate()
    assert group.end(1, SOON) == (143, "", "")
    assert group.end(0, SOON) == (75, "", f"ordinary message\ngpt2-train: process 0: {ENDED}")


def test_ctrl_z(group):
    """The process stops and goes on with its parent."""
    group.start(2)
    group.until_working(2)
    parent = group.parents[1].pid
    os.kill(parent, signal.SIGTSTP)
    assert os.WIFSTOPPED(os.waitpid(parent, os.WUNTRACED)[1])
    stat, deadline = Path(f"/proc/{group.children[1]}/stat"), time.monotonic() + SOON
    while stat.read_text().rpartition(")")[2].split()[0] != "T":  # its threads stop one by one
        assert time.monotonic() < deadline
    os.kill(parent, signal.SIGCONT)
    os.kill(parent, signal.SIGTERM)
    assert group.end(1) == (143, "", "")


def test_a_second_ctrl_c_ends_a_process_that_waits_for_a_hung_one(group, monkeypatch):
    monkeypatch.setattr(commands, "SCRIPTS", SCRIPT.parent)
    with commands.OnATerminal("at_work", *group.address(2, 0), cwd=SCRIPT.parent, PIPE=str(group.pipe)) as shown:
        group.add(*group.address(2, 1))
        group.until_working(2)
        os.kill(group.children[1], signal.SIGSTOP)
        shown.type("\x03")
        shown.until_idle()
        shown.type("\x03")
        assert shown.end() == 130
        until_gone(group.children[0])


def test_ctrl_c_in_a_terminal_reaches_the_process_once(group, monkeypatch):
    import termios  # not on Windows

    monkeypatch.setattr(commands, "SCRIPTS", SCRIPT.parent)
    with commands.OnATerminal("at_work", *group.address(2, 0), cwd=SCRIPT.parent, PIPE=str(group.pipe)) as shown:
        modes = termios.tcgetattr(shown.terminal)
        modes[3] |= termios.TOSTOP  # after `stty tostop`, too, the process writes to the terminal
        termios.tcsetattr(shown.terminal, termios.TCSANOW, modes)
        group.add(*group.address(2, 1))
        group.until_working(2)
        shown.type("\x03")
        assert shown.end() == 128 + signal.SIGTERM
    assert re.fullmatch(r"ordinary message\n\^C\d+\n", shown.shown)
    assert group.end(0) == (128 + signal.SIGTERM, "", "")


def test_a_hung_process_ends_the_others(group):
    """It sends no heartbeats. JAX ends the others after HEARTBEAT seconds; its own default is 100."""
    assert _processes.HEARTBEAT < SOON / 2
    group.start(2, HEARTBEAT="4")
    group.until_working(2)
    os.kill(group.children[1], signal.SIGSTOP)
    assert group.end(0, SOON) == (75, "", f"ordinary message\ngpt2-train: process 0: {ENDED}")


def test_sigterm_to_a_process_that_waits_for_a_hung_one(group):
    """It waits in C++ code, where it handles no signal. Its heartbeats would end it later."""
    group.start(2, GRACE="1")
    group.until_working(2)
    os.kill(group.children[1], signal.SIGSTOP)
    group.parents[0].terminate()
    message = "gpt2-train: process 0: killed, because it did not end after SIGTERM\n"
    assert group.end(0) == (143, "", f"ordinary message\n{message}")
    until_gone(group.helpers[0])


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        ("ValueError", 2, "gpt2-train: process 1: wrong\n"),
        ("RuntimeError", 1, "RuntimeError: wrong\n"),
        ("crash", 128 + signal.SIGSEGV, "last words of C++\ngpt2-train: process 1: ended by SIGSEGV\n"),
    ],
)
def test_a_process_that_fails_ends_the_other(group, how, status, message):
    group.start(2, f"--fail=1 {how}")
    first, failed = group.end(0), group.end(1)
    assert first == (75, "", f"ordinary message\ngpt2-train: process 0: {ENDED}")
    assert (failed.code, failed.out) == (status, "")
    assert failed.err.endswith(message)
    assert (failed.err == message) == (how == "ValueError")


def test_processes_that_fail_together(group, tmp_path):
    """Each says why, and none that another ended, if the second fails within TOGETHER seconds."""
    turn = tmp_path / "turn"
    os.mkfifo(turn)
    group.start(2, "--fail=01 ValueError", TURN=str(turn))
    lines = iter(group.parents[0].stderr.readline, "")
    assert [next(lines), next(lines)] == ["ordinary message\n", "gpt2-train: process 0: wrong\n"]
    with pytest.raises(subprocess.TimeoutExpired):  # the end of process 0 would end it
        group.parents[1].wait(_processes.TOGETHER / 2)
    os.close(os.open(turn, os.O_WRONLY | os.O_NONBLOCK))  # fails if process 1 does not wait for it
    assert group.end(0) == (2, "", "")
    assert group.end(1) == (2, "", "gpt2-train: process 1: wrong\n")
