"""Checkpoints of training: restored bit for bit on any devices, also after kills, damage and full disks."""

import logging
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import commands
import forks
import jax
import jax.numpy as jnp
import killed_trainer
import numpy as np
import pytest
from strength import campaign
from train_states import OPTIMIZERS, SHAPES, abstract, assert_same, random_state

from gpt2_jax.checkpoints import parts
from gpt2_jax.checkpoints.integrity import DamagedError
from gpt2_jax.training.checkpoints import Checkpoints


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_state_comes_back_bit_for_bit(tmp_path, optimizer, capfd):
    state = random_state(3, optimizer)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(7, state)
    assert_same(Checkpoints(tmp_path / "run").restore(abstract(state)), state)
    assert capfd.readouterr() == ("", "")


def test_orbax_is_quiet_until_a_checkpoint_is_complete(tmp_path, monkeypatch):
    """Its threads warn at any moment, also between the calls that start and finish a save."""
    logger, noise = logging.getLogger("absl"), "Skipping merge of OCDBT checkpoints: there are none"
    warning = logger.makeRecord("absl", logging.WARNING, "file.py", 1, noise, (), None)
    monkeypatch.setattr(logger, "filters", [])  # a save that a test broke off has left its own
    (tmp_path / "run").mkdir()
    finish = parts.start_writing(tmp_path / "run" / "7", 7, {"params": {"a": jnp.ones(3)}})
    assert not logger.filter(warning)
    finish()
    assert logger.filter(warning)  # of another program


def test_without_shardings_it_comes_to_the_default_device(tmp_path):
    state = random_state(3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state)
    found = Checkpoints(tmp_path).restore(jax.eval_shape(lambda: state))
    assert_same(found, state)
    assert found.params["wte"].devices() == {jax.devices()[0]}


@pytest.mark.parametrize("name", ["a b", "r[1]n", "*", "ünï"])
def test_a_run_may_have_any_name(tmp_path, monkeypatch, name):
    state = random_state(5, lora=3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with Checkpoints(Path("~", name)) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.save(2, state)
    (tmp_path / "elsewhere").mkdir()
    relative = Checkpoints(name)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert_same(relative.restore(abstract(state)), state)


def test_the_arrays_may_go_as_soon_as_save_returns(tmp_path):
    shape = (1009, 331)
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 + 1, state), donate_argnums=0)
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for seed in range(4):
            state = random_state(seed, shapes={"wte": shape, "h0/attn/c_attn/w": shape})
            checkpoints.save(seed, state)
            if seed % 2:
                jax.block_until_ready(step(state))
            else:
                jax.tree.map(lambda leaf: leaf.delete(), state)
            jax.block_until_ready([jnp.full(shape, 7.0) for _ in range(9)])  # reuses the memory that was freed
    for seed in range(4):
        expected = random_state(seed, shapes={"wte": shape, "h0/attn/c_attn/w": shape})
        assert_same(Checkpoints(tmp_path).restore(abstract(expected), seed), expected)


def test_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (0, 9, 10, 200):
            checkpoints.save(step, random_state(step), wait=True)
            assert checkpoints.latest() == step
    assert Checkpoints(tmp_path).steps() == [10, 200]
    assert names(tmp_path) == {".lock", "10", "200"}
    state = random_state(10)
    assert_same(Checkpoints(tmp_path).restore(abstract(state), 10), state)


def test_a_step_saved_again_is_replaced(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, random_state(1))
        checkpoints.save(3, random_state(2))
    assert names(tmp_path) == {".lock", "3"}
    assert_same(Checkpoints(tmp_path).restore(abstract(random_state(2))), random_state(2))


def test_what_is_not_ours_stays(tmp_path):
    """A folder named like a step, a hidden folder, and a link named like an unfinished save: none was written here."""
    folder = tmp_path / "checkpoints"
    (tmp_path / "precious").mkdir()
    for name in ("5", ".5.old", "notes", "2024-11"):
        (folder / name).mkdir(parents=True)
        (folder / name / "notes.txt").write_text("three weeks of work")
    (folder / ".9.saving").symlink_to(tmp_path / "precious")
    (folder / ".7.saving").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert not (folder / ".7.saving").exists()
        checkpoints.save(6, random_state(6))
        checkpoints.save(8, random_state(8), wait=True)
        with pytest.raises(FileExistsError, match=r"checkpoints/5 is not a checkpoint"):
            checkpoints.save(5, random_state(5))
    assert all((folder / name / "notes.txt").exists() for name in ("5", ".5.old", "notes", "2024-11"))
    assert (tmp_path / "precious").exists()


def test_only_an_open_run_is_saved_in_and_only_one_process_opens_it(tmp_path):
    with pytest.raises(ValueError, match="with Checkpoints"):
        Checkpoints(tmp_path).save(1, random_state(1))
    with pytest.raises(ValueError, match="keep"):
        Checkpoints(tmp_path, keep=0)
    code = "import sys; from gpt2_jax.training.checkpoints import Checkpoints; Checkpoints(sys.argv[1]).__enter__()"
    with Checkpoints(tmp_path):
        done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert f"OSError: {tmp_path / 'checkpoints'} is open in another process" in done.stderr


def test_the_parts_are_what_others_read(tmp_path):
    from orbax.checkpoint import v1 as ocp

    state = random_state(3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state)
    host = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), state.params)
    read = ocp.load_checkpointables(tmp_path / "checkpoints" / "3", {"params": host})
    np.testing.assert_array_equal(
        read["params"]["h0"]["attn"]["c_attn"]["w"], state.params["h0"]["attn"]["c_attn"]["w"]
    )


# ---- what does not fit, or is damaged


OTHERS = {
    "another optimizer": (random_state(1, "lion"), "the optimizer of .* does not match", "opt_state/"),
    "another model": (random_state(1, shapes={"wte": (37, 8), "h1/w": (3, 3)}), "the model of", "missing: h1/w"),
    "with LoRA": (random_state(1, lora=3), "without LoRA", ""),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, other):
    state, what, names = OTHERS[other]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, random_state(1))
        checkpoints.wait()
        with pytest.raises(ValueError, match=what) as error:
            checkpoints.restore(abstract(state))
    assert names in str(error.value)
    assert "\n" not in str(error.value)


def test_lora_of_another_rank_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, random_state(1, lora=3))
    with pytest.raises(ValueError, match=r"the LoRA of .* float32\[8, 3\], expected float32\[8, 2\]"):
        Checkpoints(tmp_path).restore(abstract(random_state(1, lora=2)))
    with pytest.raises(ValueError, match="with LoRA"):
        Checkpoints(tmp_path).restore(abstract(random_state(1)))


def test_there_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no checkpoint; available: none"):
        Checkpoints(tmp_path).restore(abstract(random_state(1)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, random_state(1))
    with pytest.raises(FileNotFoundError, match="of step 3; available: steps 4"):
        Checkpoints(tmp_path).restore(abstract(random_state(1)), 3)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    run = tmp_path_factory.mktemp("two")
    with Checkpoints(run, keep=2) as checkpoints:
        checkpoints.save(1, random_state(1))
        checkpoints.save(2, random_state(2))
    return run


def test_damage_to_any_file_is_told(two, tmp_path, capfd):
    """A flipped bit, a cut or missing file: the message names the older checkpoint, which is read only on request."""
    rng, state = random.Random(7), abstract(random_state(2))
    files = sorted(path for path in (two / "checkpoints" / "2").rglob("*") if path.is_file())
    for path in [*rng.sample(files, 12), two / "checkpoints" / "2" / "checkpoint.json"]:
        whole = path.read_bytes()
        place = rng.randrange(len(whole)) if whole else 0
        flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] if whole else b"x"
        for damaged in (flipped, whole[:-1] if whole else b"y", None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(DamagedError, match=r"checkpoints/2 is damaged: .*; older checkpoints: steps 1$"):
                Checkpoints(two).restore(state)
        assert_same(Checkpoints(two).restore(state, 1), random_state(1))
        path.write_bytes(whole)
    assert_same(Checkpoints(two).restore(state), random_state(2))
    assert capfd.readouterr() == ("", "")


def test_a_half_deleted_checkpoint_is_told(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "1")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2" / "trainer")
    with pytest.raises(DamagedError, match="no older checkpoint"):
        Checkpoints(tmp_path / "run").restore(abstract(random_state(2)))


# ---- on other devices


ON_EIGHT = """
    import sys, json, jax
    from gpt2_jax.training.checkpoints import Checkpoints
    from train_states import *

    run, saved = sys.argv[1], int(sys.argv[2])
    state = random_state(5, "adafactor" if saved == 1 else "adamw", shapes=SHAPES | {"wte": (40, 8)})
    with Checkpoints(run, keep=9) as checkpoints:
        checkpoints.save(saved, on_mesh(state, saved), wait=True)
        for n in (1, 4, 8):
            there = on_mesh(state, n)
            found = checkpoints.restore(abstract(there), saved)
            assert_same(found, state)
            same = jax.tree.map(lambda a, b: a.sharding == b.sharding, found, there)
            assert all(jax.tree.leaves(same))
    part = found.params["wte"].addressable_shards[0].data.shape
    print(json.dumps(part))
"""


def test_saved_on_eight_devices_restored_on_one_and_four_and_the_reverse(tmp_path):
    for saved in (8, 1):
        code = textwrap.dedent(ON_EIGHT)
        assert commands.on_eight_devices(code, tmp_path, saved) in ([40, 1], [5, 8])
    state = random_state(5, shapes=SHAPES | {"wte": (40, 8)})
    assert_same(Checkpoints(tmp_path).restore(abstract(state), 8), state)  # in this process, of one device


# ---- what fails, or is killed


FAILING = """
    import json, pathlib, resource, sys
    from gpt2_jax.training.checkpoints import Checkpoints
    from train_states import *

    run, told = pathlib.Path(sys.argv[1]), []
    big = random_state(3, shapes={"wte": (1009, 101)})

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def attempt(act):
        try:
            act()
            told.append(None)
        except OSError as error:
            told.append(str(error))

    checkpoints = Checkpoints(run)
    checkpoints.__enter__()
    checkpoints.save(1, big, wait=True)
    limit(50_000)
    checkpoints.save(2, big)
    attempt(lambda: checkpoints.save(3, big))  # the error of 2
    attempt(checkpoints.wait)  # the error was raised already, and 3 was not started
    checkpoints.save(4, big)
    attempt(checkpoints.wait)
    checkpoints.save(5, big)
    attempt(checkpoints.close)

    def leave():
        with Checkpoints(run) as checkpoints:
            checkpoints.save(8, big)

    attempt(leave)
    try:
        with Checkpoints(run) as checkpoints:
            checkpoints.save(6, big)
            raise KeyError("of the loop")
    except KeyError as error:
        told.append([str(error), error.__notes__])
    limit(resource.RLIM_INFINITY)
    assert_same(Checkpoints(run).restore(abstract(big)), big)
    told.append(Checkpoints(run).steps())
    (run / "other").mkdir()
    (run / "other" / "checkpoints").write_text("a file")
    attempt(lambda: Checkpoints(run / "other").__enter__())
    with Checkpoints(run / "gone") as checkpoints:
        (run / "gone" / "checkpoints").rename(run / "gone" / "elsewhere")
        attempt(lambda: checkpoints.save(7, big))
        (run / "gone" / "checkpoints").write_text("a file")
        attempt(lambda: checkpoints.save(7, big))
    print(json.dumps(told))
"""


def test_an_error_in_the_background_is_told_once_and_hides_no_other(tmp_path):
    """RLIMIT_FSIZE simulates full disks; Python ignores its signal."""
    pytest.importorskip("resource")
    told = commands.on_eight_devices(FAILING, tmp_path)
    at_save, after, at_wait, at_close, at_end, (loops, notes), steps, no_folder, *gone = told
    for step, text in {2: at_save, 4: at_wait, 5: at_close, 8: at_end}.items():
        assert f"the checkpoint of step {step} could not be saved in {tmp_path / 'checkpoints'}: " in text
        assert "File too large" in text
        assert "\n" not in text
    assert after is None
    assert loops == "'of the loop'"
    assert len(notes) == 1
    assert "the checkpoint of step 6 could not be saved" in notes[0]
    assert steps == [1]
    assert "checkpoints" in no_folder
    for text, why in zip(gone, ("No such file or directory", "Not a directory"), strict=True):
        assert text == f"the checkpoint of step 7 could not be saved in {tmp_path / 'gone' / 'checkpoints'}: {why}"


def after(saves: float):
    """When to kill, in saves: 1.7 is some time after the first save was complete."""
    times = []

    def due(said) -> bool:
        times.extend(time.perf_counter() for _ in said[len(times) :])
        whole, n_told = int(saves), 2 + int(saves)  # one message when it is open, one when it starts, and one per save
        if len(times) < n_told:
            return False
        one = (times[n_told - 1] - times[1]) / whole if whole else 0.1
        return time.perf_counter() >= times[n_told - 1] + (saves - whole) * one

    return due


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a trainer for each round")
def test_killed_at_any_moment_the_newest_complete_checkpoint_is_there(tmp_path):
    rng, run, seen = random.Random(3), tmp_path / "run", set()
    moments = [{"operation": n} for n in campaign((0, 1, 2, 5), range(7))]
    moments += [{"until": after(rng.uniform(0.2, 1.6))} for _ in range(campaign(3, 13))]
    with forks.Forks("killed_trainer") as fork:
        for moment in moments:
            ended = fork(run=str(run), folder=run, **moment)
            assert ended.error == ""
            latest = Checkpoints(run).latest() or 0
            assert latest >= ended.said[-1]
            if latest:
                state = random_state(latest, shapes=killed_trainer.SHAPES)
                assert_same(Checkpoints(run).restore(abstract(state)), state)
            seen |= {"".join(c for c in name if not c.isdigit()) for name in names(run)}
    assert latest > campaign(2, 5)  # training continued
    assert any("saving" in name for name in seen)  # and was killed during saves
    with Checkpoints(run) as checkpoints:  # kills between saves and removals may leave several, which the next removes
        assert {name for name in names(run) if not name.isdigit()} == {".lock"}
        checkpoints.save(latest + 1, random_state(latest + 1, shapes=killed_trainer.SHAPES), wait=True)
        assert names(run) == {".lock", str(latest + 1)}
