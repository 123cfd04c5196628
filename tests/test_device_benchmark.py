"""benchmarks/device.py: its parts at tiny sizes without packages that a GPU machine lacks; limits, budget, failures."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from strength import campaign

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
COMMAND = BENCHMARKS / "device.py"
HIDDEN = ("tensorflow", "tyro", "grain", "tensorboardX")
HIDE = f"""
import sys
from importlib.machinery import PathFinder

class Hiding:
    def __getattr__(self, name):
        return getattr(PathFinder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {HIDDEN} else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding()
"""


def running(pid):
    """Whether a process still runs; a zombie does not."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture(scope="module")
def device():
    """The module benchmarks/device.py, which finds its neighbours on sys.path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")]))
        spec = importlib.util.spec_from_file_location("device", COMMAND)
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "device", module)
        spec.loader.exec_module(module)
        yield module


def run(device, tmp_path, parts, minutes="1", least=0.0, limit=30.0):
    """Run parts of tests/support/device_parts.py; return (exit status, summary)."""
    args = device.parse_args(["--output", str(tmp_path), "--minutes", minutes, "--tiny"])
    listed = [device.Part(name, f"device_parts:{name}", limit, least, "") for name in parts]
    return device.run(listed, args), (tmp_path / "summary.md").read_text()


def rows(text):
    """The cells of all lines of tables."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_tiny_sizes_without_the_packages_that_a_gpu_machine_lacks(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    find = f"import importlib.util as u; print([n for n in {HIDDEN} if u.find_spec(n)])"
    found = subprocess.run([sys.executable, "-c", find], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    chosen = campaign(["--parts", "environment", "checks", "decode-124M", "train-124M"], [])
    command = [sys.executable, COMMAND, "--tiny", "--minutes", "30", "--output", tmp_path / "out", *chosen]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert done.returncode == 0, done.stderr + summary
    assert done.stdout.strip() == summary.strip()
    outcomes = [row for row in rows(summary) if row[1] in ("ran", "failed", "skipped")]
    assert len(outcomes) == (len(chosen) - 1 if chosen else 12)
    assert all(row[1] == "ran" for row in outcomes)
    assert "Left out" not in summary
    assert "Failed" not in summary
    assert "left] checks: ran after" in done.stderr
    checks = rows((tmp_path / "out/parts/checks.md").read_text())
    assert [row[2] for row in checks[2:]] == ["pass"] * 6
    decode = rows((tmp_path / "out/parts/decode-124M.md").read_text())
    assert [row[:2] for row in decode[2:]] == [[n, way] for n in "13" for way in ("greedy", "top_k 40, top_p 0.9")]
    figures = json.loads((tmp_path / "out/parts/decode-124M.json").read_text())
    for n_rows, sampling, step, *rest in decode[2:]:
        seconds = figures[f"{n_rows} rows, {sampling}"]
        assert float(step) == pytest.approx(seconds * 1e3, abs=6e-4)
        assert float(rest[1]) == pytest.approx(int(n_rows) / seconds, rel=0.01)
    training = rows((tmp_path / "out/parts/train-124M.md").read_text())
    assert [row[:2] for row in training[2:]] == [["2", "2"], ["2", "4"]]  # layers, rows
    for _, n_rows, step, speed, *_, losses in training[2:]:
        assert float(speed) == pytest.approx(int(n_rows) * 64 / float(step) * 1e3, rel=0.01)
        first, last = map(float, losses.split(","))
        assert last < first


def test_a_part_that_goes_wrong_keeps_its_rows_and_the_other_parts(device, tmp_path, capfd):
    names = ["works", "raises", "cannot_be_imported", "is_killed", "exits"]
    status, summary = run(device, tmp_path, names)
    assert status == 1
    outcomes = {row[0]: (row[1], row[3]) for row in rows(summary) if len(row) == 4}
    assert outcomes["works"] == ("ran", "")
    assert outcomes["raises"] == ("failed", "first: ZeroDivisionError: division by zero.")
    assert outcomes["is_killed"] == ("failed", "killed by SIGKILL; memory may have run out")
    assert outcomes["exits"] == ("failed", "a reason")
    assert "No module named 'no_such_package'" in outcomes["cannot_be_imported"][1]
    assert summary.count("| works | 7 |") == 4
    assert "| after the error | 8 |" in summary
    assert "ZeroDivisionError" in (tmp_path / "logs/raises.txt").read_text()
    assert "is_killed: failed after" in capfd.readouterr().err


def test_a_part_that_hangs_is_killed_with_its_children_and_the_budget_holds(device, tmp_path):
    begin = time.monotonic()
    status, summary = run(device, tmp_path, ["hangs", "works"], minutes="0.1", least=2.0, limit=30.0)
    assert time.monotonic() - begin < 6 + 1
    assert status == 1
    outcomes = {row[0]: (row[1], row[3]) for row in rows(summary) if len(row) == 4}
    assert outcomes["hangs"] == ("failed", "killed at its limit of 3 s")
    assert outcomes["works"] == ("skipped", "it needs 2 s or more, and 0 s were left")
    assert summary.count("| works | 7 |") == 1  # of the part that hung
    assert not any(map(running, (tmp_path / "pid").read_text().split()))


def test_what_has_no_time_is_skipped_with_a_sentence_and_status_0(device, tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/works.md").write_text("an older table")
    status, summary = run(device, tmp_path, ["works"], minutes="0.1", least=60)
    assert (status, "it needs 60 s or more" in summary, "an older table" in summary) == (0, True, False)
    status, summary = run(device, tmp_path, ["has_no_time"])
    assert status == 0
    assert "Left out: next: the last case took" in summary


def start_hanging(tmp_path):
    """Start the command with one part that hangs; return (the command, the numbers of the part's two processes)."""
    code = "import device, sys; device.PARTS = (device.Part('hangs', 'device_parts:hangs', 60, 1, ''),); "
    code += "sys.exit(device.main())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), os.environ["PYTHONPATH"]])}
    process = subprocess.Popen([sys.executable, "-c", code, "--output", str(tmp_path)], env=environment)
    while not (tmp_path / "pid").exists() or " " not in (tmp_path / "pid").read_text():
        assert process.poll() is None
    return process, (tmp_path / "pid").read_text().split()


def test_sigterm_ends_the_running_part_and_keeps_its_rows(device, tmp_path):
    process, pids = start_hanging(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert not any(map(running, pids))
    summary = (tmp_path / "summary.md").read_text()
    assert "the command was stopped" in summary
    assert "| works | 7 |" in summary


def test_a_killed_command_leaves_no_part_behind_and_its_rows(device, tmp_path):
    process, (part, other) = start_hanging(tmp_path)
    process.kill()
    process.wait()
    try:
        deadline = time.monotonic() + 20
        while running(part):
            assert time.monotonic() < deadline
    finally:
        os.kill(int(other), signal.SIGKILL)  # the part's own child
    assert "| works | 7 |" in (tmp_path / "parts/hangs.md").read_text()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--minutes", "0"], "--minutes must be"),
        (["--minutes", "nan"], "--minutes must be"),
        (["--parts", "decode"], "invalid choice"),
        (["--output", str(COMMAND)], "--output: "),
    ],
)
def test_wrong_arguments_exit_with_2(device, capsys, wrong, message):
    with pytest.raises(SystemExit) as stop:
        device.parse_args(wrong)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
