"""Loss and gradients of instructions equal those of Hugging Face's GPT2LMHeadModel in float64."""

import checkpoint_forms as forms
import instructions as made
import jax
import numpy as np
import pytest
import training_steps as ts

from gpt2_jax.training.objective import rows_of

pytestmark = pytest.mark.parity
BOUND = 1e-9


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def start(tmp_path, tokenizer):
    """Give call(recipe changes) -> (plan, examples)."""

    def call(**changes):
        path = made.written(tmp_path / "pairs.json")
        recipe = made.recipe(path, compute_dtype="float64", optimizer=made.SGD, **changes)
        return made.plan_and_data(recipe, tokenizer, tmp_path / "run")

    return call


class Peer:
    """Hugging Face's model with the same weights."""

    def __init__(self, torch, config):
        import transformers

        shape = transformers.GPT2Config(**forms.hf_config(config, architectures=...), attn_implementation="eager")
        self.torch, self.model = torch, transformers.GPT2LMHeadModel(shape).eval().double()
        theirs, ours = dict(self.model.named_parameters()), ts.flat(made.params(config))
        self.weights = {name: theirs[f"transformer.{forms.hf_name(name)}"] for name in ours}
        assert len(self.weights) == len(theirs)
        with torch.no_grad():
            for name, array in ours.items():
                self.weights[name].copy_(torch.tensor(array))

    def padded(self, examples):
        """Return loss and gradients of one padded batch of (ids, labels)."""
        longest = max(len(ids) for ids, _ in examples)
        ids = self.torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in examples])
        labels = self.torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in examples])
        real = self.torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in examples])
        self.model.zero_grad()
        loss = self.loss(labels, input_ids=ids, attention_mask=real)
        loss.backward()
        return loss.item(), self.gradients()

    def alone(self, examples):
        """Return the same, from one call for each example."""
        n_targets = [sum(label != -100 for label in labels[1:]) for _, labels in examples]
        self.model.zero_grad()
        total = 0.0
        for (ids, labels), n in zip(examples, n_targets, strict=True):
            nats = self.loss(self.torch.tensor([labels]), input_ids=self.torch.tensor([ids])) * n / sum(n_targets)
            nats.backward()
            total += nats.item()
        return total, self.gradients()

    def loss(self, labels, **inputs):
        """The loss that the model computes of its labels, which it does in float32."""
        logits = self.model(**inputs).logits[:, :-1].flatten(0, 1)
        return self.torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)

    def gradients(self):
        return {name: weight.grad.numpy() for name, weight in self.weights.items()}


def compare(plan, data, expected):
    loss, gradients, batch = made.loss_and_gradients(plan, data)
    assert loss == pytest.approx(expected[0], abs=2e-7 * expected[0])  # the metrics are float32
    assert ts.furthest(gradients, expected[1]) <= BOUND
    assert max(np.abs(leaf).max() for leaf in gradients.values()) > 0.01
    return batch


@pytest.mark.parametrize(("accumulate", "loss_on"), [(1, "answers"), (2, "answers"), (3, "all")])
def test_padded_rows(start, torch, tokenizer, accumulate, loss_on):
    """The mean over all targets of the step, in any number of parts. Measured: 2.2e-16."""
    plan, data = start(accumulate=accumulate, instruction={"loss_on": loss_on})
    examples = [made.ids_and_labels(tokenizer, one, loss_on == "all") for one in made.RECORDS]
    compare(plan, data, Peer(torch, plan.config).padded(examples))


def test_packed_rows_equal_each_pair_alone(start, torch, tokenizer):
    """Measured: 2.2e-16."""
    packing = {"data": {"pack": True, "n_tokens": 131}, "instruction": {"prompt": "{instruction} {input}\n"}}
    plan, data = start(**packing)
    n_rows = len(rows_of(plan, data, data.train))
    assert n_rows < len(made.RECORDS)
    plan, data = start(**packing | {"batch_size": n_rows})
    examples = []
    for one in made.RECORDS:
        asked = tokenizer.encode(f"{one['instruction']} {one.get('input') or ''}\n")
        answer = [*tokenizer.encode(one["output"]), tokenizer.eot]
        examples.append(([*asked, *answer], [-100] * len(asked) + answer))
    batch = compare(plan, data, Peer(torch, plan.config).alone(examples))
    assert batch.segments.max() > 1
