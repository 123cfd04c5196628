"""Each row of docs/coming_from/nanogpt.md on training and the model, which peer_models.py has in NumPy."""

import contextlib
import json

import checkpoint_forms as forms
import coming_from
import forward
import jax
import jax.numpy as jnp
import naive_generation as slow
import numpy as np
import numpy_activations as naive
import numpy_reference
import peer_models
import pytest
import tiny_runs
from tiny_models import CONFIG as TWO_LAYERS

import gpt2_jax
from gpt2_jax import training
from gpt2_jax.params import flatten

CHECKS, test_row, test_each_row_has_a_check = coming_from.part(__file__)
pytestmark = pytest.mark.usefixtures("compiled_once")
CONFIG = TWO_LAYERS.replace(n_layer=1)  # which compiles in half the time
BOUND = 5e-6  # of the largest value; measured: 5e-7
PROMPTS = [[3, 11, 5, 5, 20], [7, 1, 30]]
TOKENS = np.random.default_rng(3).integers(0, CONFIG.n_vocab, (2, 9), dtype=np.int32)


# ---- training


@pytest.fixture(scope="module")
def batch(data):
    return jax.tree.map(lambda leaf: leaf[None], next(training.batches(data.train, 11, 3, seed=0)))


@pytest.fixture(scope="module")
def whole(plan, data, tmp_path_factory):
    """(run folder, Fitted) of a run of four steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, training.fit(plan, tiny_runs.params(), data, folder)


@CHECKS("model.configure_optimizers(...)")
def configure_optimizers(row):
    """Without gradients, a step changes what decays: the arrays of two dimensions."""
    recipe = tiny_runs.small(optimizer={"weight_decay": 0.1})
    plan = row.run(config=tiny_runs.CONFIG, recipe=recipe)["plan"]
    ones = {name: jnp.ones(leaf.shape) for name, leaf in flatten(plan.state.params).items()}
    nothing = jax.tree.map(jnp.zeros_like, ones)
    updates, _ = jax.jit(plan.optimizer.update)(nothing, plan.optimizer.init(ones), ones)
    for name, update in updates.items():
        np.testing.assert_allclose(update, 0.1 if ones[name].ndim == 2 else 0.0, err_msg=name)


@CHECKS("model = torch.compile(model)")
def compiled(row, plan, data):
    train_step = row.run(plan=plan)["train_step"]
    state, stream = training.init_state(plan, tiny_runs.params()), training.batches(data.train, 11, 3, seed=0)
    with contextlib.closing(stream):
        for _ in range(2):
            state, _ = train_step(state, jax.tree.map(lambda leaf: leaf[None], next(stream)))
    assert train_step._cache_size() == 1


@CHECKS("logits, loss = model(X, Y) and loss.backward()")
def train_step(row, plan, batch):
    params = tiny_runs.params()
    state = training.init_state(plan, params)
    known = row.run(train_step=training.make_train_step(plan), state=state, batch=batch)
    nats = tiny_runs.mean_nats(params, 3, batch.tokens[0], batch.targets[0])
    assert float(known["metrics"]["loss"]) == pytest.approx(nats, rel=1e-5)
    moved = np.abs(np.asarray(known["state"].params["wte"]) - np.asarray(params["wte"])).max()
    assert 0.009 < moved < 0.011  # the first step of Adam is the learning rate


@CHECKS("estimate_loss()")
def estimate_loss(row, plan, data):
    params = tiny_runs.params()
    (batch,) = training.windows(data.val, 11, 3, at_most=3)
    known = row.run(plan=plan, params=params, batch=batch)
    nats = tiny_runs.mean_nats(params, 3, batch.tokens, batch.targets)
    assert float(known["nats"] / known["n"]) == pytest.approx(nats, rel=1e-5)


@CHECKS("--init_from=resume")
def resume(row, data, tmp_path, whole):
    """Two steps, then two more: the bits of a run of four; it says so in the folder's metrics."""
    first = training.make_plan(tiny_runs.CONFIG, tiny_runs.small(steps=2))
    training.fit(first, tiny_runs.params(), data, tmp_path / "run")
    more = training.make_plan(tiny_runs.CONFIG, tiny_runs.small(steps=4))
    fitted = row.run(plan=more, data=data, run_dir=tmp_path / "run")["fitted"]
    assert fitted.step == whole[1].step == 4
    assert forms.difference(fitted.params, forms.leaves(whole[1].params)) == ""
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]
    assert all("mfu" in record for record in records if "loss" in record)


@CHECKS("out/ckpt.pt")
def checkpoint(row, whole):
    folder, fitted = whole
    assert fitted.best_step is None or fitted.best_step == 4
    known = row.run(run_dir=folder)
    assert known["config"].to_hparams() == tiny_runs.CONFIG.to_hparams()
    assert forms.difference(known["params"], forms.leaves(fitted.params)) == ""
    at_step = gpt2_jax.load(folder / "checkpoints" / "4")[1]
    assert forms.difference(at_step, forms.leaves(fitted.params)) == ""


# ---- model


@CHECKS('GPT.from_pretrained("gpt2")')
def released(row):
    coming_from.assert_is_the_release(row)


@CHECKS("logits, _ = model(idx)")
def logits(row, params):
    found = row.compiled(config=CONFIG, params=params, tokens=TOKENS)
    assert naive.error(found, numpy_reference.forward(params, TOKENS, CONFIG.n_head)) < BOUND


@CHECKS("_, loss = model(idx, targets)")
def loss(row, params):
    nats = tiny_runs.mean_nats(params, CONFIG.n_head, [PROMPTS[0][:-1]], [PROMPTS[0][1:]])
    assert row.run(config=CONFIG, params=params, prompts=PROMPTS) == pytest.approx(nats, rel=1e-5)


@CHECKS("model.crop_block_size(8)")
def crop(row, params):
    config, cropped = row.run(config=CONFIG, params=params)
    ours = forward.logits_of(config, cropped, TOKENS[:, :8])
    assert naive.error(ours, numpy_reference.forward(params, TOKENS[:, :8], CONFIG.n_head)) < BOUND
    with pytest.raises(ValueError, match="n_ctx"):
        forward.logits_of(config, cropped, TOKENS)


@CHECKS("model.get_num_params()")
def num_params(row):
    """Of GPT-2 124M: FACTS of the release, without 1,024 positions of 768 numbers."""
    assert row.run(config=gpt2_jax.SIZES["124M"]) == 124_439_808 - 1024 * 768


@CHECKS("model.generate(idx, 8, temperature=0.8, top_k=5)")
def generate(row, params):
    found = row.run(config=CONFIG, params=params, prompts=PROMPTS)
    for i, (prompt, new) in enumerate(zip(PROMPTS, found, strict=True)):
        assert new == slow.sampled(CONFIG, params, prompt, new, i, seed=0, temperature=0.8, top_k=5)
        assert len(new) == 8


@CHECKS('python sample.py --init_from=gpt2-xl --start="Once" --num_samples=5 --max_new_tokens=100')
def sample(row):
    args = row.parse()
    assert (args.model, args.prompt, args.num_samples, args.sampling.max_new_tokens) == ("gpt2-xl", ("Once",), 5, 100)


@CHECKS('python sample.py --out_dir=out --start="FILE:prompt.txt"')
def sample_file(row):
    args = row.parse()
    assert (args.model, [str(path) for path in args.prompt_file]) == ("out", ["prompt.txt"])


@CHECKS("ckpt.pt of nanoGPT")
def converted(row):
    """With and without biases; of a compiled model; and how far the exact GELU is, as the page says: slightly."""
    convert = coming_from.functions("nanogpt")["from_nanogpt"]
    for bias in (True, False):
        state = peer_models.nanogpt_state(CONFIG, np.random.default_rng(7), bias)
        saved = {f"_orig_mod.{key}": array for key, array in state.items()}
        saved["_orig_mod.transformer.h.0.attn.bias"] = np.ones((1, 1, 41, 41), np.float32)
        ours = row.run(state_dict=saved, from_nanogpt=convert)["params"]
        found = forward.logits_of(CONFIG, ours, TOKENS[:1])[0]
        tanh, exact = (
            peer_models.nanogpt_logits(state, TOKENS[0], CONFIG.n_head, gelu)
            for gelu in (numpy_reference.gelu_tanh, numpy_reference.gelu_erf)
        )
        assert naive.error(found, tanh) < BOUND
        assert 1e-5 < naive.error(tanh, exact) < 0.01
