"""A save that is killed or fails leaves the complete old or new model. Other files are not touched."""

import os
from pathlib import Path

import checkpoint_forms as forms
import forks
import numpy as np
import pytest
from checkpoint_forms import CONFIG, FORMATS
from strength import campaign

import gpt2_jax

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a saver for each round"),
    pytest.mark.usefixtures("own_cache"),
]


class Saver:
    """The forking process, and the directory that it saves into in one format: the models of seeds 1, 2, 3, ..."""

    def __init__(self, fork, form: str, directory: Path):
        self.fork, self.form, self.directory, self.seed = fork, form, directory, 0

    def round(self, **how) -> forks.Ended:
        """Save the next model over the present one. Afterwards, the present one is whichever the directory holds."""
        request = {"directory": str(self.directory), "seed": self.seed + 1, "form": self.form, **how}
        ended = self.fork(folder=self.directory.parent, **request)
        held = self.held()
        assert held in (self.seed, self.seed + 1), (held, request, ended)
        self.moved, self.seed = held != self.seed, held
        return ended

    def held(self) -> int:
        """Return the seed of the complete model in the directory, 0 if there is nothing."""
        if not self.directory.exists():
            return 0
        _, params = gpt2_jax.load(self.directory, keep_copy=False)
        for seed in (self.seed, self.seed + 1):
            if forms.difference(params, forms.random_model(seed=seed)) == "":
                return seed
        raise AssertionError("neither the old nor the new")


@pytest.fixture(scope="module", params=FORMATS)
def fork(request):
    with forks.Forks("killed_saver", request.param) as fork:
        yield request.param, fork


@pytest.fixture
def saver(fork, tmp_path):
    saver = Saver(fork[1], fork[0], tmp_path / "folder" / "model")
    saver.directory.parent.mkdir()
    assert not saver.round().error
    assert saver.seed == 1
    return saver


def test_killed_at_random_moments(saver):
    """Kills at random times, from before the first file to after the last."""
    wanted = campaign(2, 11)
    seconds = saver.round().seconds
    rng, rounds, killed, replaced = np.random.default_rng(3), 0, 0, 0
    while killed < wanted and rounds < 3 * wanted + 9:  # a save may end before its kill
        was_killed = saver.round(delay=float(rng.uniform(0, 1.1 * seconds))).killed
        rounds, killed, replaced = rounds + 1, killed + was_killed, replaced + (was_killed and saver.moved)
    print(f"\n{saver.form}: killed {killed} times in {rounds} rounds, the new one was there {replaced} times")
    assert killed > 0.9 * wanted


def test_killed_before_each_file_operation(saver):
    """Kills before each operation between the first and the last file, so that chance leaves none out."""
    events = saver.round().operations
    assert events >= 2, "nothing was watched"
    last = max(0, events - campaign(3, 20))  # where the new model replaces the old one
    chosen = sorted({*range(0, events, campaign(max(1, events // 2), 1 if events < 70 else 3)), *range(last, events)})
    moved, killed = [], 0
    for event in chosen:
        killed += saver.round(operation=event).killed
        moved.append(saver.moved)
    few = 4 if saver.form == "orbax" else 1  # the number of operations varies if threads write
    assert killed >= len(chosen) - few
    assert not moved[0]
    print(f"\n{saver.form}: {events} file operations, {sum(moved)} of {len(moved)} kills left the new one")


def test_killed_where_nothing_was(saver, tmp_path):
    """The first save: there is nothing, or the complete model."""
    events = saver.round().operations
    for event in range(0, events, campaign(max(2, events // 2), 2)):
        first = Saver(saver.fork, saver.form, tmp_path / f"first-{event}" / "model")
        first.directory.parent.mkdir()
        first.round(operation=event)


def test_a_save_that_cannot_write_leaves_the_old_and_no_litter(saver):
    """Files are limited to some bytes, as on a full disk: one sentence, and no other file beside the model."""
    for limit in campaign((100, 9_000), (0, 100, 5_000, 9_000)):
        before = sorted(saver.directory.rglob("*"))
        ended = saver.round(limit=limit)
        assert not saver.moved, limit
        assert [path.name for path in saver.directory.parent.iterdir()] == ["model"], limit
        assert sorted(saver.directory.rglob("*")) == before
        assert "OSError" in ended.kinds, (limit, ended)
        assert str(saver.directory.parent) in ended.error, ended
        assert "\n" not in ended.error
    assert not saver.round().error
    assert saver.moved


# ---- refused before anything is written


@pytest.fixture(params=FORMATS)
def form(request):
    return request.param


@pytest.fixture
def model(tmp_path, form):
    directory = tmp_path / "model"
    gpt2_jax.save(directory, CONFIG, forms.nested(forms.random_model(seed=1)), format=form)
    return directory


def snapshot(folder: Path) -> dict:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def test_params_of_another_config_are_refused(tmp_path, model, form):
    before, params = snapshot(tmp_path), forms.nested(forms.random_model())
    mixed = forms.nested(forms.random_model() | {"wpe": forms.random_model()["wpe"].astype(np.float16)})
    double = CONFIG.replace(param_dtype="float64")
    wrong = [
        (CONFIG.replace(n_layer=3), params, "h2/"), (CONFIG.replace(n_vocab=38), params, "wte"),
        (CONFIG.replace(param_dtype="bfloat16"), params, "bfloat16"), (CONFIG, mixed, "wpe"),
        (CONFIG, params | {"h2": params["h1"]}, "h2/"), (CONFIG, {}, "wte"),
        (double, forms.nested(forms.random_model(double)), "float64"),
    ]  # fmt: skip
    for config, tree, culprit in wrong:
        with pytest.raises(ValueError, match=culprit):
            gpt2_jax.save(model, config, tree, format=form)
    with pytest.raises(ValueError, match=r"tensorflow.*huggingface.*orbax"):
        gpt2_jax.save(model, CONFIG, params, format="pickle")
    assert snapshot(tmp_path) == before


def test_a_directory_of_other_things_is_not_touched(tmp_path, form):
    params = forms.nested(forms.random_model())
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "file").write_bytes(b"x")
    before = snapshot(tmp_path)
    for name in ("photos", "file"):
        with pytest.raises(FileExistsError, match=name) as error:
            gpt2_jax.save(tmp_path / name, CONFIG, params, format=form)
        assert "\n" not in str(error.value)
    assert snapshot(tmp_path) == before
    (tmp_path / "empty").mkdir()
    gpt2_jax.save(tmp_path / "empty", CONFIG, params, format=form)
    forms.assert_loads_as(tmp_path / "empty", CONFIG, forms.random_model())


@pytest.mark.parametrize("name", ["config.json", "checkpoint", "params/step7.npz", "checkpoint/step7/params.npz"])
def test_names_that_a_model_has_do_not_make_one(tmp_path, form, name):
    """Other programs also write config.json, `params` or `checkpoint`. Their files must not be removed."""
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_bytes(b"three weeks of work")
    with pytest.raises(FileExistsError, match="run"):
        gpt2_jax.save(tmp_path / "run", CONFIG, forms.nested(forms.random_model()), format=form)
    assert (tmp_path / "run" / name).read_bytes() == b"three weeks of work"


def test_a_users_file_in_a_model_directory_is_not_lost(model, form):
    (model / "notes.txt").write_text("three weeks of work")
    try:
        gpt2_jax.save(model, CONFIG, forms.nested(forms.random_model(seed=2)), format=form)
    except FileExistsError:
        forms.assert_loads_as(model, CONFIG, forms.random_model(seed=1))
    assert (model / "notes.txt").read_text() == "three weeks of work"


def test_a_link_to_a_model_stays_one_or_is_replaced_whole(tmp_path, model, form):
    (tmp_path / "link").symlink_to(model, target_is_directory=True)
    flat = forms.random_model(seed=2)
    gpt2_jax.save(tmp_path / "link", CONFIG, forms.nested(flat), format=form)
    forms.assert_loads_as(tmp_path / "link", CONFIG, flat)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "link"}
    gpt2_jax.load(model)


def test_what_was_written_can_be_read_by_others(model):
    """The saved folder must not keep the mode 0700 of a temporary folder. The user's umask sets the mode."""
    umask = os.umask(0)
    os.umask(umask)
    assert model.stat().st_mode & 0o777 == 0o777 & ~umask
    for path in model.rglob("*"):
        assert path.stat().st_mode & 0o444 == 0o444 & ~umask, path.name
