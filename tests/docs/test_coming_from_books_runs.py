"""Each row of docs/coming_from/books.md on text, generation and training, against slow loops in NumPy."""

import contextlib
import json
import shlex

import checkpoint_forms as forms
import coming_from
import jax
import jax.numpy as jnp
import naive_generation as slow
import numpy as np
import numpy_activations as naive
import numpy_reference
import pytest
import tiny_runs
from tiny_models import CONFIG as TWO_LAYERS

import gpt2_jax
from gpt2_jax import training
from gpt2_jax.commands import prepare
from gpt2_jax.params import flatten

CHECKS, test_row, test_each_row_has_a_check = coming_from.part(__file__)
pytestmark = pytest.mark.usefixtures("compiled_once")
CONFIG = TWO_LAYERS.replace(n_layer=1)  # which compiles in half the time
BOUND = 5e-6  # of the largest value; measured: 3e-7
PROMPTS = [[3, 11, 5, 5, 20], [7, 1, 30]]
TOKENS = np.random.default_rng(3).integers(0, CONFIG.n_vocab, (2, 9), dtype=np.int32)


@pytest.fixture
def run(params):
    """Run a row's code on the tiny model."""
    names = {"config": CONFIG, "params": params, "prompts": PROMPTS, "tokens": TOKENS}
    return lambda row, **more: row.run(**(names | more))


@pytest.fixture
def apply(params):
    """Run a row's code on the tiny model, in one program."""
    return lambda row, **more: row.compiled(**({"config": CONFIG, "params": params, "tokens": TOKENS} | more))


# ---- text in, text out


@CHECKS('tiktoken.get_encoding("gpt2")')
def get_encoding(row, model_dir):
    tokenizer = row.run(folder=model_dir)["tokenizer"]
    assert tokenizer.tokens == json.loads((model_dir / "encoder.json").read_text(encoding="utf-8"))


@CHECKS('tokenizer.encode(text, allowed_special={"<|endoftext|>"})')
def encode(row, tokenizer):
    """As tiktoken itself, whose method this is, on the same vocabulary; and without the argument."""
    text = "a<|endoftext|>b"
    theirs = tokenizer._backend._encoding.encode(text, allowed_special={"<|endoftext|>"})
    assert row.run(tokenizer=tokenizer, text=text) == theirs == [*tokenizer.encode("a"), 1280, *tokenizer.encode("b")]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 1280 not in tokenizer.encode(text)
    with pytest.raises(ValueError, match="special"):
        tokenizer._backend._encoding.encode(text)


@CHECKS("text_to_token_ids(text, tokenizer)", "token_ids_to_text(ids, tokenizer)")
def ids_and_back(row, tokenizer):
    text = "Every effort moves you"
    ids = jnp.asarray([tokenizer.encode(text)])
    found = row.run(tokenizer=tokenizer, text=text, ids=ids)
    assert found == text if isinstance(found, str) else np.array_equal(found, ids) and found.shape[0] == 1


@CHECKS("model = GPTModel(cfg)")
def new_model(row):
    params, again = (row.compiled("params", config=CONFIG) for _ in range(2))
    assert forms.leaves(params).keys() == forms.shapes(CONFIG).keys()
    assert {name: leaf.shape for name, leaf in forms.leaves(params).items()} == forms.shapes(CONFIG)
    assert forms.difference(params, forms.leaves(again)) == ""
    assert float(np.std(params["wte"])) == pytest.approx(0.02, rel=0.1)


@CHECKS("model.eval() and model(idx)")
def eval_mode(row, apply, params):
    assert naive.error(apply(row), numpy_reference.forward(params, TOKENS, CONFIG.n_head)) < BOUND


@CHECKS("model.train() and model(idx)")
def train_mode(row, apply, params):
    found = [apply(row, key=jax.random.key(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(found[0], found[1])
    assert naive.error(found[0], found[2]) > 0.01
    off = CONFIG.replace(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    expected = numpy_reference.forward(params, TOKENS, CONFIG.n_head)
    assert naive.error(apply(row, key=jax.random.key(1), config=off), expected) < BOUND


@CHECKS("generate_text_simple(model, idx, 8, context_size)")
def generate_text_simple(row, run, params):
    for prompt, new in zip(PROMPTS, run(row), strict=True):
        assert new == slow.greedy(CONFIG, params, prompt, new)
        assert len(new) == 8


@CHECKS("generate(model, idx, 8, context_size, temperature=1.4, top_k=5)")
def generate(row, run, params):
    for i, (prompt, new) in enumerate(zip(PROMPTS, run(row), strict=True)):
        assert new == slow.sampled(CONFIG, params, prompt, new, i, seed=123, temperature=1.4, top_k=5)
        for logits_V, chosen in zip(slow.logits_before(CONFIG, params, prompt, new), new, strict=True):
            assert chosen in np.argsort(logits_V)[-5:]


@CHECKS("generate(..., eos_id=50256)")
def eos(row, run, params):
    plain = gpt2_jax.generate(CONFIG, params, PROMPTS, 8)
    eot = plain[1][2]
    assert run(row, eot=eot) == [slow.cut_at_ids(new, [eot]) for new in plain]
    assert len(run(row, eot=eot)[1]) <= 2


@CHECKS("sum(p.numel() for p in model.parameters())")
def count(row):
    """The note's numbers: wte counts twice in the book's model."""
    ours = row.run(config=gpt2_jax.SIZES["124M"])
    assert f"{ours:,}" == "124,439,808"
    assert f"{ours:,}" in row.note
    assert f"{ours + 50257 * 768:,}" in row.note


# ---- train and evaluate


@CHECKS("create_dataloader_v1(text, batch_size, max_length, stride)")
def create_dataloader(row, tmp_path, tokenizer):
    (tmp_path / "text.txt").write_text(tiny_runs.TEXT)
    known = row.run(path=tmp_path / "text.txt", data_dir=tmp_path / "tokens", tokenizer=tokenizer)
    parts = [split.read(0, split.n_tokens)[0] for split in (known["data"].train, known["data"].val)]
    assert np.concatenate(parts).tolist() == tokenizer.encode(tiny_runs.TEXT)
    assert (tmp_path / "tokens" / "train.bin").is_file()


@CHECKS("for x, y in train_loader")
def train_loader(row, data):
    """Targets are the tokens shifted by one; an epoch reads nearly all tokens."""
    ids = data.train.read(0, data.train.n_tokens)[0].tolist()
    n_windows = -(-(len(ids) - 1) // 11)
    places = []
    with contextlib.closing(row.run(data=data, max_length=11, batch_size=1)) as stream:
        for _ in range(n_windows):
            batch = next(stream)
            window = [*batch.tokens[0].tolist(), int(batch.targets[0, -1])]
            assert batch.targets[0, :-1].tolist() == window[1:-1]
            places.append([start for start in range(len(ids)) if ids[start : start + 12] == window])
    assert all(places)
    assert len({i for start, *_ in places for i in range(start, start + 12)}) > 0.85 * len(ids)


@CHECKS("for x, y in val_loader")
def val_loader(row, data):
    ids = data.val.read(0, data.val.n_tokens)[0]
    batches = list(row.run(data=data, max_length=11, batch_size=2))
    tokens, targets = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("tokens", "targets"))
    n_windows = (len(ids) - 1) // 11
    np.testing.assert_array_equal(tokens[:n_windows], ids[: n_windows * 11].reshape(-1, 11))
    np.testing.assert_array_equal(targets[:n_windows], ids[1 : n_windows * 11 + 1].reshape(-1, 11))


@CHECKS("calc_loss_batch(x, y, model, device)")
def loss_of_a_batch(row, data, plan):
    params, batch = tiny_runs.params(), next(training.windows(data.val, 11, 3))
    known = row.run(plan=plan, params=params, batch=batch)
    nats = tiny_runs.mean_nats(params, 3, batch.tokens, batch.targets)
    assert float(known["nats"] / known["n"]) == pytest.approx(nats, rel=1e-5)


@CHECKS("calc_loss_loader(val_loader, model, device)")
def loss_of_a_loader(row, data, plan):
    """Over all windows, the last batch filled up with rows that do not count."""
    params, eval_step = tiny_runs.params(), training.make_eval_step(plan)
    batches = list(training.windows(data.val, 11, 3))
    found = row.run(sums=[eval_step(params, batch) for batch in batches])
    ids = data.val.read(0, data.val.n_tokens)[0]
    n_windows = (len(ids) - 1) // 11
    assert n_windows % 3
    rows = ids[: n_windows * 11].reshape(-1, 11), ids[1 : n_windows * 11 + 1].reshape(-1, 11)
    assert float(found) == pytest.approx(tiny_runs.mean_nats(params, 3, *rows), rel=1e-5)


@pytest.fixture(scope="module")
def trained(plan, data, tmp_path_factory, tokenizer):
    """What the row of train_model_simple gives, and the run's folder."""
    folder = tmp_path_factory.mktemp("run") / "run"
    (row,) = (row for row in CHECKS.rows if row.theirs.startswith("train_model_simple"))
    names = {"plan": plan, "params": tiny_runs.params(), "data": data, "run_dir": folder, "tokenizer": tokenizer}
    return row.run(**names)["fitted"], folder


@CHECKS("train_model_simple(model, train_loader, val_loader, optimizer, device, num_epochs)")
def train_model_simple(row, trained, plan, data):
    """Four steps; the loss it names is that of the params it gives, and less than before."""
    fitted, folder = trained
    assert (fitted.step, fitted.stopped) == (4, "")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    loaded = gpt2_jax.load(folder)[1]
    assert forms.difference(loaded, forms.leaves(fitted.params)) == ""


@CHECKS("plot_losses(...)")
def plot_losses(row, plan, data, tmp_path):
    """Of a run whose curve is drawn."""
    from gpt2_jax.training.curve import plot_curve

    training.fit(plan, tiny_runs.params(), data, tmp_path / "run")
    assert row.code[0] == tiny_runs.CURVE
    plot_curve(tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / row.code[0])
    assert (tmp_path / "run" / row.code[0]).read_bytes().startswith(b"\x89PNG")


@CHECKS("torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)")
def adamw(row):
    """Every array decays, as by torch's AdamW of all parameters; by default only matrices do."""
    parsed = row.parse().recipe.optimizer
    assert (parsed.learning_rate, parsed.weight_decay, parsed.name) == (4e-4, 0.1, "adamw")
    default = coming_from.parse("--optimizer.weight-decay 0.1").recipe.optimizer
    for optimizer, decays in ((parsed, lambda leaf: True), (default, lambda leaf: leaf.ndim == 2)):
        recipe = tiny_runs.small(optimizer={"weight_decay": 0.1, "decay": optimizer.decay})
        plan = training.make_plan(tiny_runs.CONFIG, recipe)
        ones = {name: jnp.ones(leaf.shape) for name, leaf in flatten(plan.state.params).items()}
        nothing = jax.tree.map(jnp.zeros_like, ones)
        updates, _ = jax.jit(plan.optimizer.update)(nothing, plan.optimizer.init(ones), ones)
        assert {name for name, update in updates.items() if update.any()} == {n for n, x in ones.items() if decays(x)}


@CHECKS('torch.save(model.state_dict(), "model.pth")', 'model.load_state_dict(torch.load("model.pth"))')
def save_and_load(row, monkeypatch, tmp_path, tokenizer):
    monkeypatch.chdir(tmp_path)
    config, params = tiny_runs.CONFIG, tiny_runs.params()
    if row.theirs.startswith("model."):
        gpt2_jax.save("model", config, params, tokenizer=tokenizer)
        known = row.run()
        assert known["config"].to_hparams() == config.to_hparams()
        assert forms.difference(known["params"], forms.leaves(params)) == ""
    else:
        row.run(config=config, params=params, tokenizer=tokenizer)
        assert {path.name for path in (tmp_path / "model").iterdir()} >= {
            "hparams.json",
            "model.ckpt.index",
            "vocab.bpe",
        }
        assert forms.difference(gpt2_jax.load("model")[1], forms.leaves(params)) == ""


@CHECKS("custom_collate_fn with ignore_index=-100")
def collate(row, tmp_path, tokenizer):
    """The mask is 1 at each completion and at the end-of-text after it."""
    pairs = [{"instruction": f"Say {i}.", "output": f" It is {i * i}."} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    with contextlib.chdir(tmp_path):
        prepare.main([*shlex.split(row.code[0])[1:], "--val-fraction", "0"])
    ids, counts = [], []
    for pair in pairs:
        prompt, completion = (tokenizer.encode(pair[name]) for name in ("instruction", "output"))
        ids += [*prompt, *completion, 1280]
        counts += [0] * len(prompt) + [1] * (len(completion) + 1)
    tokens = training.open_prepared(tmp_path / "data" / "pairs", tokenizer).train
    found = tokens.read(0, tokens.n_tokens)
    assert (found[0].tolist(), found[1].tolist()) == (ids, counts)
