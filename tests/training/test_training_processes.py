"""`fit` in several processes that JAX connects: the same numbers and files as in one, on meshes over all of them."""

import json
import math
import re
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import several
import tiny_runs
from several_fit import recipe_of
from strength import campaign

import gpt2_jax
from gpt2_jax import processes, sharding
from gpt2_jax.params import flatten
from gpt2_jax.training import fit, hosts, make_plan, prepare
from gpt2_jax.training.checkpoints import Checkpoints

N_STEPS = campaign(12, 40)
STOPPED = 4  # the last process gets SIGTERM after this step
QUIET = {"evaluate_every": 0, "sample_every": 0, "save_every": 3, "tensorboard": False}
FULL_DISK = {"model": {"n_embd": 48}, "monitor": QUIET}  # the vocabulary's files are smaller than a checkpoint's


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Give call(shape, {name: job}) -> the lines of each process; shape "2x1" is two processes of one device.

    A job is the changes of the recipe; its run is the folder `start.base / name`. More entries are of `several_fit`.
    """
    base = tmp_path_factory.mktemp("runs")
    (base / "text.txt").write_text(tiny_runs.TEXT)

    def jobs_of(jobs):
        for name, (changes, *rest) in jobs.items():
            recipe = {"steps": N_STEPS, **changes, "data": {"path": str(base / "text.txt")}}
            yield {"run": str(base / name.split()[0]), "recipe": recipe, **(rest[0] if rest else {})}

    def processes_of(shape, jobs):
        n, n_devices = map(int, shape.split("x"))
        return several.started("several_fit", json.dumps(list(jobs_of(jobs))), n=n, n_devices=n_devices)

    def call(shape, jobs):
        with processes_of(shape, jobs) as all_of_them:
            return several.ended(all_of_them)

    call.base, call.processes_of = base, processes_of
    return call


@pytest.fixture(scope="module")
def one(start):
    """Start one process of four devices."""
    jobs = {"one": [{"monitor": {"prompts": ["The "]}}], "one64": [{"compute_dtype": "float64", "monitor": QUIET}]}
    start("1x4", jobs)
    return start.base


@pytest.fixture(scope="module")
def two(start, one):
    """Start two processes of two devices."""
    jobs = {"two": [{"monitor": {"prompts": ["The "]}}], "two64": [{"compute_dtype": "float64"}]}
    return start("2x2", jobs)


@pytest.fixture(scope="module")
def four(start, one):
    """Start four processes of one device. The third run of theirs is divided along `model`; the last one is stopped."""
    jobs = {
        "four": [{"monitor": QUIET}],
        "four64": [{"compute_dtype": "float64", "monitor": QUIET}],
        "model": [{"mesh": {"data": 1, "model": 4}, "monitor": {"prompts": ["The "]}}],
        "stopped": [{"monitor": QUIET}, {"stop_after": STOPPED}],
    }
    return start("4x1", jobs)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def losses(run):
    """{(step, name): loss} in the order of the file."""
    names = ("loss", "val_loss")
    return {(line["step"], name): line[name] for line in lines(run / "metrics.jsonl") for name in names if name in line}


def furthest(run, other):
    """The largest difference of two runs' training losses."""
    ours, theirs = ({step: loss for (step, name), loss in losses(x).items() if name == "loss"} for x in (run, other))
    assert list(ours) == list(theirs) == list(range(1, N_STEPS + 1))
    return max(abs(ours[step] - theirs[step]) for step in ours)


def files_of(run):
    """The names of a run's files. Orbax's and TensorBoard's names depend on the devices and the time."""
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    return {re.sub(r"((params|trainer)/|events\.).*", r"\1", name) for name in names}


def assert_same_runs(base, run):
    """Losses, samples, files and the best model are those of one process."""
    assert furthest(base / run, base / "one") < 2e-6  # 9.6e-7
    ours, theirs = losses(base / run), losses(base / "one")
    assert list(ours) == list(theirs)
    assert max(abs(ours[at] - theirs[at]) for at in ours) < 2e-6
    assert files_of(base / run) == files_of(base / "one")
    best = [flatten(gpt2_jax.load(base / name / "best")[1]) for name in (run, "one")]
    for name, leaf in best[0].items():
        np.testing.assert_allclose(leaf, best[1][name], rtol=0, atol=2e-5, err_msg=name)
    assert len([*(base / run).glob("tensorboard/events*")]) == 1
    assert (base / run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_two_processes_train_as_one(two, one):
    assert_same_runs(one, "two")
    assert lines(one / "two" / "samples.jsonl") == lines(one / "one" / "samples.jsonl")
    assert len(lines(one / "two" / "samples.jsonl")) == math.ceil(N_STEPS / 6)  # also after the last step
    assert two[0] == two[1]  # all processes return the same
    assert [json.loads(line)["step"] for line in two[0]] == [N_STEPS] * 2


def test_four_processes_train_as_one(four, one):
    assert furthest(one / "four", one / "one") < 2e-6  # 9.6e-7
    assert four[0] == four[1] == four[2] == four[3]


def test_heads_are_divided_over_processes(four, one):
    assert_same_runs(one, "model")
    assert lines(one / "model" / "samples.jsonl") == lines(one / "one" / "samples.jsonl")


def test_in_float64_nothing_but_the_order_of_sums_differs(two, four, one):
    assert furthest(one / "two64", one / "one64") < 1e-12  # 8.9e-16
    assert furthest(one / "four64", one / "one64") < 1e-12  # 8.9e-16


def test_a_signal_to_one_process_stops_all_after_the_same_step(four, one):
    ends = [json.loads(printed[-1]) for printed in four]
    assert all(end == ends[0] for end in ends)
    assert ends[0]["signal"] == "SIGTERM"
    assert STOPPED <= ends[0]["step"] <= STOPPED + 3


def test_a_run_of_four_goes_on_in_one_and_in_two(four, one, start):
    shutil.copytree(one / "stopped", one / "resumed")
    step = json.loads(four[0][-1])["step"]
    assert max(int(path.name) for path in (one / "resumed" / "checkpoints").glob("[0-9]*")) == step
    ((printed,),) = start("1x1", {"resumed": [{"monitor": QUIET}, {"stop_after": step + 1}]})
    assert step < json.loads(printed)["step"] < N_STEPS
    first, second = start("2x1", {"resumed": [{"monitor": QUIET}]})
    assert first == second
    assert json.loads(first[0])["step"] == N_STEPS
    assert furthest(one / "resumed", one / "one") < 2e-6


def test_an_error_ends_all_with_the_same_sentence(start, one):
    """Of process 0, which alone holds the lock, and of a save in any process. Orbax would wait for it for minutes."""
    shutil.copytree(one / "one", one / "settled")
    with Checkpoints(one / "one"):
        jobs = {"one in use": [{}], "settled other": [{"batch_size": 4}], "mesh": [{"mesh": {"data": 1}}]}
        jobs["full1"] = [FULL_DISK, {"largest_file": [1, 60_000]}]
        jobs["full0"] = [FULL_DISK, {"largest_file": [0, 60_000]}]
        with start.processes_of("2x1", jobs) as both:
            for said in (
                f"OSError: {one / 'one' / 'checkpoints'} is open in another process",
                f"ValueError: {one / 'settled'} holds a run with other settings: recipe.batch_size was 8 and is 4",
                "ValueError: a mesh of data=1 times model=1 cannot be divided equally over 2 processes",
                f"OSError: the checkpoint of step 3 could not be saved in {start.base / 'full1' / 'checkpoints'}: File",
                f"OSError: the checkpoint of step 3 could not be saved in {start.base / 'full0' / 'checkpoints'}: File",
            ):
                first, second = (process.wait_for(said) for process in both)
                assert first == second
                assert first.startswith(said)


@pytest.mark.parametrize(
    ("own", "data", "model", "expected"),
    [
        ((4, 4), 8, 1, [0, 1, 2, 3, 4, 5, 6, 7]),
        ((4, 4), 2, 2, [0, 1, 4, 5]),  # two devices of each
        ((4, 4), 2, 4, [0, 1, 2, 3, 4, 5, 6, 7]),
        ((2, 2, 2, 2), 2, 4, [0, 1, 2, 3, 4, 5, 6, 7]),  # `model` over two processes each
        ((3, 2), 2, 2, [0, 1, 3, 4]),
        ((4, 4), 3, 1, "cannot be divided equally over 2 processes: set its size to a multiple of 2"),
        ((6, 6), 3, 4, "has 6 devices in each of 2 processes, which model=4 does not fit"),
        ((3, 1), 4, 1, "needs 2 devices in each of 2 processes, but one of them has 1"),
    ],
)
def test_a_mesh_has_as_many_devices_of_each_process(own, data, model, expected, monkeypatch):
    owners = [index for index, n in enumerate(own) for _ in range(n)]
    devices = [SimpleNamespace(id=number, process_index=owner) for number, owner in enumerate(owners)]
    monkeypatch.setattr(processes, "count", lambda: len(own))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=f"^a mesh of data={data} times model={model} {expected}"):
            sharding._of_each_process(devices, data, model)
    else:
        found = sharding._of_each_process(devices, data, model)
        assert [device.id for device in found] == expected


def test_a_mesh_that_leaves_a_process_without_devices_is_refused(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    mesh = sharding.Mesh(np.array(sharding.jax.devices()[:1]).reshape(1, 1), (sharding.DATA, sharding.MODEL))
    with pytest.raises(ValueError, match=r"^process 1 has no device of the mesh"):
        make_plan(tiny_runs.CONFIG, tiny_runs.small(), mesh)


def test_one_process_runs_nothing_of_this(tmp_path, tokenizer, monkeypatch):
    def fail(*_args):
        raise AssertionError("only several processes need this")

    for module, name in ((hosts, "put"), (hosts, "gathered"), (hosts, "on_own_devices"), (hosts, "CommonStop")):
        monkeypatch.setattr(module, name, fail)
    monkeypatch.setattr(processes, "_client", fail)
    (tmp_path / "text.txt").write_text(tiny_runs.TEXT)
    data = prepare([tmp_path / "text.txt"], tmp_path / "tokens", tokenizer, val_fraction=0.2, split="tail", shown=False)
    monitor = {"evaluate_every": 2, "save_every": 2, "sample_every": 2, "sample_tokens": 2, "prompts": [""]}
    plan = make_plan(tiny_runs.CONFIG, tiny_runs.small(monitor=monitor | {"tensorboard": False}))
    with mock.patch("gpt2_jax.training.loop.plot_curve"):
        assert fit(plan, tiny_runs.params(), data, tmp_path / "run", tokenizer).step == 4


def test_the_jobs_have_dropout_and_accumulation():
    recipe = recipe_of({})
    assert recipe.model.dropout > 0
    assert recipe.accumulate > 1
