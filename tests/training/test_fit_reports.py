"""What `fit` does where there is nothing to measure, nobody reads, or a signal comes; and its TensorBoard file."""

import dataclasses
import errno
import json
import logging
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from tiny_runs import CONFIG, params, small

from gpt2_jax.checkpoints import parts
from gpt2_jax.training import fit, loop, make_plan
from gpt2_jax.training.boards import TensorBoard
from gpt2_jax.training.curve import read_losses
from gpt2_jax.training.records import append

pytestmark = pytest.mark.usefixtures("compiled_once")

FULL = Path("/dev/full")
EVERY = {"evaluate_every": 1, "sample_every": 0, "tensorboard": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    return tiny_runs.prepared(tmp_path_factory.mktemp("text"), tokenizer)


@pytest.fixture
def run(tmp_path, data):
    return lambda recipe, text=data: fit(make_plan(CONFIG, recipe), params(), text, tmp_path / "run")


def masked(tokens, path, counts):
    counts.astype(np.uint8).tofile(path)
    return dataclasses.replace(tokens, mask_path=path)


def records(folder, name):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


# ---- nothing that counts


def test_a_step_without_a_target_is_a_gap(tmp_path, run, data, capfd):
    """The loss is null, not 0, in the file and in the picture. Pairs without a target are left out."""
    train = masked(data.train, tmp_path / "mask", np.zeros(data.train.n_tokens))
    windows = dataclasses.replace(data, train=train, manifest=None)
    fitted = run(small(steps=2, monitor=EVERY | {"evaluate_every": 0}), windows)
    assert fitted.step == 2
    assert records(tmp_path / "run", "loss") == {1: None, 2: None}
    assert np.isnan(read_losses(tmp_path / "run" / "metrics.jsonl")[0][:, 1]).all()
    err = capfd.readouterr().err
    assert "step 1 changed nothing: its batch has no target that counts in the loss" in err
    assert "loss 0.0" not in err
    assert "step 1/2: no target, " in err


def test_validation_without_a_target_is_said_once_and_ends_nothing(tmp_path, run, data, capfd):
    val = masked(data.val, tmp_path / "mask", np.zeros(data.val.n_tokens))
    fitted = run(small(steps=4, monitor=EVERY | {"patience": 2}), dataclasses.replace(data, val=val))
    assert (fitted.step, fitted.stopped, fitted.best_step, fitted.best_loss) == (4, "", None, math.inf)
    assert records(tmp_path / "run", "val_loss") == {}
    said = [line for line in capfd.readouterr().err.splitlines() if "no target" in line]
    why = f"the windows of {val.path} have no target that counts"
    assert said == [f"no validation loss: {why}; monitor.patience does not end the run"]


# ---- signals


@pytest.fixture
def at_step_two(monkeypatch):
    """at_step_two(act): call it after the second step."""

    def call(act):
        step = loop.Report.step

        def then(report, number, *rest):
            step(report, number, *rest)
            if number == 2:
                act()

        monkeypatch.setattr(loop.Report, "step", then)

    return call


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="not on Windows")
@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGTERM"])
def test_a_signal_saves_and_stops(run, at_step_two, name):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    at_step_two(lambda: [os.kill(os.getpid(), n) for n in (number, signal.SIGTERM)])  # the first one is named
    fitted = run(small(monitor=EVERY))
    assert (fitted.signal, fitted.step) == (name, 2)
    assert signal.getsignal(number) is before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="not on Windows")
def test_a_signal_that_is_ignored_stays_ignored(run, at_step_two):
    """As `nohup` wants it."""
    at_step_two(lambda: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(small(monitor=EVERY)).step == 4
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- nobody reads


def test_a_reader_that_has_left_does_not_end_the_run(tmp_path, run, monkeypatch):
    """`2>&1 | head`: a pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as nobody:
        monkeypatch.setattr(sys, "stderr", nobody)
        assert run(small(monitor=EVERY)).step == 4
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), nobody.fileno())  # its buffer is written when it is closed
    assert list(records(tmp_path / "run", "loss")) == [1, 2, 3, 4]


@pytest.mark.skipif(os.name == "nt", reason="needs a terminal of POSIX")
def test_a_terminal_that_was_closed_does_not_end_the_run(tmp_path, run, at_step_two, monkeypatch):
    """The progress bar fails too."""
    import pty

    ours, theirs = pty.openpty()
    at_step_two(lambda: os.close(ours))
    with os.fdopen(theirs, "w", buffering=1) as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        assert run(small(monitor=EVERY)).step == 4
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), terminal.fileno())  # its buffer is written when it is closed
    assert list(records(tmp_path / "run", "loss")) == [1, 2, 3, 4]


# ---- files


def test_an_event_is_in_the_file_at_once(tmp_path):
    board = TensorBoard(tmp_path, 0)
    (path,) = tmp_path.iterdir()
    for step in (1, 2):
        before = path.stat().st_size
        board.add_scalar("train/loss", 2.5, step)
        assert path.stat().st_size > before + 20
    board.close()


class FakeWandb:
    """The module wandb as `Wandb` uses it."""

    def __init__(self):
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **settings):
        self.started.append(settings)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_weights_and_biases_by_option_alone(tmp_path, run, data, monkeypatch):
    """The second start continues the first one's run. Without the option, the package is not imported."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run(small(steps=1, monitor=EVERY)).step == 1
    with pytest.raises(ValueError, match=r"^monitor\.wandb needs the package wandb: pip install wandb$"):
        run(small(steps=2, monitor=EVERY | {"wandb": "plays"}))
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for steps in (2, 3):
        run(small(steps=steps, monitor=EVERY | {"wandb": "plays"}))
    first, second = fake.started
    assert (first["project"], first["name"], first["dir"]) == ("plays", "run", str(tmp_path / "run"))
    assert first["config"]["batch_size"] == 3
    assert first["id"] == second["id"] == (tmp_path / "run" / "wandb-id.txt").read_text()
    assert fake.finished == 2
    losses = {step: values["train/loss"] for step, values in fake.logged if "train/loss" in values}
    assert losses == {step: loss for step, loss in records(tmp_path / "run", "loss").items() if step > 1}
    assert [step for step, values in fake.logged if "val/loss" in values] == [2, 3]
    plan = make_plan(CONFIG, small(steps=3, monitor=EVERY | {"wandb": "plays"}))
    fit(plan, None, data, tmp_path / "run", from_step=2)  # the service would drop a second step 3
    kept, new = (folder / "wandb-id.txt" for folder in (tmp_path / "run" / "aside" / "1", tmp_path / "run"))
    assert kept.read_text() == first["id"]
    assert fake.started[2]["id"] == new.read_text() != first["id"]


def test_weights_and_biases_that_cannot_start_are_one_sentence(run, monkeypatch):
    fake = FakeWandb()
    fake.init = lambda **settings: 1 / 0
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(OSError, match=r"^Weights & Biases cannot start: "):
        run(small(steps=2, monitor=EVERY | {"wandb": "plays"}))


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_full_disk_names_the_file(tmp_path):
    """In the thread that writes: nothing waits for another one."""
    with FULL.open("ab", buffering=0) as file:
        with pytest.raises(OSError, match=r"^/dev/full cannot be written: No space left on device$") as error:
            append(file, b"{}", FULL)
        assert error.value.errno == errno.ENOSPC
        board = TensorBoard(tmp_path, 0)
        board.close()
        board._file, board._path = file, FULL
        with pytest.raises(OSError, match=r"^/dev/full cannot be written: "):
            board.add_scalar("train/loss", 2.5, 1)


def test_what_threads_of_orbax_say_about_a_failed_save_is_dropped():
    """asyncio reports an error that nobody waited for. Only its traceback names Orbax."""

    def record(code):
        try:
            exec(compile("raise OSError(28, 'No space left on device')", code, "exec"))
        except OSError:
            info = sys.exc_info()
        return logging.LogRecord("asyncio", 40, "x", 1, "Future exception was never retrieved\nfuture: <x>", (), info)

    assert not parts._is_not_of_orbax(record("/site-packages/orbax/checkpoint/async_path.py"))
    assert parts._is_not_of_orbax(record("/home/user/own_loop.py"))
