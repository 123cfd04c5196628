"""Each row of docs/coming_from/flax.md on generation, dtypes and training, against slow loops in NumPy."""

import checkpoint_forms as forms
import coming_from
import forward
import jax
import jax.numpy as jnp
import naive_generation as slow
import numpy as np
import numpy_activations as naive
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_models import CONFIG

import gpt2_jax
from gpt2_jax.recipe import Recipe

CHECKS, test_row, test_each_row_has_a_check = coming_from.part(__file__)
TOKENS = np.random.default_rng(3).integers(0, CONFIG.n_vocab, (2, 7), dtype=np.int32)
PROMPTS = [[3, 11, 5, 5, 20], [7, 1, 30]]


@pytest.fixture
def run(params):
    """Run a row's code on the tiny model."""
    return lambda row, **more: row.run(**({"config": CONFIG, "params": params, "prompts": PROMPTS} | more))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(folder, flat): a model in Hugging Face's form, written without the package."""
    folder, flat = tmp_path_factory.mktemp("model"), forms.random_model(CONFIG)
    return forms.write_huggingface(folder, CONFIG, forms.hf_tensors(flat)), flat


# ---- generate


@CHECKS("model.generate(input_ids, max_new_tokens=8)")
def greedy(row, run, params):
    for prompt, new in zip(PROMPTS, run(row), strict=True):
        assert new == slow.greedy(CONFIG, params, prompt, new)
        assert len(new) == 8


@CHECKS("do_sample=True, temperature=0.8, top_k=5, prng_key=key")
def sampled(row, run, params):
    found = run(row)
    for i, (prompt, new) in enumerate(zip(PROMPTS, found, strict=True)):
        assert new == slow.sampled(CONFIG, params, prompt, new, i, seed=0, temperature=0.8, top_k=5)
        for logits_V, chosen in zip(slow.logits_before(CONFIG, params, prompt, new), new, strict=True):
            assert chosen in np.argsort(logits_V)[-5:]
    assert found != [slow.greedy(CONFIG, params, *pair) for pair in zip(PROMPTS, found, strict=True)]


@CHECKS("top_p=0.9")
def top_p(row, run, params):
    """Every token is one of the fewest whose probabilities reach p."""
    kept = []
    for i, (prompt, new) in enumerate(zip(PROMPTS, run(row), strict=True)):
        for logits_V, chosen in zip(slow.logits_before(CONFIG, params, prompt, new), new, strict=True):
            p = np.exp(logits_V - logits_V.max())
            order = np.argsort(-p)
            kept.append(1 + int((np.cumsum(p[order] / p.sum()) < 0.9).sum()))
            assert chosen in order[: kept[-1]]
        assert new == slow.sampled(CONFIG, params, prompt, new, i, seed=0, top_p=0.9, top_p_rule="common")
    assert max(kept) < CONFIG.n_vocab


@CHECKS("eos_token_id=eot")
def eos(row, run, params):
    plain = gpt2_jax.generate(CONFIG, params, PROMPTS, 8)
    eot = plain[0][3]
    assert run(row, eot=eot) == [slow.cut_at_ids(new, [eot]) for new in plain]
    assert len(run(row, eot=eot)[0]) <= 3


@CHECKS("max_length=20")
def max_length(row, run):
    assert len(PROMPTS[0]) + len(run(row, prompts=PROMPTS[:1])[0]) == 20


# ---- dtype and devices


@CHECKS("from_pretrained(name, dtype=jnp.bfloat16)")
def compute_dtype(row, run, params):
    config = run(row)["config"]
    logits = forward.logits_of(config, params, TOKENS)
    assert (config.param_dtype, logits.dtype) == (np.float32, np.float32)
    assert 1e-4 < naive.error(logits, naive.forward(CONFIG, params, TOKENS)[0]) < 0.1


@CHECKS("model.params = model.to_bf16(model.params)")
def to_bf16(row, folder):
    known = row.run(folder=folder[0])
    rounded = {name: array.astype(jnp.bfloat16) for name, array in folder[1].items()}
    assert forms.difference(known["params"], rounded) == ""
    assert known["config"].param_dtype == jnp.bfloat16


@CHECKS("jax_utils.replicate(params) for pmap")
def replicate(row, folder):
    sharding = NamedSharding(jax.sharding.Mesh(jax.devices()[:1], ("data",)), PartitionSpec())
    known = row.run(folder=folder[0], sharding=sharding)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(known["params"]))
    assert forms.difference(known["params"], folder[1]) == ""


# ---- fine-tune

OPTIONS = {
    "--model_name_or_path gpt2": {"model.source": "gpt2"},
    "--train_file corpus.txt": {"data.path": "corpus.txt"},
    "--validation_split_percentage 5": {"data.val_fraction": 0.05},
    "--block_size 128": {"data.n_tokens": 128},
    "--per_device_train_batch_size 8": {"batch_size": 8},
    "--num_train_epochs 3": {"epochs": 3.0},
    "--learning_rate 5e-5 --warmup_steps 100": {"optimizer.learning_rate": 5e-5, "optimizer.warmup_steps": 100},
    "--weight_decay 0.01": {"optimizer.weight_decay": 0.01},
    "--adam_beta1 0.9 --adam_beta2 0.999": {"optimizer.betas": (0.9, 0.999)},
    "--adafactor": {"optimizer.name": "adafactor"},
    "--dtype bfloat16": {"compute_dtype": "bfloat16"},
}


@CHECKS(*OPTIONS)
def option(row):
    recipe = row.parse().recipe
    for name, value in OPTIONS[row.theirs].items():
        found = recipe
        for part in name.split("."):
            found = getattr(found, part)
        assert found == value, name


@CHECKS("--output_dir out")
def output_dir(row):
    args = row.parse()
    assert str(args.run) == "out"
    assert args.recipe == Recipe()
