"""A save that is killed, or fails, leaves the old model or the new one, whole; what is not a model is not touched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import checkpoint_forms as forms
import numpy as np
import pytest
from checkpoint_forms import CONFIG, FORMATS

import gpt2_jax

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a saver for each round")
HELPER = Path(__file__).parents[1] / "support" / "killed_saver.py"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    forms.import_tensorflow()
    monkeypatch.setenv("GPT2_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


class Saver:
    """The helper process, and the directory it saves into in this form, in turn the models of seeds 1, 2, 3, ..."""

    def __init__(self, process, form: str, directory: Path):
        self.process, self.form, self.directory, self.seed = process, form, directory, 0

    def round(self, **how) -> dict:
        """Save the next model over the one there is; then whichever of the two the directory holds counts as there."""
        request = {"directory": str(self.directory), "seed": self.seed + 1, **how}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        held = self.held()
        assert held in (self.seed, self.seed + 1), (held, request, answer)
        self.moved, self.seed = held != self.seed, held
        return answer

    def held(self) -> int:
        """Which model the directory holds, whole; 0 when there is nothing."""
        if not self.directory.exists():
            return 0
        _, params = gpt2_jax.load(self.directory, keep_copy=False)
        for seed in (self.seed, self.seed + 1):
            if forms.difference(params, forms.random_model(seed=seed)) == "":
                return seed
        raise AssertionError("neither the old nor the new")


@pytest.fixture(scope="module", params=FORMATS)
def process(request):
    process = subprocess.Popen(
        [sys.executable, str(HELPER), request.param],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    with process:
        yield request.param, process
        process.stdin.close()


@pytest.fixture
def saver(process, tmp_path):
    saver = Saver(process[1], process[0], tmp_path / "folder" / "model")
    saver.directory.parent.mkdir()
    answer = saver.round()
    assert not answer["error"]
    assert saver.seed == 1
    return saver


def test_killed_at_random_moments(saver):
    """27 kills, from before the first file to after the last: the times are drawn, the claim holds at all of them."""
    seconds = saver.round()["seconds"]
    rng, rounds, killed, replaced = np.random.default_rng(3), 0, 0, 0
    while killed < 27 and rounds < 90:  # a save may be done before its time comes
        was_killed = saver.round(delay=float(rng.uniform(0, 1.1 * seconds)))["killed"]
        rounds, killed, replaced = rounds + 1, killed + was_killed, replaced + (was_killed and saver.moved)
    print(f"\n{saver.form}: killed {killed} times in {rounds} rounds, the new one was there {replaced} times")
    assert killed >= 25


def test_killed_before_each_file_operation(saver):
    """Every step between the first file and the last, one after the other: no moment is left out by chance."""
    events = saver.round()["events"]
    assert events >= 2, "nothing was watched"
    chosen = range(events) if events < 70 else sorted({*range(0, events, 3), *range(events - 20, events)})
    moved, killed = [], 0
    for event in chosen:
        killed += saver.round(event=event)["killed"]
        moved.append(saver.moved)
    assert killed > 0.9 * len(chosen)  # how many there are may differ by one or two where threads write
    assert not moved[0]
    print(f"\n{saver.form}: {events} file operations, {sum(moved)} of {len(moved)} kills left the new one")


def test_killed_where_nothing_was(saver, tmp_path):
    """The first save: nothing there, or the model whole."""
    events = saver.round()["events"]
    for event in range(0, events, 2):
        first = Saver(saver.process, saver.form, tmp_path / f"first-{event}" / "model")
        first.directory.parent.mkdir()
        first.round(event=event)


def test_a_save_that_cannot_write_leaves_the_old_and_no_litter(saver):
    """No file may grow beyond some bytes, as on a full disk: one sentence, and nothing beside the model."""
    for limit in (0, 100, 5_000, 9_000):
        before = sorted(saver.directory.rglob("*"))
        answer = saver.round(limit=limit)
        assert not saver.moved, limit
        assert [path.name for path in saver.directory.parent.iterdir()] == ["model"], limit
        assert sorted(saver.directory.rglob("*")) == before
        kinds, message = answer["error"]
        assert "OSError" in kinds, (limit, answer)
        assert str(saver.directory.parent) in message, message
        assert "\n" not in message
    assert not saver.round()["error"]
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
    """Other programs have a config.json, a `params` or a `checkpoint` too: what they hold is not ours to remove."""
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
    """A temporary folder's mode 0700 must not survive into a shared one: the user's umask decides."""
    umask = os.umask(0)
    os.umask(umask)
    assert model.stat().st_mode & 0o777 == 0o777 & ~umask
    for path in model.rglob("*"):
        assert path.stat().st_mode & 0o444 == 0o444 & ~umask, path.name
