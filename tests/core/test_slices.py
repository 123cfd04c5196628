"""`make_mesh` on TPUs, in one or several slices, and the processes' own parts of a mesh: with fake devices."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gpt2_jax import processes, sharding
from gpt2_jax.sharding import DATA, MODEL, make_mesh
from gpt2_jax.training import hosts


@dataclasses.dataclass(frozen=True, eq=False)
class Tpu:
    """A chip, as JAX describes it. `coords` are of its slice; four chips, 2 x 2, are of one process."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def slices(n, sizes=(4, 4)):
    """The chips of n slices, in JAX's order."""
    width, height = sizes
    n_each = width * height // 4
    chips = []
    for slice_index in range(n):
        for y, x in np.ndindex(height, width):
            process = slice_index * n_each + y // 2 * (width // 2) + x // 2
            chips.append(Tpu(len(chips), process, slice_index, (x, y, 0)))
    return chips


@pytest.fixture
def machine(monkeypatch):
    """Give call(chips): JAX finds them."""

    def call(chips):
        monkeypatch.setattr(jax, "devices", lambda: chips)
        monkeypatch.setattr(processes, "count", lambda: len({chip.process_index for chip in chips}))

    return call


@pytest.mark.parametrize("model", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_model_stays_within_a_slice_and_data_goes_across(n, model, machine):
    chips = slices(n)
    machine(chips)
    mesh = make_mesh(-1, model)
    assert mesh.axis_names == (DATA, MODEL)
    assert mesh.devices.shape == (16 * n // model, model)
    assert {*mesh.devices.flat} == {*chips}
    assert [chip.slice_index for chip in mesh.devices.flat] == sorted(chip.slice_index for chip in chips)


@pytest.mark.parametrize("model", [2, 4])
def test_neighbours_along_model_are_connected(model, machine):
    machine(slices(2))
    for row in make_mesh(-1, model).devices:
        steps = np.abs(np.diff([chip.coords for chip in row], axis=0)).sum(1)
        assert [*steps] == [1] * (model - 1)


@pytest.mark.parametrize(("n", "data", "model"), [(2, 1, 32), (3, 2, 24), (3, 1, 48)])
def test_a_model_axis_that_would_leave_a_slice_is_refused(n, data, model, machine):
    machine(slices(n))
    message = (
        f"^a mesh of data={data} times model={model} cannot be divided over {n} slices of TPUs, since model stays "
    )
    with pytest.raises(ValueError, match=message + f"within a slice: set data to a multiple of {n}$"):
        make_mesh(data, model)


def test_a_mesh_of_fewer_or_of_given_devices_keeps_their_order(machine):
    """As many of each process, and the caller's own list."""
    chips = slices(1)
    machine(chips)
    first = [min(chip.id for chip in chips if chip.process_index == index) for index in range(4)]
    assert [chip.id for chip in make_mesh(4, 1).devices.flat] == first
    assert [chip.id for chip in make_mesh(8, 2, chips[::-1]).devices.flat] == [*range(15, -1, -1)]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_other_devices_keep_their_order(platform, machine, monkeypatch):
    monkeypatch.setattr(sharding, "_on_torus", None)
    chips = [dataclasses.replace(chip, platform=platform) for chip in slices(2)]
    machine(chips)
    in_order = sorted(chips, key=lambda chip: chip.process_index)
    assert [*make_mesh(-1, 4).devices.flat] == in_order


@pytest.mark.parametrize(("rows", "shape"), [([0, 1], (2, 2)), ([0, 2], (1, 4)), ([1], (1, 2))])
def test_the_own_part_of_a_mesh_is_a_mesh(rows, shape, monkeypatch):
    """Rows 0 and 2 of a mesh are no rectangle of it."""
    owners = np.array([index in rows for index in range(3)]).repeat(2)
    chips = [dataclasses.replace(slices(1)[0], process_index=int(not own)) for own in owners]
    mesh = sharding.Mesh(np.array(chips).reshape(3, 2), (DATA, MODEL))
    monkeypatch.setattr(type(chips[0]), "client", SimpleNamespace(process_index=lambda: 0), raising=False)
    own = hosts.own_mesh(mesh)
    assert own.devices.shape == shape
    assert own.axis_names == (DATA, MODEL)
    assert [*own.devices.flat] == [chip for chip, mine in zip(chips, owners, strict=True) if mine]
