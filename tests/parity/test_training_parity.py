"""Training steps compared with torch: GPT2LMHeadModel and torch.optim from the same weights, on the same batches.

In float64 any difference larger than rounding is a bug. In float32 Adam divides a gradient by its own size. If that is
almost 0, its noise becomes a whole step. So the bound is a fraction of the learning rate.
"""

import checkpoint_forms as forms
import jax
import numpy as np
import pytest
import training_steps as ts

pytestmark = pytest.mark.parity

# Measured: one step of AdamW in float64 1.6e-12 (6.7e-16 but for the key bias), in float32 4.2e-4 of the learning rate;
# ten in float64 4.5e-12, of SGD 2.2e-16.
GRADIENT_BOUNDS = {"float32": 4e-6, "float64": 1e-13}  # of a parameter's largest gradient
CLIP = 2.0  # between the norms of the ten steps
ADAMW = {"learning_rate": 1e-3, "betas": (0.8, 0.93), "weight_decay": 0.3, "epsilon": 1e-8}
N_STEPS = 10


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


class Peer:
    """Torch's model with the weights that `ts.begin` starts from."""

    def __init__(self, torch, recipe):
        import transformers

        config = ts.config_of(recipe, ts.DEEP)
        shape = transformers.GPT2Config(**forms.hf_config(config, architectures=...), attn_implementation="eager")
        self.torch, self.model = torch, transformers.GPT2LMHeadModel(shape).eval()
        self.model.to(getattr(torch, config.param_dtype.name))
        theirs = dict(self.model.named_parameters())
        self.weights = {name: theirs[f"transformer.{forms.hf_name(name)}"] for name in ts.flat(ts.params_of(config))}
        assert len(self.weights) == len(theirs)
        with torch.no_grad():
            for name, array in ts.flat(ts.params_of(config)).items():
                self.weights[name].copy_(torch.tensor(array))

    def backward(self, batch) -> float:
        """Compute in every parameter the gradient of the mean loss over the targets that count."""
        tokens, targets = (self.torch.tensor(leaf).flatten(0, 1).long() for leaf in (batch.tokens, batch.targets))
        weights = self.torch.tensor(batch.weights).flatten()
        self.model.zero_grad()
        logits = self.model(tokens).logits.flatten(0, 1)
        nats = self.torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="none")
        loss = (nats * weights).sum() / weights.sum()
        loss.backward()
        return loss.item()

    def clip(self, most: float) -> float:
        """Scale the gradients to a norm of at most `most`, and return the norm before.

        It does what torch's clip_grad_norm_ does, without the 1e-6 that that adds to the norm.
        """
        gradients = [weight.grad for weight in self.weights.values()]
        norm = self.torch.sqrt(sum((g**2).sum() for g in gradients)).item()
        if 0 < most < norm:
            for g in gradients:
                g *= most / norm
        return norm

    def adamw(self, o):
        """Return torch's AdamW with decay on matrices only."""
        matrices = [weight for weight in self.weights.values() if weight.ndim == 2]
        vectors = [weight for weight in self.weights.values() if weight.ndim == 1]
        groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return self.torch.optim.AdamW(groups, lr=o.learning_rate, betas=o.betas, eps=o.epsilon)

    def run(self, optimizer, batches, rates, clip=0.0):
        """Take one step for each batch. Return flat weights, losses and norms."""
        losses, norms = [], []
        for batch, rate in zip(batches, rates, strict=True):
            losses.append(self.backward(batch))
            norms.append(self.clip(clip))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        return {name: weight.detach().numpy() for name, weight in self.weights.items()}, losses, norms


def test_the_loss_and_every_gradient(torch, dtype):
    """SGD subtracts the gradient. At a learning rate of 2 ** 20, the old weights are smaller than the rounding."""
    rate = 2.0**20
    recipe = ts.recipe(
        compute_dtype=dtype, optimizer={"name": "sgd", "learning_rate": rate, "momentum": 0.0, "clip": 0.0}
    )
    batch, peer = ts.batch(recipe), Peer(torch, recipe)
    their_loss = peer.backward(batch)
    before = ts.flat(ts.params_of(ts.config_of(recipe, ts.DEEP)))
    state, (metrics,) = ts.run(recipe, [batch], ts.DEEP)
    bound = GRADIENT_BOUNDS[dtype]
    assert abs(metrics["loss"] - their_loss) <= bound * their_loss
    assert metrics["n_tokens"] == batch.weights.sum()
    after = ts.flat(state.params)
    for name, weight in peer.weights.items():
        assert after[name].dtype == dtype, name
        ours, theirs = (before[name] - after[name]) / rate, weight.grad.numpy()
        assert np.abs(theirs).max() > 0, name
        assert np.abs(ours - theirs).max() <= bound * np.abs(theirs).max(), name
    norm = np.sqrt(sum((weight.grad.numpy().astype(np.float64) ** 2).sum() for weight in peer.weights.values()))
    assert abs(metrics["grad_norm"] - norm) <= max(bound, 1e-6) * norm


def one_step(torch, dtype):
    recipe = ts.recipe(compute_dtype=dtype, optimizer=ADAMW)
    batch, peer = ts.batch(recipe), Peer(torch, recipe)
    theirs, _, _ = peer.run(peer.adamw(recipe.optimizer), [batch], [ADAMW["learning_rate"]])
    state, _ = ts.run(recipe, [batch], ts.DEEP)
    return ts.flat(state.params), theirs, ts.flat(ts.params_of(ts.config_of(recipe, ts.DEEP)))


def test_one_step_of_adamw_in_float64(torch, x64):
    ours, theirs, before = one_step(torch, "float64")
    assert ts.furthest(ours, before) > 0.9 * ADAMW["learning_rate"]
    assert ts.furthest(ours, theirs) <= 1e-9
    assert ts.furthest(ours, theirs, but=ts.KEY_BIAS) <= 1e-12  # its gradient is 1e-17, below epsilon


def test_one_step_of_adamw_in_float32(torch):
    """Only the key bias, whose gradient is only noise, may differ by up to two whole steps."""
    rate = ADAMW["learning_rate"]
    ours, theirs, before = one_step(torch, "float32")
    ours, theirs = ({name: leaf.copy() for name, leaf in side.items()} for side in (ours, theirs))
    for name in filter(ts.KEY_BIAS.search, ours):
        for side in (ours, theirs):
            key_bias = np.split(side[name], 3)[1]
            assert np.abs(key_bias - np.split(before[name], 3)[1]).max() <= 1.001 * rate
            key_bias[:] = 0
    assert ts.furthest(ours, theirs) <= 1e-2 * rate


@pytest.mark.parametrize("accumulate", [1, 3])
def test_ten_steps_of_adamw_in_float64(torch, x64, accumulate):
    """With warm-up, cosine, clipping of some steps, decay, masked targets, and gradient accumulation."""
    recipe = ts.recipe(
        compute_dtype="float64",
        accumulate=accumulate,
        steps=N_STEPS,
        optimizer=ADAMW | {"schedule": "cosine", "warmup_steps": 3, "clip": CLIP},
    )
    batches = [ts.in_parts(ts.batch(ts.recipe(), seed), accumulate) for seed in range(N_STEPS)]
    peer = Peer(torch, recipe)
    rates = [ts.learning_rate(recipe, step) for step in range(N_STEPS)]
    theirs, losses, norms = peer.run(peer.adamw(recipe.optimizer), batches, rates, CLIP)
    state, seen = ts.run(recipe, batches, ts.DEEP)
    assert min(norms) < CLIP < max(norms)
    np.testing.assert_allclose([one["loss"] for one in seen], losses, rtol=1e-6)  # the metrics are float32
    np.testing.assert_allclose([one["grad_norm"] for one in seen], norms, rtol=1e-6)
    np.testing.assert_allclose([one["learning_rate"] for one in seen], rates, rtol=1e-6)
    assert ts.furthest(ts.flat(state.params), theirs) <= 1e-9


def test_ten_steps_of_sgd_with_momentum_in_float64(torch, x64):
    rates = [0.03] * N_STEPS
    recipe = ts.recipe(
        compute_dtype="float64", optimizer={"name": "sgd", "learning_rate": rates[0], "momentum": 0.7, "clip": CLIP}
    )
    batches = [ts.batch(recipe, seed) for seed in range(N_STEPS)]
    peer = Peer(torch, recipe)
    optimizer = torch.optim.SGD(peer.model.parameters(), lr=rates[0], momentum=0.7)
    theirs, losses, _ = peer.run(optimizer, batches, rates, CLIP)
    state, seen = ts.run(recipe, batches, ts.DEEP)
    np.testing.assert_allclose([one["loss"] for one in seen], losses, rtol=1e-6)
    assert ts.furthest(ts.flat(state.params), theirs) <= 1e-9
