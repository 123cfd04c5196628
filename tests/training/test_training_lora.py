"""LoRA: a small tree beside frozen weights, merged as w + alpha / rank * a @ b."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_steps as ts

import gpt2_jax
from gpt2_jax.lora import init_lora, merge_lora
from gpt2_jax.params import flatten, unflatten
from gpt2_jax.recipe import Lora, Recipe
from gpt2_jax.sharding import make_mesh
from gpt2_jax.training.plan import make_plan
from gpt2_jax.training.step import model_params

TARGETS = r"attn/(c_attn|c_proj)/w$|mlp/c_fc/w$"
LORA = {"rank": 3, "alpha": 7.0, "targets": TARGETS}
NAMES = {"h0/mlp/c_fc/w", "h0/attn/c_attn/w", "h0/attn/c_proj/w"}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def merged_by_hand(base, lora, alpha=7.0, rank=3):
    """{name: w + alpha / rank * a @ b} for names with a pair, and the base for all others."""
    change = {name: alpha / rank * np.asarray(pair["a"]) @ np.asarray(pair["b"]) for name, pair in lora.items()}
    return {name: w + change.get(name, 0) for name, w in base.items()}


def test_only_the_targets_get_a_pair():
    params = ts.params_of(ts.CONFIG)
    lora = init_lora(params, 3, TARGETS, jax.random.key(0))
    assert set(lora) == NAMES
    for name, pair in lora.items():
        n_in, n_out = ts.flat(params)[name].shape
        assert (pair["a"].shape, pair["b"].shape) == ((n_in, 3), (3, n_out))
        assert np.asarray(pair["a"]).any()  # with both 0, nothing could be learned


def test_pairs_differ_by_matrix_and_by_key():
    params = ts.params_of(ts.DEEP)
    draws = [init_lora(params, 3, r"attn/c_proj/w$", jax.random.key(seed)) for seed in (0, 0, 1)]
    assert ts.bits(draws[0]) == ts.bits(draws[1]) != ts.bits(draws[2])
    assert ts.bits(draws[0]["h0/attn/c_proj/w"]["a"]) != ts.bits(draws[0]["h1/attn/c_proj/w"]["a"])


def test_a_small_head_may_have_a_pair_of_larger_rank():
    params = {"score": {"w": jnp.ones((12, 2))}}
    lora = init_lora(params, 16, "^score/", jax.random.key(0))
    assert (lora["score/w"]["a"].shape, lora["score/w"]["b"].shape) == ((12, 16), (16, 2))


def test_the_random_factor_is_at_the_input():
    """Its variance is 1 / in. The input of lm_head (n_vocab, n_embd) is b's side, that of wte a's."""
    shapes = {"lm_head": (3001, 500), "wte": (3001, 500), "h0/mlp/c_fc/w": (500, 3001)}
    params = unflatten({name: jnp.zeros(shape) for name, shape in shapes.items()})
    lora = init_lora(params, 16, ".", jax.random.key(0))
    for name, side, n_in in (("lm_head", "b", 500), ("wte", "a", 3001), ("h0/mlp/c_fc/w", "a", 500)):
        pair = lora[name]
        assert np.std(pair[side]) * n_in**0.5 == pytest.approx(1, abs=0.03), name  # 0.009 of 8,000 numbers
        assert not np.asarray(pair["ab".replace(side, "")]).any(), name


BOOK = {  # the matrices of a block in the build-an-LLM book, whose queries, keys and values are separate
    **{f"att/{name}": (768, 768) for name in ("W_query", "W_key", "W_value", "out_proj")},
    "ff/0": (768, 3072),
    "ff/2": (3072, 768),
}


def test_the_first_rule_that_matches_decides_the_rank():
    params = ts.params_of(ts.DEEP)
    rules = (("^h1/.*c_attn/w$", 0), ("c_attn/w$", 5), ("c_fc/w$", 2))
    lora = init_lora(params, 3, r"attn/(c_attn|c_proj)/w$", jax.random.key(0), rules)
    ranks = {name: pair["a"].shape[1] for name, pair in lora.items()}
    attn, fc = {f"h{i}/attn/c_proj/w": 3 for i in (0, 1)}, {f"h{i}/mlp/c_fc/w": 2 for i in (0, 1)}
    assert ranks == {"h0/attn/c_attn/w": 5} | attn | fc
    alone = init_lora(params, 0, r"attn/(c_attn|c_proj)/w$", jax.random.key(0), rules)
    assert {name: pair["a"].shape[1] for name, pair in alone.items()} == {"h0/attn/c_attn/w": 5} | fc
    with pytest.raises(ValueError, match=r"needs a matrix .*, but h0/attn/c_attn/b is \(36,\), rank 5"):
        init_lora(params, 0, "x", jax.random.key(0), (("c_attn", 5),))
    with pytest.raises(ValueError, match="matches the LoRA targets 'x' or ranks"):
        init_lora(params, 3, "x", jax.random.key(0), (("y", 5),))


def test_each_matrix_is_scaled_by_its_own_rank(x64):
    """A step with ranks is that of NumPy, with alpha / rank of each matrix."""
    rules = (("c_attn/w$", 5), ("c_fc/w$", 2))
    recipe = ts.recipe(compute_dtype="float64", lora={"alpha": 7.0, "ranks": rules})
    assert recipe.lora.is_used
    assert not recipe.lora.rank
    batch, base = ts.batch(recipe), ts.flat(ts.params_of(ts.config_of(recipe)))
    begun = ts.begin(recipe)
    pairs = {name: {side: np.array(pair[side]) for side in "ab"} for name, pair in begun.lora.items()}
    assert {name: pair["a"].shape[1] for name, pair in pairs.items()} == {"h0/attn/c_attn/w": 5, "h0/mlp/c_fc/w": 2}
    slow = ts.Slow(recipe.optimizer, ts.flat(begun.lora))
    now = dict(base)
    for name, pair in pairs.items():
        now[name] = base[name] + 7.0 / pair["a"].shape[1] * pair["a"] @ pair["b"]
    _, gradients = ts.plain_gradients(ts.config_of(recipe), ts.forms.nested(now), batch)
    g = ts.flat(gradients)
    scales = {name: 7.0 / pair["a"].shape[1] for name, pair in pairs.items()}
    by_a = {f"{name}/a": scales[name] * g[name] @ pair["b"].T for name, pair in pairs.items()}
    by_b = {f"{name}/b": scales[name] * pair["a"].T @ g[name] for name, pair in pairs.items()}
    slow.step(by_a | by_b, recipe.optimizer.learning_rate)
    state, _ = ts.run(recipe, [batch])
    assert ts.furthest(ts.flat(state.lora), slow.weights) <= 1e-11  # 2.4e-16
    merged = ts.flat(model_params(state, recipe))
    for name, pair in state.lora.items():
        expected = base[name] + scales[name] * np.asarray(pair["a"]) @ np.asarray(pair["b"])
        np.testing.assert_allclose(merged[name], expected, rtol=0, atol=1e-14)


def test_how_many_parameters_rank_16_has_everywhere_in_124m_with_two_classes():
    """The book's model has 2,666,528 as its text says. Our fused c_attn has fewer: in + out counts once, not thrice."""

    def count(shapes):
        leaves = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
        lora = jax.eval_shape(lambda: init_lora(unflatten(leaves), 16, ".", jax.random.key(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(lora))

    head = {"score/w": (768, 2)}
    book = {f"h{i}/{name}": shape for i in range(12) for name, shape in BOOK.items()} | head
    assert count(book) == 2_666_528
    flat = flatten(gpt2_jax.abstract_params(gpt2_jax.SIZES["124M"]))
    ours = {name: leaf.shape for name, leaf in flat.items() if name.endswith("/w")} | head
    assert count(ours) == 2_371_616
    recipe = Recipe(lora=Lora(rank=16, targets="/w$"))
    plan = make_plan(gpt2_jax.SIZES["124M"], recipe, make_mesh(1, 1))
    assert plan.n_trained == 2_371_616 - 16 * (768 + 2)  # without the head
    assert plan.n_all == 124_439_808 + plan.n_trained


def test_some_params_are_trained_themselves_beside_the_pairs(x64):
    """Steps of NumPy: their gradients are those of the plain model at the merged weights."""
    rate, scale = 1e-3, 7.0 / 3
    recipe = ts.recipe(compute_dtype="float64", lora={**LORA, "full": r"ln_2/|^wpe$"}, optimizer={"clip": 0.4})
    batches = [ts.batch(recipe, seed) for seed in range(4)]
    config, base = ts.config_of(recipe), ts.flat(ts.params_of(ts.config_of(recipe)))
    full = {"h0/ln_2/g", "h0/ln_2/b", "wpe"}
    begun = ts.begin(recipe)
    slow = ts.Slow(recipe.optimizer, ts.flat(begun.lora) | {name: base[name] for name in full})
    for batch in batches:
        pairs = {name: {side: slow.weights[f"{name}/{side}"] for side in "ab"} for name in NAMES}
        now = merged_by_hand(base, pairs) | {name: slow.weights[name] for name in full}
        _, gradients = ts.plain_gradients(config, ts.forms.nested(now), batch)
        g = ts.flat(gradients)
        by_a = {f"{name}/a": scale * g[name] @ pairs[name]["b"].T for name in NAMES}
        by_b = {f"{name}/b": scale * pairs[name]["a"].T @ g[name] for name in NAMES}
        slow.step(by_a | by_b | {name: g[name] for name in full}, rate)
    state, _ = ts.run(recipe, batches)
    found = {name: np.asarray(leaf) for name, leaf in state.by_name().items()}
    assert max(np.abs(found[name] - slow.weights[name]).max() for name in slow.weights) <= 1e-11  # 2e-17
    same = found.keys() - slow.weights.keys()
    assert all(np.array_equal(found[name], base[name]) for name in same)
    assert {*NAMES, "wte"} <= same


@pytest.mark.parametrize("targets", ["attn/c_atn/w$", r"c_attn/b$"])
def test_targets_that_find_no_matrix_are_refused(targets):
    with pytest.raises(ValueError, match=r"LoRA|matrix"):
        init_lora(ts.params_of(ts.CONFIG), 3, targets, jax.random.key(0))


def test_before_the_first_step_the_merged_model_is_the_base():
    recipe = ts.recipe(lora=LORA)
    state = ts.begin(recipe)
    assert ts.bits(model_params(state, recipe)) == ts.bits(ts.params_of(ts.CONFIG))


def test_merging_is_the_definition(x64):
    config = ts.CONFIG.replace(param_dtype="float64")
    params = ts.params_of(config)
    lora = init_lora(params, 3, TARGETS, jax.random.key(0))
    lora = jax.tree.map(lambda leaf: np.random.default_rng(5).normal(size=leaf.shape), lora)
    merged = ts.flat(merge_lora(params, lora, 7.0))
    assert ts.furthest(merged, merged_by_hand(ts.flat(params), lora)) <= 1e-14


def test_only_the_small_tree_is_trained():
    """The base does not change by a bit, and the optimizer holds two moments, of the small tree only."""
    recipe = ts.recipe(lora=LORA, optimizer={"weight_decay": 0.3, "clip": 0.5})
    before = ts.begin(recipe)
    start = jax.tree.map(np.array, before.lora)
    state, seen = ts.run(recipe, [ts.batch(recipe, seed) for seed in range(3)])
    assert ts.bits(state.params) == ts.bits(ts.params_of(ts.CONFIG))
    assert all(one != other for one, other in zip(ts.bits(state.lora), ts.bits(start), strict=True))
    n_small = sum(leaf.size for leaf in jax.tree.leaves(state.lora))
    n_held = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert 2 * n_small <= n_held <= 2 * n_small + 5
    assert seen[-1]["loss"] != seen[0]["loss"]


def test_training_it_is_the_gradient_through_the_merge(x64):
    """Chain rule, with g for the merged matrix: alpha / rank * g @ b.T for a, and alpha / rank * a.T @ g for b."""
    rate, scale = 1e-3, 7.0 / 3
    recipe = ts.recipe(compute_dtype="float64", lora=LORA, optimizer={"learning_rate": rate, "clip": 0.4})
    batches = [ts.batch(recipe, seed) for seed in range(5)]
    config, base = ts.config_of(recipe), ts.flat(ts.params_of(ts.config_of(recipe)))
    small = ts.flat(ts.begin(recipe).lora)
    slow = ts.Slow(recipe.optimizer, small)
    for batch in batches:
        pairs = {name: {"a": slow.weights[f"{name}/a"], "b": slow.weights[f"{name}/b"]} for name in NAMES}
        _, gradients = ts.plain_gradients(config, ts.forms.nested(merged_by_hand(base, pairs)), batch)
        g = ts.flat(gradients)
        by_a = {f"{name}/a": scale * g[name] @ pairs[name]["b"].T for name in NAMES}
        by_b = {f"{name}/b": scale * pairs[name]["a"].T @ g[name] for name in NAMES}
        slow.step(by_a | by_b, rate)
    state, _ = ts.run(recipe, batches)
    assert ts.furthest(ts.flat(state.lora), slow.weights) <= 1e-11


def test_the_merged_model_exported_says_the_same(tmp_path):
    """Saved like any model and loaded again, it gives the logits of base plus pairs."""
    recipe = ts.recipe(lora=LORA, optimizer={"learning_rate": 0.02})
    batch = ts.batch(recipe)
    state, _ = ts.run(recipe, [batch] * 3)
    config = ts.CONFIG.replace(embd_pdrop=0.1)
    gpt2_jax.save(tmp_path / "merged", config, model_params(state, recipe), format="huggingface")
    _, params = gpt2_jax.load(tmp_path / "merged")
    by_hand = ts.forms.nested(merged_by_hand(ts.flat(state.params), state.lora))
    ours, theirs, base = (
        np.asarray(gpt2_jax.GPT2(ts.CONFIG).apply({"params": p}, batch.tokens[0]).logits)
        for p in (params, by_hand, state.params)
    )
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    assert np.abs(ours - base).max() > 1e-2 * np.abs(base).max()
