"""Each row of docs/coming_from/nanogpt.md on data and config. nanoGPT is not installed: its formulas are here."""

import contextlib
import functools
import json
import math
import shlex

import coming_from
import numpy as np
import pytest
import tiny_runs

from gpt2_jax import training
from gpt2_jax.commands import prepare
from gpt2_jax.training.optimizer import make_schedule

CHECKS, test_row, test_each_row_has_a_check = coming_from.part(__file__)


# ---- data


def prepared(row, folder):
    """Run the row's command with the embedded vocabulary; the ids of train.bin and val.bin."""
    args = row.parse()
    assert args.tokenizer == "gpt2"
    words = shlex.split(row.code[0].replace("--tokenizer gpt2", "--tokenizer shakespeare"))
    with contextlib.chdir(folder):
        prepare.main(words[1:])
    return [np.fromfile(folder / args.output / f"{split}.bin", "<u2").tolist() for split in ("train", "val")]


@CHECKS("python data/shakespeare/prepare.py")
def prepare_shakespeare(row, tmp_path, tokenizer):
    (tmp_path / "input.txt").write_text(tiny_runs.TEXT)
    ids = tokenizer.encode(tiny_runs.TEXT)
    n_train = int(len(ids) * 0.9)
    assert prepared(row, tmp_path) == [ids[:n_train], ids[n_train:]]


@CHECKS("python data/openwebtext/prepare.py")
def prepare_openwebtext(row, tmp_path, tokenizer):
    texts = [f"Document {i}, {'long ' * i}<|endoftext|>" for i in range(60)]
    (tmp_path / "openwebtext.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ids = [i for text in texts for i in [*tokenizer.encode(text), 1280]]
    train, val = prepared(row, tmp_path)
    assert train + val == ids
    assert ids.count(1280) == 60
    assert row.parse().val_fraction == 0.0005


@pytest.fixture(scope="module")
def bins(tmp_path_factory):
    """A folder with nanoGPT's files: no id twice, so that a window shows where it begins."""
    folder = tmp_path_factory.mktemp("nanogpt")
    ids = np.random.default_rng(1).permutation(1281).astype(np.uint16)
    ids[:1200].tofile(folder / "train.bin")
    ids[1200:].tofile(folder / "val.bin")
    return folder, ids


@CHECKS("train.bin, val.bin")
def token_files(row, bins, tokenizer):
    data = row.run(folder=bins[0], tokenizer=tokenizer)["data"]
    for split, ids in ((data.train, bins[1][:1200]), (data.val, bins[1][1200:])):
        np.testing.assert_array_equal(split.read(0, split.n_tokens)[0], ids)


@CHECKS('get_batch("train")')
def get_batch(row, bins, tokenizer):
    data = training.open_prepared(bins[0], tokenizer)
    batch = row.run(data=data, block_size=13, batch_size=5)
    assert batch.tokens.shape == (5, 13)
    for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
        start = bins[1].tolist().index(tokens[0])
        np.testing.assert_array_equal(tokens, bins[1][start : start + 13])
        np.testing.assert_array_equal(targets, bins[1][start + 1 : start + 14])
    n_steps = math.ceil(1199 / 13) // 5  # of an epoch
    with contextlib.closing(training.batches(data.train, 13, 5, seed=0)) as stream:
        seen = np.concatenate([next(stream).tokens.ravel() for _ in range(n_steps)])
    assert len(set(seen.tolist())) > 0.9 * 1200


# ---- config

OPTIONS = {
    "python train.py config/train_gpt2.py": {
        "model.source": "", "model.n_layer": 12, "model.n_head": 12, "model.n_embd": 768, "model.n_ctx": 1024,
        "model.dropout": 0.0, "batch_size": 12 * 40, "accumulate": 40, "steps": 600_000, "compute_dtype": "bfloat16",
        "optimizer.learning_rate": 6e-4, "optimizer.warmup_steps": 2000, "optimizer.final_fraction": 6e-5 / 6e-4,
        "optimizer.schedule": "cosine", "optimizer.betas": (0.9, 0.95), "optimizer.weight_decay": 0.1,
        "optimizer.clip": 1.0, "optimizer.name": "adamw", "data.path": "data/openwebtext",
    },
    "--batch_size=12 --gradient_accumulation_steps=40": {"batch_size": 12 * 40, "accumulate": 40},
    '--block_size=256 with init_from="gpt2"': {"data.n_tokens": 256},
    "--n_layer=6 --n_head=6 --n_embd=384 --block_size=256": {
        "model.n_layer": 6, "model.n_head": 6, "model.n_embd": 384, "model.n_ctx": 256
    },
    "--max_iters=5000 --lr_decay_iters=5000": {"steps": 5000},
    "--beta1=0.9 --beta2=0.95": {"optimizer.betas": (0.9, 0.95)},
    "--weight_decay=0.1 --grad_clip=1.0": {"optimizer.weight_decay": 0.1, "optimizer.clip": 1.0},
    "--dropout=0.2": {"model.dropout": 0.2},
    "--dtype=bfloat16": {"compute_dtype": "bfloat16"},
    "--init_from=scratch": {"model.source": "", "model.tokenizer": "gpt2"},
    "--init_from=gpt2-xl": {"model.source": "gpt2-xl"},
    "--eval_interval=200 --eval_iters=100": {"monitor.evaluate_every": 200, "monitor.evaluate_windows": 100 * 12},
    "--always_save_checkpoint=True": {"monitor.save_every": 200},
    "torchrun --nproc_per_node=4 train.py": {"mesh.data": 4},
    "--wandb_log=True": {"monitor.tensorboard": True},
}  # fmt: skip


@CHECKS(*OPTIONS)
def option(row):
    recipe = row.parse().recipe
    for name, value in OPTIONS[row.theirs].items():
        assert functools.reduce(getattr, name.split("."), recipe) == value, name


@CHECKS("--out_dir=out")
def out_dir(row):
    assert str(row.parse().run) == "out"


def their_rate(step, peak=6e-4, warmup=2000, steps=600_000, least=6e-5):
    """nanoGPT's get_lr, from its formula."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


RATES = "--optimizer.learning-rate 6e-4 --optimizer.final-fraction 0.1 --optimizer.warmup-steps 2000"


@CHECKS("--learning_rate=6e-4 --min_lr=6e-5", "--warmup_iters=2000")
def schedule(row):
    """With these options the learning rates are theirs, but for one step of the warm-up, as the note says."""
    assert row.code[0] in RATES
    ours = make_schedule(coming_from.parse(RATES).recipe.optimizer, 600_000)
    for step in (0, 3, 999, 1999, 2000, 5000, 300_000, 599_999):
        assert float(ours(step)) == pytest.approx(their_rate(step), rel=6e-4), step
    assert float(ours(1998)) < float(ours(1999)) == np.float32(6e-4)
    assert their_rate(1999) < their_rate(2000) == 6e-4


@CHECKS("--decay_lr=False")
def constant(row):
    ours = make_schedule(row.parse().recipe.optimizer, 100)
    assert float(ours(0)) == float(ours(50)) == float(ours(99)) == np.float32(1e-4)
