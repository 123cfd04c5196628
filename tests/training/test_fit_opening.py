"""How `fit` opens a run's folder: begun otherwise, damaged, taken back to an earlier step, or open elsewhere."""

import contextlib
import dataclasses
import json
import shutil
from unittest import mock

import jax
import numpy as np
import pytest
import tiny_runs
from tiny_runs import CONFIG, params, small
from train_states import assert_same

import gpt2_jax
from gpt2_jax.training import fit, loop, make_plan, observer
from gpt2_jax.training.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures("compiled_once")

EVERY = {"evaluate_every": 1, "save_every": 1, "sample_every": 0, "tensorboard": False}
NEVER = EVERY | {"evaluate_every": 0}
STEPS = small(steps=6, monitor=EVERY)


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    return tiny_runs.prepared(tmp_path_factory.mktemp("text"), tokenizer)


@pytest.fixture(scope="module")
def other_data(tmp_path_factory, tokenizer):
    return tiny_runs.prepared(tmp_path_factory.mktemp("other"), tokenizer, tiny_runs.TEXT.upper())


@pytest.fixture
def run(tmp_path, data):
    def call(recipe, text=data, name="run", **how):
        return fit(make_plan(CONFIG, recipe), params(), text, tmp_path / name, **how)

    return call


@pytest.fixture(scope="module")
def six(tmp_path_factory, data):
    """The folder of a run of six steps that kept all of its checkpoints: copy it."""
    folder = tmp_path_factory.mktemp("six") / "run"
    kept = dataclasses.replace(STEPS, monitor=dataclasses.replace(STEPS.monitor, keep=9))
    fit(make_plan(CONFIG, kept), params(), data, folder)
    return folder


@contextlib.contextmanager
def failing(owner, name, error, at=1):
    """Raise an error in the `at`-th call of a function."""
    was, calls = getattr(owner, name), []

    def call(*args, **named):
        calls.append(name)
        if len(calls) == at:
            raise error
        return was(*args, **named)

    with mock.patch.object(owner, name, call):
        yield


def records(folder, name):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def state_of(folder, step=None):
    return Checkpoints(folder).restore(make_plan(CONFIG, STEPS).state, step)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_params(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def damage(folder, step):
    file = next(path for path in (folder / "checkpoints" / str(step)).rglob("*") if path.stat().st_size > 99)
    file.write_bytes(file.read_bytes()[:-1])


# ---- a run that never took a step


FAILED = {  # {what fails: (the owner of a function, its name, the call that fails)}
    "the initial state": ("gpt2_jax.training.opening", "init_state", 1),
    "compiling": (loop, "lower_train_step", 1),
    "the first evaluation": (observer, "val_batches", 1),
    "the text": (loop, "train_batches", 1),
    "the memory of the first step": (jax, "device_get", 1),
}


@pytest.mark.parametrize("what", FAILED)
def test_a_start_that_failed_refuses_no_corrected_recipe(tmp_path, run, other_data, tokenizer, what):
    """Another batch size, seed, text and tokenizer. Nothing of the first start is left."""
    owner, name, at = FAILED[what]
    if isinstance(owner, str):
        from gpt2_jax.training import opening as owner
    with failing(owner, name, MemoryError("no room"), at), pytest.raises(MemoryError, match="no room"):
        run(STEPS, tokenizer=tokenizer)
    corrected = small(steps=2, batch_size=1, seed=5, monitor=NEVER)
    assert run(corrected, other_data).step == 2
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (told["recipe"]["batch_size"], told["recipe"]["seed"], told["tokenizer"]) == (1, 5, None)
    assert not (tmp_path / "run" / "best").exists()  # the first start may have evaluated its initial model
    assert not (tmp_path / "run" / "encoder.json").exists()
    assert set(records(tmp_path / "run", "loss")) == {1, 2}
    assert run(corrected, other_data, name="straight").step == 2
    assert_same_params(gpt2_jax.load(tmp_path / "run")[1], gpt2_jax.load(tmp_path / "straight")[1])


def test_a_run_that_took_a_step_keeps_its_settings(tmp_path, run):
    """It was killed after step 2, before its first checkpoint."""
    late = dataclasses.replace(STEPS, monitor=dataclasses.replace(STEPS.monitor, save_every=0))
    with failing(loop.Report, "step", KeyError("killed"), 3), pytest.raises(KeyError):
        run(late)
    assert set(records(tmp_path / "run", "loss")) == {1, 2}
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match=r"recipe\.batch_size was 3 and is 1"):
        run(dataclasses.replace(late, batch_size=1))
    assert contents(tmp_path / "run") == before
    assert run(late).step == 6


def test_a_folder_that_was_locked_alone_is_no_run_of_another(tmp_path, run):
    """A kill between the lock and run.json."""
    with Checkpoints(tmp_path / "run"):
        pass
    assert run(small(monitor=NEVER)).step == 4


# ---- what is left alone


def test_fewer_steps_than_done_change_nothing(tmp_path, run, six):
    shutil.copytree(six, tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match=r"has done 6 steps, more than steps = 4: set at least 6, or") as error:
        run(dataclasses.replace(STEPS, steps=4))
    assert "\n" not in str(error.value)
    assert contents(tmp_path / "run") == before


def test_a_refused_second_process_changes_nothing(tmp_path, run, six):
    shutil.copytree(six, tmp_path / "run")
    before = contents(tmp_path / "run")
    with Checkpoints(tmp_path / "run"), pytest.raises(OSError, match="is open in another process"):
        run(dataclasses.replace(STEPS, steps=9))
    assert contents(tmp_path / "run") == before


def test_what_killed_processes_left_is_removed_at_the_next_start(tmp_path, run, six):
    """A model each; only names of this package, and no links."""
    shutil.copytree(six, tmp_path / "run")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "notes.txt").write_text("three weeks of work")
    for name in (f".best.{'0a' * 16}", f".best.{'1b' * 16}", ".best.old", f".data.{'0a' * 16}", f".notes.{'0a' * 16}"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "file").write_text("text")
    (tmp_path / "run" / f".run.json.{'0a' * 16}").write_text("{")
    (tmp_path / "run" / f".best.{'2c' * 16}").symlink_to(tmp_path / "precious")
    run(STEPS)
    hidden = {path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")}
    assert hidden == {".best.old", f".data.{'0a' * 16}", f".notes.{'0a' * 16}", f".best.{'2c' * 16}"}
    assert (tmp_path / "precious" / "notes.txt").exists()


# ---- a damaged checkpoint


def test_two_checkpoints_are_kept_by_default(tmp_path, run):
    run(STEPS)
    assert Checkpoints(tmp_path / "run").steps() == [5, 6]
    assert_same_params(gpt2_jax.load(tmp_path / "run" / "checkpoints" / "5")[1], state_of(tmp_path / "run", 5).params)


def test_a_run_goes_on_from_the_newest_whole_checkpoint(tmp_path, run, six, capfd):
    """Two are damaged. The run ends as if they never were."""
    folder = tmp_path / "run"
    shutil.copytree(six, folder)
    (folder / "checkpoints" / "6" / "checkpoint.json").unlink()
    damage(folder, 5)
    capfd.readouterr()
    assert run(STEPS).step == 6
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "damaged" in line]
    assert line.startswith(f"{folder / 'checkpoints' / '6'} is damaged: its checkpoint.json is missing; it is kept as ")
    assert line.endswith("6.damaged, and the run resumes after step 4")
    assert_same(state_of(folder), state_of(six))
    assert records(folder, "loss") == records(six, "loss")
    assert records(folder, "val_loss") == records(six, "val_loss")
    assert {"5.damaged", "6.damaged"} <= {path.name for path in (folder / "checkpoints").iterdir()}


def test_without_a_whole_checkpoint_nothing_is_changed(tmp_path, run, six):
    folder = tmp_path / "run"
    shutil.copytree(six, folder)
    for step in (1, 2, 3, 4, 5, 6):
        damage(folder, step)
    before = contents(folder)
    with pytest.raises(ValueError, match=r"checkpoints/6 is damaged: .*; older checkpoints: steps 1, 2, 3, 4, 5"):
        run(STEPS)
    assert contents(folder) == before


# ---- back to an earlier step


def test_back_to_an_earlier_step_and_nothing_is_lost(tmp_path, run, six, capfd):
    """The best model is of step 6: it goes with the steps after 2. The run ends as before."""
    folder = tmp_path / "run"
    shutil.copytree(six, folder)
    assert [step for step, best in records(folder, "best").items() if best][-1] == 6
    capfd.readouterr()
    fitted = run(STEPS, from_step=2)
    assert f"going back to step 2: the later checkpoints, metrics and samples are kept in {folder / 'aside' / '1'}" in (
        err := capfd.readouterr().err
    )
    assert "resuming after step 2" in err
    assert (fitted.step, fitted.best_step) == (6, 6)
    assert_same(state_of(folder), state_of(six))
    assert records(folder, "loss") == records(six, "loss")
    # what was set aside is a run, with its best model and its checkpoints
    aside = folder / "aside" / "1"
    assert Checkpoints(aside).steps() == [3, 4, 5, 6]
    assert (aside / "metrics.jsonl").read_bytes() == (six / "metrics.jsonl").read_bytes()
    for name in ("", "best", "checkpoints/3"):
        assert_same_params(gpt2_jax.load(aside / name)[1], gpt2_jax.load(six / name)[1])
    assert run(STEPS, name="run/aside/1").step == 6


def test_a_best_model_of_an_earlier_step_stays(tmp_path, run, data):
    """At a high learning rate the best step is the first one."""
    wild = small(steps=4, monitor=EVERY | {"keep": 9}, optimizer={"learning_rate": 3.0})
    best = run(wild).best_step
    assert best < 3
    before = contents(tmp_path / "run" / "best")
    fitted = run(wild, from_step=3)
    assert fitted.best_step == best
    assert contents(tmp_path / "run" / "best") == before
    # and one step further back, the best of the steps that are left is not there: the next evaluation is the best
    if best:
        assert run(wild, from_step=best).best_step == best


def test_a_best_model_that_was_set_aside_is_followed_by_the_next_best(tmp_path, run, six):
    folder = tmp_path / "run"
    shutil.copytree(six, folder)
    with failing(loop.Report, "step", KeyError("killed"), 2), pytest.raises(KeyError):
        run(STEPS, from_step=3)
    assert [step for step, best in records(folder, "best").items() if best][-1] == 4
    np.testing.assert_array_equal(gpt2_jax.load(folder)[1]["wte"], state_of(six, 4).params["wte"])


def test_a_step_without_a_checkpoint(tmp_path, run, six):
    folder = tmp_path / "run"
    shutil.copytree(six, folder)
    before = contents(folder)
    with pytest.raises(FileNotFoundError, match="has no checkpoint of step 9; available: steps 1, 2, 3, 4, 5, 6"):
        run(dataclasses.replace(STEPS, steps=9), from_step=9)
    damage(folder, 3)
    with pytest.raises(ValueError, match="checkpoints/3 is damaged"):
        run(STEPS, from_step=3)
    assert contents(folder).keys() == before.keys()
    assert run(STEPS, from_step=6).step == 6  # the newest: nothing is set aside
    assert not (folder / "aside").exists()
    with pytest.raises(FileNotFoundError, match="has no checkpoint of step 2; available: none"):
        run(STEPS, name="new", from_step=2)
