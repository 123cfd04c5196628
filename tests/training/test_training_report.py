"""What a run reports: strict files without duplicates after a kill, and a speed without the compile time."""

import contextlib
import dataclasses
import json
import math
import os
import re
import selectors
import struct
import sys
import types

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from gpt2_jax.recipe import Monitor, Recipe
from gpt2_jax.training import hardware, make_plan
from gpt2_jax.training.records import Records, read_records
from gpt2_jax.training.report import Report, _duration, _short

CONFIG = tiny_models.CONFIG
RECIPE = Recipe(steps=1009, monitor=Monitor(tensorboard=False))
PLAN = make_plan(CONFIG, RECIPE)
METRICS = {"loss": 3.25, "grad_norm": 0.5, "learning_rate": 1e-4, "skipped": False}


class Clock:
    """Time that passes when a test says so."""

    def __init__(self):
        self.now = 17.0

    def __call__(self) -> float:
        return self.now


@dataclasses.dataclass
class Device:
    """A device of a kind."""

    device_kind: str
    platform: str = "gpu"


def strict(path):
    """The lines of a file, read by a parser that accepts only strict JSON."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = path.read_text(encoding="utf-8")
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def steps(report, clock, numbers, seconds=2.0, tokens=600):
    for step in numbers:
        clock.now += seconds
        report.step(step, METRICS, tokens, seconds)


# ---- the files


def test_metrics_are_lines_of_json(tmp_path):
    """One line for each step and evaluation, in order; the first step compiles and has no speed."""
    clock = Clock()
    with Report(PLAN, tmp_path, clock=clock) as report:
        steps(report, clock, [1, 2])
        report.evaluation(2, 3.5, math.exp(3.5), True)
    first, second, evaluation = strict(tmp_path / "metrics.jsonl")
    speed = {"tokens": 600, "seconds": 2.0, "tokens_per_second": None, "mfu": None}
    assert first == {"step": 1} | METRICS | speed
    assert second == {"step": 2} | METRICS | speed | {"tokens_per_second": 300.0}
    assert evaluation == {"step": 2, "val_loss": 3.5, "perplexity": math.exp(3.5), "best": True}


def test_what_is_no_number_is_null(tmp_path):
    """NaN and infinities, also of JAX and NumPy, become null, as strict JSON requires; booleans stay booleans."""
    values = {"loss": math.nan, "grad_norm": np.float32(np.inf), "learning_rate": jnp.float32(-jnp.inf)}
    with Report(PLAN, tmp_path) as report:
        report.step(1, values | {"skipped": jnp.bool_(True), "n_tokens": np.float32(96)}, 96, 0.5)
        report.evaluation(1, math.inf, math.inf, False)
    first, second = strict(tmp_path / "metrics.jsonl")
    assert [first[name] for name in values] == [None] * 3
    assert (first["skipped"], first["n_tokens"]) == (True, 96.0)
    assert (second["val_loss"], second["perplexity"]) == (None, None)


def test_samples(tmp_path, capfd):
    """A sample is one line with the exact text. On the screen, no character of it can move the cursor."""
    text = ' of "Nile"\x1b[2J\né\u2028\ud83d\ude00'.encode("utf-16", "surrogatepass").decode("utf-16")
    with Report(PLAN, tmp_path) as report:
        report.sample(7, "Antony", text, 0.25)
    assert [json.loads(line) for line in (tmp_path / "samples.jsonl").read_bytes().splitlines()] == [
        {"step": 7, "prompt": "Antony", "text": text, "verbatim": 0.25}
    ]
    out, err = capfd.readouterr()
    assert 'step 7/1,009: a sample\nAntony of "Nile"\ufffd[2J' in err
    assert out == ""


def test_a_line_is_in_the_file_when_the_call_returns(tmp_path):
    with Report(PLAN, tmp_path) as report:
        for step in (1, 2, 3):
            report.step(step, METRICS, 96, 0.5)
            assert [line["step"] for line in strict(tmp_path / "metrics.jsonl")] == list(range(1, step + 1))


@hypothesis.given(
    n_steps=st.integers(0, 12), every=st.integers(1, 4), cut=st.integers(0, 2000), resumed=st.integers(0, 12)
)
@hypothesis.settings(max_examples=60)
def test_killed_at_any_byte_and_resumed_nothing_stands_twice(tmp_path_factory, n_steps, every, cut, resumed):
    """For any remaining part of the file, and any step from which the run resumes: each line once, in order."""
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"

    def go(first, last):
        records = Records(path, first)
        for step in range(first + 1, last + 1):
            records.write({"step": step, "loss": step / 7})
            if step % every == 0:
                records.write({"step": step, "val_loss": step / 11})
        records.close()

    go(0, 12)
    whole = path.read_bytes()
    path.unlink()
    go(0, n_steps)
    killed = path.read_bytes()[:cut]
    path.write_bytes(killed)
    n_lines = killed.count(b"\n")
    step = min([resumed, *(r["step"] for r in list(read_records(path))[-1:])]) if n_lines else 0
    go(step, 12)
    # Only one line can be lost: the line of the step from which the run resumes, if the kill cut it off.
    lines, expected = path.read_bytes().splitlines(), whole.splitlines()
    lost = [line for line in expected if line not in lines]
    assert lines == [line for line in expected if line in lines]
    assert len(lost) <= 1
    assert all(json.loads(line)["step"] == step and "val_loss" in json.loads(line) for line in lost)


def test_a_run_that_begins_anew_keeps_nothing_of_one_before(tmp_path):
    for loss in (4.5, 3.5):
        with Report(PLAN, tmp_path) as report:
            report.evaluation(0, loss, math.exp(loss), True)
    assert [line["val_loss"] for line in strict(tmp_path / "metrics.jsonl")] == [3.5]


def test_resuming_cuts_samples_too_and_leaves_no_other_file(tmp_path):
    clock = Clock()
    for first in (0, 3):
        with Report(PLAN, tmp_path, first, clock=clock) as report:
            steps(report, clock, range(first + 1, 6))
            report.sample(2 if first == 0 else 5, "a", "b")
            if first == 0:
                report.sample(4, "a", "lost")
        with (tmp_path / "metrics.jsonl").open("ab") as file:
            file.write(b'{"step": 6, "lo')
    assert [line["step"] for line in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in strict(tmp_path / "samples.jsonl")] == [2, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


@pytest.mark.parametrize("line", [b"not json\n", b"\xff\xfe\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": "1"}\n', b"\n"])
def test_a_broken_line_is_named_and_nothing_is_changed(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'{"step": 2}\n')
    with pytest.raises(ValueError, match=r'metrics.jsonl, line 2 is not a JSON object with a "step": repair or'):
        Report(PLAN, tmp_path, 2).__enter__()
    assert path.read_bytes() == b'{"step": 1}\n' + line + b'{"step": 2}\n'
    assert [found.name for found in tmp_path.iterdir()] == ["metrics.jsonl"]


# ---- TensorBoard


def events(folder):
    """All events of a folder. A record in a file is: length, checksum, message, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def test_tensorboard(tmp_path):
    """Scalars and samples by step; a resumed run makes TensorBoard discard what came after its first step."""
    recipe = Recipe(steps=1009)
    for first in (0, 3):
        clock = Clock()
        with Report(make_plan(CONFIG, recipe), tmp_path, first, clock=clock) as report:
            steps(report, clock, [first + 1, first + 2])
            report.step(first + 3, METRICS | {"loss": math.nan}, 600, 2.0)
            report.evaluation(first + 3, 3.5, 33.0, True)
            report.sample(first + 3, "To", " be")
    found = list(events(tmp_path / "tensorboard"))
    scalars = [(e.step, v.tag, v.simple_value) for e in found for v in e.summary.value if v.HasField("simple_value")]
    assert (2, "train/loss", 3.25) in scalars
    assert (4, "train/learning_rate", pytest.approx(1e-4)) in scalars
    assert (6, "val/loss", 3.5) in scalars
    assert (6, "val/perplexity", 33.0) in scalars
    assert (5, "speed/tokens_per_second", 300.0) in scalars
    assert [step for step, tag, _ in scalars if tag == "train/loss"] == [1, 2, 4, 5]  # NaN is left out
    assert [step for step, tag, _ in scalars if tag == "speed/tokens_per_second"] == [2, 3, 5, 6]
    assert [e.step for e in found if e.session_log.status == e.session_log.START] == [0, 4]
    (text, _) = [v.tensor.string_val[0] for e in found for v in e.summary.value if v.tag.startswith("sample/To")]
    assert text == b" be"


def test_no_tensorboard_unless_asked_for(tmp_path):
    with Report(PLAN, tmp_path) as report:
        report.step(1, METRICS, 96, 0.5)
    assert not (tmp_path / "tensorboard").exists()


# ---- what is shown


def test_lines_where_there_is_no_terminal(tmp_path, capfd):
    """Plain lines on standard error: first steps, then one about every ten seconds, evaluations, the last step."""
    clock, recipe = Clock(), dataclasses.replace(RECIPE, steps=40)
    with Report(make_plan(CONFIG, recipe), tmp_path, clock=clock) as report:
        steps(report, clock, range(1, 20), seconds=1.5)
        report.evaluation(19, 3.125, 22.76, True)
        steps(report, clock, range(20, 41), seconds=1.5)
    out, err = capfd.readouterr()
    assert out == ""
    assert "\x1b" not in err
    assert "\r" not in err
    shown = [int(number) for number in re.findall(r"^step (\d+)/40: loss", err, re.MULTILINE)]
    assert shown == [1, 2, 3, 10, 17, 24, 31, 38, 40]
    assert "step 19/40: validation loss 3.1250 nats a token, perplexity 22.76, the best so far\n" in err
    assert "step 38/40: loss 3.250, val 3.125, 400 tokens/s, MFU n/a, 0:00:03 left\n" in err
    assert "step 1/40: loss 3.250, n/a left\n" in err


def test_speed_is_without_compiling_and_time_left_with_evaluations(tmp_path, capfd):
    """A slow first step changes neither. A slow evaluation changes the time left, and not the speed."""
    clock, recipe = Clock(), dataclasses.replace(RECIPE, steps=103)
    with Report(make_plan(CONFIG, recipe), tmp_path, clock=clock) as report:
        steps(report, clock, [1], seconds=60)
        clock.now += 60  # an evaluation
        steps(report, clock, [2, 3], seconds=2)
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == "step 3/103: loss 3.250, 300 tokens/s, MFU n/a, 0:53:20 left"  # 64 s for 2 steps, 100 to go


def test_mfu_of_known_devices(tmp_path, capfd):
    """Relative to the peak of all devices together, in the line and in the file."""
    devices = np.array([Device("NVIDIA H200"), Device("NVIDIA H200")])
    plan = dataclasses.replace(make_plan(CONFIG, RECIPE, n_tokens=31), mesh=types.SimpleNamespace(devices=devices))
    clock = Clock()
    speed = 0.25 * 2 * 989e12 / hardware.flops_per_token(CONFIG, 31)
    with Report(plan, tmp_path, clock=clock) as report:
        steps(report, clock, [1, 2], seconds=1.0, tokens=speed)
    assert strict(tmp_path / "metrics.jsonl")[1]["mfu"] == pytest.approx(0.25)
    assert ", MFU 25.0%, " in capfd.readouterr().err


@contextlib.contextmanager
def on_a_terminal(width):
    """Replace standard error by a terminal; give a function that returns what was written to it."""
    import pty  # not on Windows

    ours, theirs = pty.openpty()

    def written() -> str:
        text = b""
        with selectors.DefaultSelector() as selector:
            selector.register(ours, selectors.EVENT_READ)
            while selector.select(0.05):
                text += os.read(ours, 2**16)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode())

    with pytest.MonkeyPatch.context() as patch, os.fdopen(theirs, "w", encoding="utf-8") as file:
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", str(width))
        patch.delenv("NO_COLOR", raising=False)
        patch.setattr(sys, "stderr", file)
        yield written
    os.close(ours)


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (70, "step 12/1,009: loss 3.250, val 3.125, 300 tokens/s, 0:33:14 left"),
        (60, "step 12/1,009: loss 3.250, val 3.125, 0:33:14 left"),
        (40, "step 12/1,009: loss 3.250, 0:33:14 left"),
    ],
)
def test_the_time_left_is_on_a_narrow_terminal(tmp_path, width, shown):
    clock = Clock()
    with on_a_terminal(width) as written:
        with Report(PLAN, tmp_path, 5, clock=clock) as report:
            steps(report, clock, range(6, 12))
            report.evaluation(11, 3.125, 22.76, True)
            clock.now += 2
            report.step(12, METRICS, 600, 2.0)
        assert shown in written()


def test_a_bar_on_a_terminal(tmp_path, capsys):
    """One line with everything in it, redrawn in place; messages are above it, and standard output is untouched."""
    clock = Clock()
    with on_a_terminal(120) as written:
        with Report(PLAN, tmp_path, 5, clock=clock) as report:
            print("a result")
            steps(report, clock, range(6, 12))
            report.evaluation(11, 3.125, 22.76, True)
            report.message("saved [bold]checkpoints/11[/bold]")
            clock.now += 2
            report.step(12, METRICS, 600, 2.0)
        shown = written()
    assert re.search("━ step 12/1,009: loss 3.250, val 3.125, 300 tokens/s, MFU n/a, 0:33:14 left", shown)
    assert "step 11/1,009: validation loss 3.1250 nats a token" in shown
    assert "saved [bold]checkpoints/11[/bold]" in shown
    assert "\nstep 12/" not in shown  # no lines beside the bar
    assert capsys.readouterr().out == "a result\n"


@pytest.mark.parametrize("width", [80, 40])
def test_the_bar_keeps_to_one_line(tmp_path, width):
    """On a narrow terminal the bar becomes shorter, and then the end of the numbers is cut; there is no second line."""
    clock, recipe = Clock(), dataclasses.replace(RECIPE, steps=600_000)
    with on_a_terminal(width) as written:
        with Report(make_plan(CONFIG, recipe), tmp_path, clock=clock) as report:
            steps(report, clock, range(1, 4), tokens=524_288)
            report.evaluation(3, 10.125, 22.76, True)
            steps(report, clock, [4], tokens=524_288)
        shown = written()
    lines = [line for line in re.split(r"[\r\n]+", shown) if "step 4/600,000: " in line]
    assert lines
    assert all("loss 3.250" in line and len(line.rstrip()) <= width for line in lines)
    assert ("left" in lines[-1]) == (width == 80)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "n/a"), (0.4, "0:00:00"), (3599.6, "1:00:00"), (172_799, "47:59:59"), (266_700, "3d 02:05")],
)
def test_durations(seconds, text):
    assert _duration(seconds) == text


@pytest.mark.parametrize(("speed", "text"), [(0.25, "0.25"), (812.4, "812"), (26_412, "26.4k"), (1_310_000, "1.31M")])
def test_speeds(speed, text):
    assert _short(speed) == text
