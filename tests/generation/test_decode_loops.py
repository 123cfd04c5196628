"""What decoding does otherwise on a GPU than on a CPU: a loop of fixed length, and keys in another order in memory."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from fake_models import N_SAID, TEXT_CONFIG, speaker
from jax.extend.mlir import ir
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from strength import campaign
from tiny_models import CONFIG, random_params

import gpt2_jax
from gpt2_jax import research
from gpt2_jax.changes import NO_CHANGES
from gpt2_jax.generation import Settings, engine, programs
from gpt2_jax.generation.memory import RECENT

KINDS = {
    "greedy": {"temperature": 0.0, "top_k": 3},
    "draw": {"min_p": 0.01, "repetition_penalty": 1.2},
    "filtered": {"top_k": 11, "top_p": 0.9},
}


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0)


@pytest.fixture
def both(monkeypatch):
    """Return a function that calls another one twice, with each loop."""

    def call(function):
        results = []
        for devices in ((), ("cpu",)):
            monkeypatch.setattr(engine, "FIXED_STEPS", devices)
            results.append(function())
        return results

    return call


# ---- the same results


def some_call(rng):
    """Prompts of 1 to 23 ids, and settings of any kind, with slides, stops, edits and log-probabilities."""
    prompts = [rng.integers(0, CONFIG.n_vocab, rng.integers(1, 24)).tolist() for _ in range(4)]
    prompts.append([5] * 23)
    arguments = dict(KINDS[rng.choice(list(KINDS))])
    arguments["seed"] = int(rng.integers(2**32))
    arguments["stop_ids"] = rng.choice(CONFIG.n_vocab, rng.integers(0, 5), replace=False).tolist()
    arguments["logprobs"] = 2 if rng.random() < 0.7 else None
    arguments["edits"] = research.scale("h0/mlp/out", float(rng.choice([0.5, 1])), positions=slice(0, 9))
    if rng.random() < 0.5:
        return prompts, arguments | {"max_new_tokens": int(rng.integers(60, 70)), "overflow": "slide"}
    return prompts, arguments | {"max_new_tokens": int(rng.integers(1, 19))}


def test_both_loops_give_the_same_rows_and_logprobs(params, both):
    """Random calls: ragged rows, windows that slide, rows that stop, calls of 1 to 16 steps. All ids are equal.

    Log-probabilities are equal bit for bit, unless windows slide. After a slide, the loops move tokens into the long
    cache at different steps, so sums over the two parts differ in rounding: measured 1.7e-6.
    """
    rng = np.random.default_rng(1)
    for case in range(campaign(12, 100)):
        prompts, arguments = some_call(rng)
        early, fixed = both(lambda: gpt2_jax.generate(CONFIG, params, prompts, **arguments))  # noqa: B023
        if not isinstance(early, tuple) or "overflow" not in arguments:
            assert as_lists(early) == as_lists(fixed), (case, arguments)
            continue
        assert early[0] == fixed[0], (case, arguments)
        for one, other in zip(early[1], fixed[1], strict=True):
            np.testing.assert_allclose(one.chosen, other.chosen, rtol=0, atol=4e-6)
            np.testing.assert_allclose(one.top, other.top, rtol=0, atol=4e-6)


def as_lists(result):
    """What `generate` returns, without NumPy arrays."""
    if not isinstance(result, tuple):
        return result
    ids, logprobs = result
    return ids, [[array.tolist() for array in dataclasses.astuple(row)] for row in logprobs]


def test_streams_of_both_loops_are_the_same_text(tokenizer, both):
    params = speaker(tokenizer.encode("Now is the winter of our discontent. " * 20))
    for settings in ({}, {"stop_strings": ["discontent"]}, {"max_new_tokens": 7}):
        arguments = {"max_new_tokens": N_SAID} | settings
        early, fixed = both(lambda: list(gpt2_jax.stream(TEXT_CONFIG, params, [1], tokenizer, **arguments)))  # noqa: B023
        assert "".join(early) == "".join(fixed) != ""


def test_a_call_of_the_fixed_loop_always_asks_for_all_steps(tokenizer, both):
    """A stream asks for 4 steps a call where a call may end early, and for 16 where it may not."""
    params = speaker(tokenizer.encode("Now is the winter of our discontent. " * 20))
    early, fixed = both(lambda: list(gpt2_jax.stream(TEXT_CONFIG, params, [1], tokenizer, 65)))
    assert len(early) > 2 * len(fixed) > 4


def test_a_call_after_a_short_one_writes_no_slot_twice(params, both):
    """A row ends in the call of 6 steps that fills its window. The other goes on, with 6 tokens in the recent part."""
    settings = Settings(60, temperature=0.0, overflow="slide").check(CONFIG)
    prompts = [np.arange(35), np.array([7])]

    def ids_of_the_other():
        finished_B, ids = np.zeros(2, bool), []
        for picked in engine.decode_rows(gpt2_jax.GPT2(CONFIG), params, prompts, settings, finished_B):
            ids += picked.id_BR[1].tolist()
            finished_B[0] = len(ids) >= 7
        return ids

    early, fixed = both(ids_of_the_other)
    assert early == fixed
    assert len(fixed) == 60


# ---- what a turn after the last step does


def begun(params, kind="filtered", length=9):
    """Return the arguments of `decode` up to n_steps, for three rows of `length`, 1 and `length` tokens."""
    settings = Settings(64, overflow="slide", **KINDS[kind]).check(CONFIG)
    prompts = [np.arange(length) % 37, np.array([7]), np.arange(length)[::-1] % 37]
    batch = engine._Batch(gpt2_jax.GPT2(CONFIG), params, prompts, settings, NO_CHANGES)
    batch.first(0)
    done_B = np.array([False, True, False, True])
    return batch.model, params, NO_CHANGES, batch.past, batch.state, done_B, batch.sampling, batch.stop_ids


def real_part(cache):
    """The contents of the slots that hold tokens."""
    k = [np.where(cache.mask_BS[:, None, None], k_BNHS, 0) for k_BNHS in cache.k_BNHS]
    v = [np.where(cache.mask_BS[:, None, :, None], v_BNSH, 0) for v_BNSH in cache.v_BNSH]
    return k, v, cache.mask_BS, cache.length


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_steps", [1, 5, 15, 16])
def test_turns_after_the_last_step_change_nothing(params, kind, n_steps):
    """State, tokens and both parts of the cache are the same bit for bit, before and after `merge_recent`. All ids that
    the steps do not pick are stop ids, so a row would end in a later turn."""
    _, picked = programs.decode(*begun(params, kind), np.int32(n_steps), 2)
    stop_ids = np.full(CONFIG.n_vocab, -2, np.int32)
    others = np.setdiff1d(np.arange(CONFIG.n_vocab), np.asarray(picked.id_BR)[:, :n_steps])
    stop_ids[: len(others)] = others
    found = []
    for fixed in (False, True):
        arguments = (*begun(params, kind)[:-1], stop_ids)
        state, picked = programs.decode(*arguments, np.int32(n_steps), 2, fixed)
        rest = jax.tree.map(np.asarray, (real_part(state.recent), state.token_B, state.seen_BV, state.done_B))
        picked = jax.tree.map(lambda array: np.asarray(array)[[0, 2], :n_steps], picked)
        n_new = int(state.n_new)
        assert n_new == 1 + n_steps
        past, recent = programs.merge_recent(arguments[3], state.recent)
        found.append((rest, picked, n_new, jax.tree.map(np.asarray, real_part(past)), int(recent.length)))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_both_loops_stop_when_all_rows_have(params):
    """Stop ids that end all rows in the third step: no later step counts."""
    model, _, edits, past, state, done_B, sampling, _ = begun(params, "greedy")
    _, picked = programs.decode(
        model, params, edits, past, state, done_B, sampling, np.full(16, -2, np.int32), 16, None
    )
    ids = np.asarray(picked.id_BR)[[0, 2]]
    stops = np.resize(ids[:, 2], 16).astype(np.int32)
    first = max(int(np.flatnonzero(np.isin(row, stops))[0]) for row in ids)
    for fixed in (False, True):
        arguments = begun(params, "greedy")
        state, _ = programs.decode(*arguments[:-1], stops, np.int32(16), None, fixed)
        assert int(state.n_new) - 2 == first
        assert int(state.recent.length) == 1 + first
        assert np.asarray(state.done_B).all()


def test_no_turn_computes_nan(params):
    """The rows reach n_ctx in the third step. A token after it would be NaN, and NaN times 0 is NaN."""
    arguments = begun(params, length=CONFIG.n_ctx - 3)
    state, _ = programs.decode(*arguments, np.int32(3), None, True)
    assert state.recent.n_slots == RECENT
    for leaf in jax.tree.leaves((state.recent.k_BNHS, state.recent.v_BNSH)):
        assert np.isfinite(leaf).all()


# ---- the program for a GPU


def operations(lowered):
    """Return all operations of a lowered program."""
    found = []

    def note(operation):
        found.append(operation)
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(note)
    return found


def trip_count(loop):
    """Return the turns of a `while` that compares one of its values with a constant; None if it does something else."""
    condition = loop.regions[0].blocks[0]
    compare = condition.operations[len(condition.operations) - 1].operands[0].owner
    if getattr(compare, "name", None) != "stablehlo.compare":
        return None
    counter, limit = compare.operands
    if counter not in list(condition.arguments) or getattr(limit.owner, "name", None) != "stablehlo.constant":
        return None
    return ir.DenseIntElementsAttr(limit.owner.attributes["value"])[0]


@pytest.mark.parametrize(("kind", "loops"), [("greedy", [16]), ("draw", [16]), ("filtered", [16, 16, 16])])
@pytest.mark.parametrize("n_top", [None, 3])
def test_a_gpu_never_waits_for_the_host_within_a_call(params, kind, loops, n_top):
    """The program lowered for CUDA has no conditional, and the number of turns of each loop is a constant: 16 steps,
    and 16 passes for each of the two thresholds of a step. XLA does not wait in such loops."""
    arguments = begun(params, kind)
    traced = programs.decode.trace(*arguments, np.int32(3), n_top, True)
    found = operations(traced.lower(lowering_platforms=("cuda",)))
    names = [operation.name for operation in found]
    assert "stablehlo.dot_general" in names  # the whole program
    assert not {"stablehlo.case", "stablehlo.if"} & set(names)
    assert [trip_count(operation) for operation in found if operation.name == "stablehlo.while"] == loops
    early = operations(programs.decode.trace(*arguments, np.int32(3), n_top).lower(lowering_platforms=("cuda",)))
    assert None in [trip_count(operation) for operation in early if operation.name == "stablehlo.while"]


# ---- the order of keys in memory

ON_A_GPU = programs.KEY_LAYOUTS["gpu"]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(programs, "KEY_LAYOUTS", {"cpu": ON_A_GPU})


def order(array):
    return array.format.layout.major_to_minor


def test_both_orders_give_the_same_rows(params, monkeypatch):
    """Random calls with slides, stops and edits, bit for bit: a CPU can store the keys in either order."""
    rng = np.random.default_rng(4)
    for case in range(campaign(6, 60)):
        prompts, arguments = some_call(rng)
        found = []
        for layouts in ({}, {"cpu": ON_A_GPU}):
            monkeypatch.setattr(programs, "KEY_LAYOUTS", layouts)
            found.append(as_lists(gpt2_jax.generate(CONFIG, params, prompts, **arguments)))
        assert found[0] == found[1], (case, arguments)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_long_keys_keep_their_order(params):
    """From the empty cache on, after a prefill and after a merge. All programs update it in place."""
    settings = Settings(64, overflow="slide").check(CONFIG)
    batch = engine._Batch(gpt2_jax.GPT2(CONFIG), params, [np.arange(9), np.array([7])], settings, NO_CHANGES)
    batch.first(0)
    for _ in range(2):
        assert {order(k_BNHS) for k_BNHS in batch.past.k_BNHS} == {ON_A_GPU.major_to_minor}
        assert {order(v_BNSH) for v_BNSH in batch.past.v_BNSH} == {(0, 1, 2, 3)}
        before = batch.past.k_BNHS[0]
        batch.decode(3, np.zeros(2, bool))
        batch.make_room(np.zeros(2, bool))
        assert before.is_deleted()


@pytest.mark.usefixtures("as_on_a_gpu")
def test_decode_reads_the_keys_as_they_are_stored(params):
    """Without a copy of an argument in another order, whichever order the program prefers inside."""
    arguments = begun(params)
    compiled = programs.decode.lower(*arguments, np.int32(3), None).compile()
    assert {order(k_BNHS) for k_BNHS in arguments[3].k_BNHS} == {ON_A_GPU.major_to_minor}
    past = compiled.input_formats[0][2]  # after params and edits
    assert {k.layout.major_to_minor for k in past.k_BNHS} == {ON_A_GPU.major_to_minor}


def test_only_gpus_have_another_order(monkeypatch):
    """One GPU, or several with a mesh; and without a mesh, XLA decides how the cache is divided and stored."""

    class Device:
        def __init__(self, platform):
            self.platform = platform

    class Leaf:
        def __init__(self, *platforms):
            self.sharding = SimpleNamespace(device_set={Device(platform) for platform in platforms})

    model, mesh = gpt2_jax.GPT2(CONFIG), Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    on_cpu = jax.device_put(np.zeros(3))
    for leaf in (on_cpu, Leaf("tpu"), Leaf("gpu", "gpu"), Leaf("cpu", "cpu")):
        assert programs.cache_formats(model, {"w": leaf}, 2) is None
    assert programs.in_format(programs.place, None) is programs.place
    divided = gpt2_jax.GPT2(CONFIG, mesh=mesh)
    formats = programs.cache_formats(divided, {"w": on_cpu}, 2)
    assert formats.keys == formats.values == NamedSharding(mesh, PartitionSpec())
    monkeypatch.setitem(programs.KEY_LAYOUTS, "cpu", ON_A_GPU)
    formats = programs.cache_formats(divided, {"w": on_cpu}, 2)
    assert formats.keys.layout == ON_A_GPU
    assert formats.values == NamedSharding(mesh, PartitionSpec())
