"""A run begins without a second copy of the params, on the host or on the devices."""

import commands
import jax
import numpy as np
import pytest
import tiny_models
import tiny_runs
from host_memory import beside_the_shards

import gpt2_jax
from gpt2_jax import training
from gpt2_jax.commands import train
from gpt2_jax.params import flatten
from gpt2_jax.training import loop

CONFIG = gpt2_jax.GPT2Config(n_vocab=1281, n_ctx=13, n_embd=640, n_head=2, n_layer=2)
LARGEST = 4 * 640 * 4 * 640  # c_fc
BOUND = 1.3

EIGHT = """
    import json, math, sys
    import jax, numpy as np
    import gpt2_jax, tiny_runs
    from gpt2_jax import training
    from gpt2_jax.params import flatten
    from host_memory import beside_the_shards

    def on_devices(arrays):
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize * len(leaf.sharding.device_set)
            for leaf in arrays
        )

    plain = flatten(gpt2_jax.load(sys.argv[1])[1])
    plain = {name: np.array(leaf) for name, leaf in plain.items()}
    recipe = tiny_runs.small(batch_size=8, mesh={"data": 4, "model": 2}, model={"source": sys.argv[1], "dropout": 0.0})
    before = jax.live_arrays()
    with beside_the_shards() as loading:
        plan, params, _ = training.start_model(recipe)
    params = flatten(params)
    wrong = [name for name, leaf in params.items() if leaf.sharding != flatten(plan.state.params)[name].sharding]
    with beside_the_shards() as beginning:
        state = training.init_state(plan, gpt2_jax.params.unflatten(params), donate=True)
    there = {id(array) for array in before}
    live = on_devices(array for array in jax.live_arrays() if id(array) not in there)
    wrong += [name for name, leaf in params.items() if not leaf.is_deleted()]
    wrong += [name for name, leaf in flatten(state.params).items() if not np.array_equal(leaf, plain[name])]
    print(json.dumps([loading[0], beginning[0], wrong, live - on_devices(jax.tree.leaves(state))]))
"""


def test_from_disk_to_the_state_of_eight_devices(tmp_path, tokenizer):
    """Measured: 1.2 of the largest tensor while the model is loaded, and 0.1 when the state is made."""
    gpt2_jax.save(tmp_path, CONFIG, tiny_models.random_params(CONFIG, 3), "huggingface", tokenizer)
    loading, beginning, wrong, beside_the_state = commands.on_eight_devices(EIGHT, tmp_path)
    assert wrong == []
    assert loading < BOUND * LARGEST
    assert beginning < BOUND * LARGEST
    assert beside_the_state < 1_000  # keys and counters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_params_of_a_caller_are_copied_one_after_the_other(dtype):
    """Measured: 0.7 of the largest array in bfloat16, whose copies are float32."""
    flat = flatten(tiny_models.random_params(CONFIG.replace(param_dtype=dtype), 3))
    params = gpt2_jax.params.unflatten({name: np.array(leaf) for name, leaf in flat.items()})
    plan = training.make_plan(CONFIG, tiny_runs.small())
    with beside_the_shards() as peak:
        state = training.init_state(plan, params)
    assert peak[0] < BOUND * LARGEST
    for name, leaf in flatten(state.params).items():
        np.testing.assert_array_equal(leaf, flatten(params)[name].astype(np.float32), strict=True)
    before = np.array(state.params["wte"])
    flatten(params)["wte"][:] = 0
    np.testing.assert_array_equal(state.params["wte"], before)


@pytest.mark.parametrize("donate", [False, True])
def test_params_are_deleted_only_if_they_are_donated(donate):
    params = jax.tree.map(jax.numpy.asarray, tiny_runs.params())
    plan = training.make_plan(tiny_runs.CONFIG, tiny_runs.small())
    state = training.init_state(plan, params, donate)
    assert {leaf.is_deleted() for leaf in jax.tree.leaves(params)} == {donate}
    jax.tree.map(np.testing.assert_array_equal, state.params, tiny_runs.params())


def test_the_command_keeps_no_second_copy_during_training(tmp_path, tokenizer, monkeypatch):
    """All that is alive when the first step is made: the state."""
    gpt2_jax.save(tmp_path / "model", tiny_runs.CONFIG, tiny_runs.params(), "huggingface", tokenizer)
    (tmp_path / "text.txt").write_text(tiny_runs.TEXT)
    before, bytes_there = {id(array) for array in jax.live_arrays()}, []
    make = loop.lower_train_step

    def lower_train_step(plan):
        alive = [array for array in jax.live_arrays() if id(array) not in before]
        bytes_there.append(sum(array.nbytes for array in alive))
        bytes_there.append(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(plan.state)))
        return make(plan)

    monkeypatch.setattr(loop, "lower_train_step", lower_train_step)
    options = {
        "model.source": tmp_path / "model", "data.path": tmp_path / "text.txt", "run": tmp_path / "run",
        "steps": 1, "batch-size": 2, "data.n-tokens": 11,
    }  # fmt: skip
    with tiny_runs.compiled_once(tmp_path / "cache"):
        train.main([f"--{name}={value}" for name, value in options.items()] + ["--monitor.no-tensorboard"])
    alive, state = bytes_there
    assert state <= alive < state + 1_000
