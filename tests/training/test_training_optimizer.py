"""Optimizers, schedules and rules over parameter names, against their definitions in NumPy and against optax."""

import itertools
import re

import checkpoint_forms as forms
import jax
import numpy as np
import optax
import pytest
import training_steps as ts
from strength import campaign

from gpt2_jax.training import make_plan

FROZEN = r"^(wte|wpe)$|^h0/mlp/"
LION = {"name": "lion", "learning_rate": 1e-3, "betas": (0.8, 0.95)}
KINDS = {
    "adamw": {"learning_rate": 1e-3, "betas": (0.8, 0.93), "epsilon": 1e-6},
    "sgd": {"name": "sgd", "learning_rate": 0.03, "momentum": 0.7},
    "lion": LION,
}
RULES = {
    "learning_rates": [[r"^wte$", 0.0], [r"^h0/attn/", 0.25], [r"/b$", 3.0], [".*", 1.0]],
    "decay": [[r"^h0/mlp", 0.0], [r"/(w|g)$", 1.5], [".*", 0.5]],
    "weight_decay": 0.2,
}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("rules", [{}, RULES], ids=["default", "rules"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_definition(x64, kind, rules):
    """With clipping. The rules' learning rates multiply the decay too, and frozen parameters do not count in the norm.

    Lion takes the sign of the gradient. The gradient of the key bias is only noise, so it is not compared.
    """
    recipe = ts.recipe(compute_dtype="float64", optimizer=KINDS[kind] | {"clip": 0.9, "weight_decay": 0.2} | rules)
    batches = [ts.batch(recipe, seed) for seed in range(5)]
    theirs, _, norms = ts.slow_run(recipe, batches, [KINDS[kind]["learning_rate"]] * 5)
    state, seen = ts.run(recipe, batches)
    ours = ts.flat(state.params)
    assert ts.furthest(ours, theirs, but=ts.KEY_BIAS if kind == "lion" else None) <= 1e-11
    np.testing.assert_allclose([one["grad_norm"] for one in seen], norms, rtol=1e-6)
    before = ts.flat(ts.params_of(ts.config_of(recipe)))
    moved = {name for name in ours if not np.array_equal(ours[name], before[name])}
    assert moved == set(ours) - ({"wte"} if rules else set())


def test_adafactor_is_optax_own(x64):
    """With its usual settings. The attention bias is frozen: Adafactor turns the key bias's noise into large steps."""
    held = [["c_attn/b$", 0.0], [".*", 1.0]]
    recipe = ts.recipe(
        compute_dtype="float64", optimizer={"name": "adafactor", "learning_rate": 0.01, "learning_rates": held}
    )
    batches = [ts.batch(recipe, seed) for seed in range(5)]
    state, _ = ts.run(recipe, batches)
    config = ts.config_of(recipe)
    params, theirs = ts.params_of(config), optax.adafactor(0.01)
    theirs_state = theirs.init(params)
    for batch in batches:
        _, gradients = ts.plain_gradients(config, params, batch)
        updates, theirs_state = theirs.update(gradients, theirs_state, params)
        updates["h0"]["attn"]["c_attn"]["b"] *= 0
        params = optax.apply_updates(params, updates)
    assert ts.furthest(ts.flat(state.params), ts.flat(params)) <= 1e-9


def newton_schulz(matrix):
    """Five steps of the iteration of Jordan et al. 2024, in NumPy."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@pytest.mark.parametrize("lora", [{}, {"rank": 3}], ids=["full", "lora"])
def test_muon_is_its_definition(x64, lora):
    """Muon for the matrices of the blocks (Liu et al. 2025, algorithm 1 and section 2.2), AdamW for all others."""
    settings = {"name": "muon", "learning_rate": 1e-2, "momentum": 0.9, "weight_decay": 0.2, "clip": 0.0}
    recipe = ts.recipe(compute_dtype="float64", optimizer=settings, lora=lora)
    plan = make_plan(ts.config_of(recipe), recipe)
    rng = np.random.default_rng(0)
    shapes = {name: leaf.shape for name, leaf in plan.state.trained(plan.trained).items()}
    weights = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    blocks = {name for name in shapes if re.match(r"h\d+/(attn|mlp)/c_\w+/w", name)}
    state = plan.optimizer.init(weights)
    first, second = ({name: np.zeros(shape) for name, shape in shapes.items()} for _ in range(2))
    for step in range(1, 4):
        gradients = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        updates, state = plan.optimizer.update(gradients, state, weights)
        for name, g in gradients.items():
            decay = 0.2 * weights[name] if re.search(r"(^|/)(w|wte|wpe)$", name) else 0
            if name in blocks:
                first[name] = 0.9 * first[name] + 0.1 * g
                nesterov = 0.9 * first[name] / (1 - 0.9 ** (step + 1)) + 0.1 * g / (1 - 0.9**step)
                expected = 0.2 * np.sqrt(max(g.shape)) * newton_schulz(nesterov)
            else:
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.95 * second[name] + 0.05 * g**2
                root = np.sqrt(second[name] / (1 - 0.95**step)) + 1e-8
                expected = first[name] / (1 - 0.9**step) / root
            np.testing.assert_allclose(updates[name], expected + decay, rtol=0, atol=1e-10)  # measured: 2e-15
    assert len(blocks) == 4


def test_a_run_with_muon_learns(x64):
    recipe = ts.recipe(compute_dtype="float64", optimizer={"name": "muon", "learning_rate": 0.02})
    _, seen = ts.run(recipe, [ts.batch(recipe, 0)] * 12)
    losses = [float(one["loss"]) for one in seen]
    assert losses[-1] < 0.5 * losses[0]  # measured: 0.42


# ---- schedules


@pytest.mark.parametrize(
    ("schedule", "warmup_steps"),
    campaign(
        [("cosine", 1), ("linear", 4), ("constant", 0)],
        list(itertools.product(("cosine", "linear", "constant"), (0, 1, 4))),
    ),
)
def test_schedules(x64, schedule, warmup_steps):
    """The metrics and the weights both follow the recipe's schedule."""
    recipe = ts.recipe(
        compute_dtype="float64",
        steps=9,
        optimizer={
            "schedule": schedule,
            "warmup_steps": warmup_steps,
            "final_fraction": 0.25,
            "learning_rate": 0.5,
            "name": "sgd",
        },
    )
    batches = [ts.batch(recipe, seed) for seed in range(9)]
    wanted = [ts.learning_rate(recipe, step) for step in range(9)]
    theirs, _, _ = ts.slow_run(recipe, batches, wanted)
    state, seen = ts.run(recipe, batches)
    np.testing.assert_allclose([float(one["learning_rate"]) for one in seen], wanted, rtol=1e-6)
    assert ts.furthest(ts.flat(state.params), theirs) <= 1e-7
    assert max(wanted[warmup_steps - 1 :]) == 0.5 or not warmup_steps
    assert wanted[-1] == pytest.approx(0.5 if schedule == "constant" else 0.125)


# ---- rules


@pytest.mark.parametrize("rule", ["learning_rates", "decay"])
def test_rules_that_leave_a_parameter_uncovered_are_refused(rule):
    recipe = ts.recipe(optimizer={rule: [[r"^wte$", 1.0], [r"/", 1.0]]})
    with pytest.raises(ValueError, match=r"\bwpe\b") as refused:
        ts.begin(recipe)
    assert rule in str(refused.value)
    assert forms.is_clear(refused.value)


@pytest.mark.parametrize("kind", [*KINDS, "adafactor"])
def test_what_is_frozen_stays_and_has_no_optimizer_state(kind):
    """Frozen parameters do not change by a bit, even with weight decay, and they have no optimizer state."""
    optimizer = {"name": "adamw", "weight_decay": 0.5, "clip": 0.3} | KINDS.get(kind, {"name": kind})
    free = ts.recipe(optimizer=optimizer)
    frozen = ts.recipe(optimizer=optimizer | {"learning_rates": [[FROZEN, 0.0], [".*", 1.0]]})
    batches = [ts.batch(frozen, seed) for seed in range(3)]
    before = ts.flat(ts.params_of(ts.CONFIG))
    state, _ = ts.run(frozen, batches)
    for name, array in ts.flat(state.params).items():
        assert np.array_equal(array, before[name]) == bool(re.search(FROZEN, name)), name
    n_frozen = sum(array.size for name, array in before.items() if re.search(FROZEN, name))
    n_all = sum(array.size for array in before.values())
    held, held_by_all = (sum(leaf.size for leaf in jax.tree.leaves(ts.begin(r).opt_state)) for r in (frozen, free))
    copies = round(held_by_all / n_all)
    assert held_by_all - held >= copies * n_frozen


def test_gradients_of_what_is_frozen_are_not_computed():
    """Everything except the last norm is frozen, so only the forward pass and the loss remain."""

    def flops(learning_rates):
        recipe = ts.recipe(optimizer={"learning_rates": learning_rates})
        program = ts.train_step(recipe).lower(ts.begin(recipe), ts.batch(recipe)).compile()
        return program.cost_analysis()["flops"]

    assert flops([["^ln_f/", 1.0], [".*", 0.0]]) < 0.6 * flops([[".*", 1.0]])


def test_a_recipe_that_freezes_everything_is_refused():
    recipe = ts.recipe(optimizer={"learning_rates": [[".*", 0.0]]})
    with pytest.raises(ValueError, match=r"learning_rates|frozen|train"):
        ts.begin(recipe)
