"""A classifier's loss and gradients compared with torch in float64: GPT2ForSequenceClassification, and other pooling.

The gradients are the differences of one step of SGD with the learning rate 1.
"""

import checkpoint_forms as forms
import jax
import numpy as np
import pytest
import tiny_models
import training_steps as ts

import gpt2_jax
from gpt2_jax.data.batching import Batch
from gpt2_jax.training import init_state, make_eval_step, make_plan, make_train_step

pytestmark = pytest.mark.parity

CONFIG = gpt2_jax.GPT2Config(37, 11, 12, 3, 2, labels=("ham", "spam", "news"), param_dtype="float64")
LENGTHS = np.array([[1, 11, 5], [7, 2, 11]])  # of one token, and of all of a row
PAD = 36


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def batch_of(label_weights=(1.0, 1.0, 1.0)) -> Batch:
    """Two parts of three texts. Padding is PAD, which transformers recognizes by its id."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, PAD, (2, 3, 11), dtype=np.int32)
    tokens = np.where(np.arange(11) < LENGTHS[..., None], tokens, PAD)
    labels = np.array([[0, 1, 2], [1, 1, 2]], np.int32)
    return Batch(tokens, labels, np.take(np.float32(label_weights), labels), LENGTHS.astype(np.int32))


def torch_model(torch, config, params):
    import transformers

    hf = forms.hf_config(config, architectures=..., num_labels=3, pad_token_id=PAD, problem_type=...)
    shape = transformers.GPT2Config(**hf, attn_implementation="eager")
    model = transformers.GPT2ForSequenceClassification(shape).eval().double()
    theirs = dict(model.named_parameters())
    flat = ts.flat(params)
    names = {name: "score.weight" if name == "score/w" else f"transformer.{forms.hf_name(name)}" for name in flat}
    assert theirs.keys() == set(names.values())
    with torch.no_grad():
        for name, array in flat.items():
            theirs[names[name]].copy_(torch.tensor(array.T if name == "score/w" else array))

    def gradients():
        found = {name: theirs[key].grad.numpy() for name, key in names.items()}
        return found | {"score/w": found["score/w"].T}

    return model, gradients


def step_of(config, params, batch, **changes):
    """The loss of our training step, and the gradients that it takes."""
    recipe = ts.recipe(
        objective="classification",
        classification={"train": "all", "pooling": config.pooling},
        compute_dtype="float64",
        accumulate=2,
        optimizer={"name": "sgd", "learning_rate": 1.0, "momentum": 0.0},
        **changes,
    )
    plan = make_plan(config, recipe, n_tokens=11)
    before = ts.flat(params)
    state, metrics = make_train_step(plan)(init_state(plan, params), batch)
    after = ts.flat(state.params)
    assert metrics["n_tokens"] == batch.weights.sum()
    assert metrics["grad_norm"] == pytest.approx(
        np.sqrt(sum(((before[name] - after[name]) ** 2).sum() for name in before)), rel=1e-6
    )
    return plan, float(metrics["loss"]), {name: before[name] - after[name] for name in before}


def assert_equal(ours, theirs):
    assert max(np.abs(array).max() for array in theirs.values()) > 0.1
    assert ts.furthest(ours, theirs) <= 1e-9  # measured: 2e-15


@pytest.mark.parametrize("label_weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.25)])
def test_loss_and_gradients_are_those_of_transformers(torch, label_weights):
    """With padding, in two parts. Weights of labels are those of torch's CrossEntropyLoss(weight)."""
    params = tiny_models.random_params(CONFIG, 5, scale=0.3)
    batch = batch_of(label_weights)
    model, gradients = torch_model(torch, CONFIG, params)
    tokens, labels = (torch.tensor(leaf).flatten(0, 1).long() for leaf in (batch.tokens, batch.targets))
    mask = (torch.arange(11) < torch.tensor(LENGTHS.ravel())[:, None]).long()
    found = model(tokens, attention_mask=mask, labels=labels)
    weight = torch.tensor(label_weights).double()
    loss = torch.nn.CrossEntropyLoss(weight)(found.logits, labels)
    if set(label_weights) == {1.0}:
        assert loss.item() == pytest.approx(found.loss.item(), abs=1e-12)
    loss.backward()
    plan, ours, ours_by_name = step_of(CONFIG, params, batch)
    assert ours == pytest.approx(loss.item(), rel=1e-6)  # the metric is float32
    assert_equal(ours_by_name, gradients())

    flat = jax.tree.map(lambda leaf: leaf.reshape(6, *leaf.shape[2:]), batch)
    nats, weights, confusion = make_eval_step(plan)(init_state(plan, params).params, flat)
    assert float(nats / weights) == pytest.approx(loss.item(), abs=1e-9)  # measured: 0
    got = found.logits.argmax(-1)
    expected = np.zeros((3, 3), int)
    np.add.at(expected, (labels.numpy(), got.numpy()), 1)
    np.testing.assert_array_equal(confusion, expected)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_other_poolings_are_those_written_by_hand_in_torch(torch, pooling):
    config = CONFIG.replace(pooling=pooling)
    params = tiny_models.random_params(config, 5, scale=0.3)
    batch = batch_of()
    model, gradients = torch_model(torch, config, params)
    tokens, labels = (torch.tensor(leaf).flatten(0, 1).long() for leaf in (batch.tokens, batch.targets))
    pooled = []
    for row, n in zip(tokens, LENGTHS.ravel(), strict=True):  # text by text, without padding
        hidden = model.transformer(row[None, :n]).last_hidden_state[0]
        pooled.append(hidden.mean(0) if pooling == "mean" else hidden[0])
    logits = model.score(torch.stack(pooled))
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    _, ours, ours_by_name = step_of(config, params, batch)
    assert ours == pytest.approx(loss.item(), rel=1e-6)
    assert_equal(ours_by_name, gradients())
