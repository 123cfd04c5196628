"""One training step: gradient accumulation, remat, dropout, skipped steps, precision, donated memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_steps as ts
from measures import COMPILATIONS

import gpt2_jax
from gpt2_jax.data.batching import Batch
from gpt2_jax.training.step import KEEP_BARRIERS

ON_CPU = jax.default_backend() == "cpu"

ADAMW = {"learning_rate": 1e-3, "weight_decay": 0.2, "clip": 0.5}
RANDOM = {"model": {"dropout": 0.3}, "accumulate": 2, "optimizer": ADAMW}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def all_trained(state):
    """The part of the state that a skipped step keeps: everything except the step count and the running mean."""
    return (state.params, state.lora, state.opt_state)


# ---- accumulation and remat


@pytest.mark.parametrize("accumulate", [2, 6])
def test_parts_make_the_same_step_as_the_whole(x64, accumulate):
    """The parts have different numbers of targets that count, and one has none. Measured: 5.5e-13."""
    whole = ts.recipe(compute_dtype="float64", optimizer=ADAMW)
    parts = ts.recipe(compute_dtype="float64", optimizer=ADAMW, accumulate=accumulate)
    batches = [ts.batch(whole, seed) for seed in range(3)]
    batches[1].weights[0, -1] = 0  # the last part of six has no target
    at_once, seen = ts.run(whole, batches)
    in_parts, seen_in_parts = ts.run(parts, [ts.in_parts(batch, accumulate) for batch in batches])
    assert ts.furthest(ts.flat(at_once.params), ts.flat(in_parts.params)) <= 1e-12
    for one, other in zip(seen, seen_in_parts, strict=True):
        assert one["n_tokens"] == other["n_tokens"]
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-6)
        np.testing.assert_allclose(one["grad_norm"], other["grad_norm"], rtol=1e-6)


def test_remat_makes_the_same_step(x64):
    """Also with dropout: the backward pass must use the same draws as the forward pass."""
    runs = []
    for remat in (False, True):
        recipe = ts.recipe(compute_dtype="float64", remat=remat, optimizer=ADAMW, model={"dropout": 0.3})
        runs.append(ts.run(recipe, [ts.batch(recipe, seed) for seed in range(3)]))
    (plain, seen), (rematted, seen_rematted) = runs
    assert ts.furthest(ts.flat(plain.params), ts.flat(rematted.params)) <= 1e-12
    np.testing.assert_allclose([m["loss"] for m in seen], [m["loss"] for m in seen_rematted], rtol=1e-6)


@pytest.mark.parametrize("remat", ["elementwise", True])
def test_remat_gives_the_gradients_of_the_plain_model(x64, remat):
    """With dropout, and compiled as the step is. Measured: 2e-16; the largest gradient is 2.3."""
    config = ts.DEEP.replace(param_dtype="float64", compute_dtype="float64", attn_pdrop=0.3, resid_pdrop=0.3)
    tokens = np.random.default_rng(1).integers(0, config.n_vocab, (3, 11))

    def loss(params, remat):
        apply = gpt2_jax.GPT2(config, remat=remat).apply
        logits = apply({"params": params}, tokens, deterministic=False, rngs={"dropout": jax.random.key(5)}).logits
        return jnp.square(jax.nn.log_softmax(logits)).mean()

    gradients = jax.jit(jax.grad(loss), static_argnums=1, compiler_options=KEEP_BARRIERS if ON_CPU else None)
    plain, other = (ts.flat(gradients(ts.params_of(config), kind)) for kind in (False, remat))
    assert max(np.abs(leaf).max() for leaf in plain.values()) > 0.01
    assert ts.furthest(plain, other) <= 1e-12


def kept_bytes(remat):
    """Bytes that a forward pass keeps for the backward pass: the leaves of what `jax.vjp` returns."""
    config = gpt2_jax.GPT2Config(n_vocab=37, n_ctx=127, n_embd=24, n_head=3, n_layer=4)
    model, tokens = gpt2_jax.GPT2(config, remat=remat), np.zeros((6, 127), np.int32)
    _, backward = jax.eval_shape(
        lambda params: jax.vjp(lambda params: model.apply({"params": params}, tokens, method="hidden")[0], params),
        gpt2_jax.abstract_params(config),
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))


def test_remat_keeps_the_residual_stream_alone():
    """One residual stream per block. The inner activations of a block take at least 16 times as much."""
    stream = 6 * 127 * 24 * 4
    assert kept_bytes(True) < 20 * stream
    assert kept_bytes(False) - kept_bytes(True) > 4 * 16 * stream


@pytest.mark.skipif(not ON_CPU, reason="the compiler option is of XLA for CPUs")
def test_the_recipe_s_remat_needs_less_memory_and_more_operations():
    """Measured: 0.41 times the memory, 1.22 times the operations. Without the compiler option: the same memory."""
    config = gpt2_jax.GPT2Config(n_vocab=37, n_ctx=97, n_embd=48, n_head=3, n_layer=6)
    programs = [ts.compiled(ts.recipe(remat=remat), config) for remat in (False, True)]
    (keeping, flops), (anew, more_flops) = [(ts.temporary(p), p.cost_analysis()["flops"]) for p in programs]
    assert anew < 0.6 * keeping
    assert more_flops > 1.1 * flops


# ---- the program that XLA for CPUs makes


def test_results_of_products_are_kept_and_the_rest_is_computed_again():
    """In addition to its input, a block keeps 9 residual streams and the scores: 24.9 streams here, and else 86.7."""
    stream, scores = 6 * 127 * 24 * 4, 6 * 3 * 127 * 127 * 4
    kept = kept_bytes("elementwise") - kept_bytes(True)
    assert kept == pytest.approx(4 * (9 * stream + scores), rel=0.02)
    assert kept < 0.5 * (kept_bytes(False) - kept_bytes(True))


def instructions(program, kind):
    """The lines of the compiled program's main function with instructions of this kind."""
    main = program.as_text().split("\nENTRY ")[1]
    return [line for line in main.splitlines() if re.search(rf" {kind}\(", line)]


@pytest.mark.skipif(not ON_CPU, reason="the program is of XLA for CPUs")
def test_a_step_copies_no_weights_and_no_moments():
    """Nor does it transpose the inputs of products with weights. All sizes are odd, so a shape tells what it is of."""
    config = gpt2_jax.GPT2Config(n_vocab=37, n_ctx=31, n_embd=21, n_head=3, n_layer=3)
    program = ts.compiled(ts.recipe(optimizer=ADAMW), config)
    weights = [rf"f32\[{rows},{columns}\]" for rows, columns in ((21, 63), (21, 21), (21, 84), (84, 21), (37, 21))]
    copies = [line for line in instructions(program, "copy") if re.search("|".join(weights), line)]
    assert not copies, copies
    assert instructions(program, "opt-barrier")
    gradients = [line for line in instructions(program, "dot") if re.search("|".join(weights), line.split(" dot(")[0])]
    assert len(gradients) >= 3 * 4
    assert all("lhs_contracting_dims={0}, rhs_contracting_dims={0}" in line for line in gradients), gradients


# ---- dropout


def loss_of(recipe, batch, step=0):
    """The loss of one step from the initial state, with its step count set to `step`."""
    state = ts.begin(recipe)
    state = state.replace(step=jax.device_put(jnp.int32(step), state.step.sharding))
    return float(ts.train_step(recipe)(state, batch)[1]["loss"])


def test_dropout_is_a_function_of_seed_and_step():
    recipe, other_seed, none = ts.recipe(**RANDOM), ts.recipe(**RANDOM, seed=4), ts.recipe(accumulate=2)
    batch = ts.batch(recipe)
    first = loss_of(recipe, batch)
    assert loss_of(recipe, batch) == first
    assert len({first, loss_of(recipe, batch, step=1), loss_of(other_seed, batch), loss_of(none, batch)}) == 4


def test_rows_and_parts_draw_their_own_dropout():
    """The same window six times; only one of them counts at a time."""
    recipe = ts.recipe(**RANDOM)
    batch = ts.batch(recipe)
    same = [np.broadcast_to(leaf[:1, :1], leaf.shape) for leaf in (batch.tokens, batch.targets)]
    losses = set()
    for place in np.ndindex(2, 3):
        weights = np.zeros_like(batch.weights)
        weights[place] = 1
        losses.add(loss_of(recipe, Batch(*same, weights)))
    assert len(losses) == 6


def test_the_whole_step_repeats_to_the_bit():
    recipe = ts.recipe(**RANDOM)
    batches = [ts.batch(recipe, seed) for seed in range(3)]
    assert ts.bits(ts.run(recipe, batches)[0]) == ts.bits(ts.run(recipe, batches)[0])


# ---- not a number, and spikes


def after(recipe, batches, last):
    """The state before the last batch, copied, the state after it, and its metrics."""
    state, _ = ts.run(recipe, batches)
    before = jax.tree.map(np.array, state)
    state, metrics = ts.train_step(recipe)(state, last)
    return before, state, metrics


def nan_batch(recipe):
    batch = ts.batch(recipe, 9)
    batch.weights[-1, -1, -1] = np.nan
    return batch


def outside_batch(recipe):
    """An id outside the vocabulary: the model gives its row NaN."""
    batch = ts.batch(recipe, 9)
    batch.tokens[-1, -1, 0] = ts.CONFIG.n_vocab
    batch.weights[:] = 1
    return batch


@pytest.mark.parametrize("make", [nan_batch, outside_batch])
@pytest.mark.parametrize(("on_nan", "accumulate"), [("skip", 1), ("stop", 2)])
def test_a_batch_that_gives_no_number_changes_nothing(make, accumulate, on_nan):
    """Weights, moments and running mean keep their bits, the step is counted, and the metrics report it."""
    recipe = ts.recipe(accumulate=accumulate, optimizer=ADAMW, monitor={"on_nan": on_nan})
    before, state, metrics = after(recipe, [ts.batch(recipe, seed) for seed in range(2)], make(recipe))
    assert bool(metrics["skipped"])
    assert not np.isfinite(metrics["loss"])
    assert int(state.step) == 3
    assert ts.bits(all_trained(state)) == ts.bits(all_trained(before))


def test_training_goes_on_after_a_skipped_step():
    """The result is the same as without that step."""
    recipe = ts.recipe(optimizer=ADAMW, monitor={"on_nan": "skip"})
    batches = [ts.batch(recipe, seed) for seed in range(4)]
    without, _ = ts.run(recipe, batches)
    with_nan, seen = ts.run(recipe, [*batches[:2], nan_batch(recipe), *batches[2:]])
    assert [bool(metrics["skipped"]) for metrics in seen] == [False, False, True, False, False]
    assert ts.bits(all_trained(without)) == ts.bits(all_trained(with_nan))


def test_after_a_skipped_step_the_learning_rate_is_that_of_the_step(x64):
    """It is the one in the metrics, so that the last step has the last rate of the schedule."""
    recipe = ts.recipe(
        compute_dtype="float64",
        steps=3,
        optimizer={"name": "sgd", "momentum": 0.0, "learning_rate": 0.5, "schedule": "linear"},
        monitor={"on_nan": "skip"},
    )
    batches = [ts.batch(recipe, seed) for seed in range(2)]
    rates = [ts.learning_rate(recipe, step) for step in (0, 2)]
    theirs, _, _ = ts.slow_run(recipe, batches, rates)
    state, seen = ts.run(recipe, [batches[0], nan_batch(recipe), batches[1]])
    np.testing.assert_allclose(float(seen[2]["learning_rate"]), rates[1], rtol=1e-6)
    assert ts.furthest(ts.flat(state.params), theirs) <= 1e-7


def with_mean(recipe, mean):
    """A state whose running mean is this, the state after one more step, and its metrics."""
    state, _ = ts.run(recipe, [ts.batch(recipe, seed) for seed in range(2)])
    state = state.replace(mean_loss=jax.device_put(jnp.float32(mean), state.mean_loss.sharding))
    before = jax.tree.map(np.array, state)
    return before, *ts.train_step(recipe)(state, ts.batch(recipe, 2))


@pytest.mark.parametrize("on_spike", ["ignore", "skip", "stop"])
def test_a_spike_is_skipped_unless_it_is_to_be_ignored(on_spike):
    """A loss above `spike` times the mean is a spike; a loss 1 % below that is not."""
    recipe = ts.recipe(optimizer=ADAMW, monitor={"on_spike": on_spike, "spike": 1.5})
    loss = float(with_mean(recipe, 100.0)[2]["loss"])
    for mean, high in ((0.99 * loss / 1.5, True), (1.01 * loss / 1.5, False)):
        before, state, metrics = with_mean(recipe, mean)
        skipped = high and on_spike != "ignore"
        assert bool(metrics["skipped"]) == skipped
        assert (ts.bits(all_trained(state)) == ts.bits(all_trained(before))) == skipped
        assert int(state.step) == 3
        counted = min(float(metrics["loss"]), 1.5 * mean)  # so the mean slowly reaches a new constant level
        np.testing.assert_allclose(state.mean_loss, 0.98 * mean + 0.02 * counted, rtol=1e-6)


def test_a_step_without_targets_changes_nothing():
    """All rows are padding or prompts: no decay, no momentum, and no loss of 0 in the mean."""
    recipe = ts.recipe(optimizer=ADAMW)
    state, _ = ts.run(recipe, [ts.batch(recipe)])
    before = jax.tree.map(np.array, state)
    empty = ts.batch(recipe, 1)
    state, metrics = ts.train_step(recipe)(state, empty.replace(weights=np.zeros_like(empty.weights)))
    assert metrics["skipped"]
    assert ts.bits((all_trained(state), state.mean_loss)) == ts.bits((all_trained(before), before.mean_loss))
    assert int(state.step) == 2


def test_the_mean_of_the_loss():
    """It begins with the first loss, and each later loss has a weight of 1/50."""
    recipe = ts.recipe(optimizer=ADAMW)
    state, seen = ts.run(recipe, [ts.batch(recipe, seed) for seed in range(3)])
    first, second, third = (float(metrics["loss"]) for metrics in seen)
    wanted = 0.98 * (0.98 * first + 0.02 * second) + 0.02 * third
    np.testing.assert_allclose(state.mean_loss, wanted, rtol=1e-6)


def test_the_first_step_is_never_a_spike():
    """There is no mean yet to compare it with."""
    recipe = ts.recipe(optimizer=ADAMW, monitor={"on_spike": "skip", "spike": 1.0})
    _, (metrics,) = ts.run(recipe, [ts.batch(recipe)])
    assert not metrics["skipped"]


# ---- precision


def test_bfloat16_products_leave_everything_else_in_float32():
    wide, narrow = ts.recipe(optimizer=ADAMW), ts.recipe(optimizer=ADAMW, compute_dtype="bfloat16")
    batches = [ts.batch(wide, seed) for seed in range(4)]
    ours, seen = ts.run(narrow, batches)
    theirs, wanted = ts.run(wide, batches)
    floats = [leaf for leaf in jax.tree.leaves(ours) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {str(leaf.dtype) for leaf in floats} == {"float32"}
    assert {metrics["loss"].dtype.name for metrics in seen} == {"float32"}
    differences = [abs(one["loss"] / other["loss"] - 1) for one, other in zip(seen, wanted, strict=True)]
    assert 1e-7 < max(differences) < 1e-2  # computed differently, with nearly the same result
    assert ts.furthest(ts.flat(ours.params), ts.flat(theirs.params)) <= 2 * 4 * ADAMW["learning_rate"]


# ---- memory and compilation


def test_the_state_gives_its_memory_to_the_next():
    """Donated buffers that cannot be used cause a warning, which is an error here."""
    recipe = ts.recipe(optimizer=ADAMW)
    state = ts.begin(recipe)
    batch = ts.batch(recipe)
    n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    memory = ts.train_step(recipe).lower(state, batch).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 0.99 * n_bytes
    leaves = jax.tree.leaves(state)
    addresses = {leaf.unsafe_buffer_pointer() for leaf in leaves}
    state, _ = ts.train_step(recipe)(state, batch)
    assert all(leaf.is_deleted() for leaf in leaves)
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)} <= addresses


def test_ten_steps_compile_once():
    recipe = ts.recipe(optimizer=ADAMW | {"schedule": "cosine", "warmup_steps": 2}, seed=11)  # used by no other test
    state, step = ts.begin(recipe), ts.train_step(recipe)
    batches = [ts.batch(recipe, seed) for seed in range(10)]
    before = len(COMPILATIONS)
    for batch in batches:
        state, _ = step(state, batch)
    assert len(COMPILATIONS) == before + 1


def test_metrics_are_the_named_scalars():
    recipe = ts.recipe()
    _, metrics = ts.train_step(recipe)(ts.begin(recipe), ts.batch(recipe))
    kinds = dict.fromkeys(("loss", "grad_norm", "learning_rate", "n_tokens"), "float32") | {"skipped": "bool"}
    assert {name: str(value.dtype) for name, value in metrics.items()} == kinds
    assert {value.shape for value in metrics.values()} == {()}
