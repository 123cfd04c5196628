"""Dropout on the input of LoRA's pairs: x @ w + alpha / rank * dropout(x) @ a @ b."""

import dataclasses
import zlib
from pathlib import Path

import checkpoint_forms as forms
import commands
import jax
import numpy as np
import pytest
import training_steps as ts

from gpt2_jax.data.batching import Batch
from gpt2_jax.dropout import drop
from gpt2_jax.training import init_state, make_plan, make_train_step

EVERYWHERE = r"/w$|^wpe$|^wte$"
UNTIED = ts.DEEP.replace(tie_word_embeddings=False)
LORA = {"rank": 3, "alpha": 7.0, "targets": EVERYWHERE, "full": ""}
NONE = 1e-10  # a rate at which no entry is dropped: the merged form is its reference
SGD = {"name": "sgd", "learning_rate": 0.1, "momentum": 0.0}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def recipe(rate, **changes):
    lora = {**LORA, "dropout": rate, **changes.pop("lora", {})}
    return ts.recipe(**{"compute_dtype": "float64", "optimizer": SGD, "lora": lora, **changes})


def with_nonzero_pairs(state, seed=3):
    """New pairs are half 0: then the gradient of the other half is 0."""
    rng = np.random.default_rng(seed)
    lora = jax.tree.map(lambda leaf: jax.device_put(0.2 * rng.normal(size=leaf.shape), leaf.sharding), state.lora)
    return dataclasses.replace(state, lora=lora)


def stepped(recipe, config, batch):
    """The pairs after a step from nonzero pairs, flat, and its loss."""
    plan = make_plan(ts.config_of(recipe, config), recipe)
    state = with_nonzero_pairs(init_state(plan, ts.params_of(ts.config_of(recipe, config))))
    state, metrics = make_train_step(plan)(state, batch)
    return ts.flat(state.lora), float(metrics["loss"])


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("targets", [EVERYWHERE, "^lm_head$", "c_attn/w$|^lm_head$"])
def test_without_a_dropped_entry_it_is_the_merged_form(x64, targets, remat):
    """Losses and all gradients of the pairs: the branches add what the merged weights hold."""
    found, loss = stepped(recipe(NONE, lora={"targets": targets}, remat=remat), UNTIED, ts.batch(recipe(NONE)))
    expected, their_loss = stepped(recipe(0.0, lora={"targets": targets}), UNTIED, ts.batch(recipe(NONE)))
    assert abs(loss - their_loss) < 1e-9  # 1.3e-11
    assert ts.furthest(found, expected) < 1e-9  # 3.5e-11
    assert max(np.abs(leaf).max() for leaf in expected.values()) > 0.1


def test_a_classifier_s_head_has_a_branch(x64):
    config = ts.CONFIG.replace(labels=("no", "yes", "both"))
    batch = Batch(
        np.random.default_rng(2).integers(0, 37, (1, 6, ts.N_TOKENS)).astype(np.int32),
        np.array([[0, 1, 2, 0, 1, 2]], np.int32),
        np.ones((1, 6), np.float32),
        lengths=np.array([[3, 11, 5, 7, 2, 9]], np.int32),
    )
    how = {"objective": "classification", "lora": {"rank": 16, "targets": "^score/w$"}}
    (found, loss), (expected, their_loss) = (stepped(recipe(rate, **how), config, batch) for rate in (NONE, 0.0))
    assert set(found) == {"score/w/a", "score/w/b"}
    assert abs(loss - their_loss) < 1e-9
    assert ts.furthest(found, expected) < 1e-9  # 2.0e-11
    dropped, _ = stepped(recipe(0.5, **how), config, batch)
    assert ts.furthest(dropped, expected) > 1e-4


def test_the_masks_are_a_function_of_seed_and_step():
    one = recipe(0.3, compute_dtype="float32", lora={"targets": "c_fc/w$"}, optimizer={**SGD, "learning_rate": 0.0})
    batch = ts.batch(one)
    _, seen = ts.run(one, [batch] * 3)
    assert seen[0]["loss"] == seen[1]["loss"]  # the new pairs change nothing yet
    moving = dataclasses.replace(one, optimizer=dataclasses.replace(one.optimizer, learning_rate=1.0))
    _, first = ts.run(moving, [batch] * 3)
    _, again = ts.run(moving, [batch] * 3)
    assert [float(x["loss"]) for x in first] == [float(x["loss"]) for x in again]
    _, other = ts.run(dataclasses.replace(moving, seed=4), [batch] * 3)
    assert first[2]["loss"] != other[2]["loss"]


def test_dropout_of_the_model_and_of_the_pairs_go_together(x64):
    """The model's own masks are the same with and without dropout of the pairs."""
    with_both, with_one = (recipe(rate, model={"dropout": 0.3}) for rate in (NONE, 0.0))
    batch = ts.batch(with_one)
    (found, loss), (expected, their_loss) = (stepped(one, UNTIED, batch) for one in (with_both, with_one))
    assert abs(loss - their_loss) < 1e-9
    assert ts.furthest(found, expected) < 1e-9


EIGHT = """
    import json, sys
    import jax
    jax.config.update("jax_enable_x64", True)
    sys.path.insert(0, sys.argv[1])
    import training_steps as ts
    import gpt2_jax
    from test_training_lora_dropout import UNTIED, recipe, stepped

    config = UNTIED.replace(n_embd=24, n_layer=1)
    found = {}
    for name in ("1x1", "8x1", "2x4"):
        data, model = map(int, name.split("x"))
        one = recipe(0.4, batch_size=16, accumulate=2, mesh={"data": data, "model": model})
        found[name] = stepped(one, config, ts.batch(one, 1, config))
    far = {name: ts.furthest(found[name][0], found["1x1"][0]) for name in found}
    print(json.dumps([far, {name: found[name][1] for name in found}]))
"""


def test_the_masks_do_not_depend_on_the_devices():
    """Also where three heads are divided over four devices, with a head of zeros."""
    far, losses = commands.on_eight_devices(EIGHT, Path(__file__).parent)
    assert max(far.values()) < 1e-12  # 1.1e-16
    assert max(losses.values()) - min(losses.values()) < 1e-12  # 8.9e-16


# ---- torch


@pytest.mark.parity
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_losses_and_gradients_are_torch_s(x64, rate):
    """GPT2LMHeadModel whose layers add alpha / rank * (x * mask / (1 - rate)) @ a @ b, with the same masks."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    wanted = recipe(rate, lora={"targets": "/w$|^lm_head$"})
    config, batch = ts.config_of(wanted, UNTIED), ts.batch(wanted)
    plan = make_plan(config, wanted)
    state = with_nonzero_pairs(init_state(plan, ts.params_of(config)))
    before = ts.flat(state.lora)
    shape = transformers.GPT2Config(**forms.hf_config(config, architectures=..., tie_word_embeddings=False))
    model = transformers.GPT2LMHeadModel(shape).double().eval()
    theirs = dict(model.named_parameters())
    for name, array in ts.flat(state.params).items():
        key = "lm_head.weight" if name == "lm_head" else f"transformer.{forms.hf_name(name)}"
        theirs[key].data.copy_(torch.tensor(array))
    pairs = {name: torch.tensor(leaf, requires_grad=True) for name, leaf in before.items()}
    key = jax.random.fold_in(jax.random.key(wanted.seed, impl="threefry2x32"), 0)  # the step
    key = jax.random.fold_in(jax.random.fold_in(key, 0), 2**31)  # the part of the step; the branches

    def hook(name):
        def add(module, inputs, output):
            x = inputs[0]
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            kept = np.asarray(drop(jax.numpy.ones(x.shape), rate, own))  # 0, or 1 / (1 - rate)
            low = x * torch.tensor(kept)
            a, b = pairs[f"{name}/a"], pairs[f"{name}/b"]
            product = low @ b.T @ a.T if name == "lm_head" else low @ a @ b
            return output + 7.0 / 3 * product

        return add

    for name in sorted({name.rpartition("/")[0] for name in pairs}):
        module = "lm_head" if name == "lm_head" else f"transformer.{forms.hf_name(name)}".removesuffix(".weight")
        model.get_submodule(module).register_forward_hook(hook(name))
    tokens, targets, weights = (
        torch.tensor(np.asarray(leaf)[0]) for leaf in (batch.tokens, batch.targets, batch.weights)
    )
    logits = model(tokens.long()).logits.flatten(0, 1)
    nats = torch.nn.functional.cross_entropy(logits, targets.flatten().long(), reduction="none")
    loss = (nats * weights.flatten()).sum() / weights.sum()
    loss.backward()
    state, metrics = make_train_step(plan)(state, batch)
    assert abs(float(metrics["loss"]) - loss.item()) < 1e-12  # 1.8e-15
    found = {name: (before[name] - leaf) / 0.1 for name, leaf in ts.flat(state.lora).items()}
    for name, leaf in pairs.items():
        expected = leaf.grad.numpy()
        assert np.abs(expected).max() > 1e-5, name
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-12, err_msg=name)  # 5.6e-16
