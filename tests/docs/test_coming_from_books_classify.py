"""Each row of docs/coming_from/books.md on classification, against definitions in NumPy."""

import dataclasses
import json

import coming_from
import jax
import numpy as np
import numpy_activations as naive
import pytest
import tiny_models

import gpt2_jax
from gpt2_jax import training
from gpt2_jax.data import Batch
from gpt2_jax.recipe import from_dict
from gpt2_jax.training import classifying, loop

CHECKS, test_row, test_each_row_has_a_check = coming_from.part(__file__)
CONFIG = tiny_models.CONFIG.replace(n_layer=2, labels=("ham", "spam"))
TEXTS = [[3, 11, 5, 5, 20], [7, 1, 30]]
TINY = {
    "objective": "classification",
    "steps": 2,
    "batch_size": 4,
    "model": {"source": "", "tokenizer": "shakespeare", "n_ctx": 16, "n_embd": 12, "n_head": 3, "n_layer": 1},
    "monitor": {"tensorboard": False},
}


@pytest.fixture(scope="module")
def params():
    return tiny_models.random_params(CONFIG, 5, scale=0.3)


@pytest.fixture(scope="module")
def logits(params):
    """Of each text alone, from its last hidden state."""
    hidden = [gpt2_jax.GPT2(CONFIG).apply({"params": params}, np.array([text]), method="hidden")[0] for text in TEXTS]
    return np.stack([np.asarray(h[0, -1] @ params["score"]["w"]) for h in hidden])


def padded():
    tokens, mask = np.full((2, 5), 36), np.zeros((2, 5), bool)
    for b, text in enumerate(TEXTS):
        tokens[b, : len(text)], mask[b, : len(text)] = text, True
    return tokens, mask


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The data, the plan and the folder of a run, whose data are made by the row of SpamDataset."""
    folder = tmp_path_factory.mktemp("spam")
    lines = [f"{'spam' if i % 3 == 0 else 'ham'},{'Win' if i % 3 == 0 else 'Meet'} {i}" for i in range(40)]
    (folder / "texts.csv").write_text("label,text\n" + "\n".join(lines) + "\n")
    options = "--classification.balance undersample --data.val-fraction 0.1 --data.test-fraction 0.2"
    recipe = coming_from.parse(options).recipe
    recipe = dataclasses.replace(
        from_dict(training.Recipe, TINY),
        classification=recipe.classification,
        data=dataclasses.replace(recipe.data, path=str(folder / "texts.csv")),
    )
    tokenizer = gpt2_jax.load_tokenizer("shakespeare")
    (row,) = (row for row in CHECKS.rows if row.theirs.startswith("SpamDataset"))
    data = row.run(recipe=recipe, tokenizer=tokenizer, run_dir=folder / "run")["data"]
    plan, params, tokenizer = training.start_model(recipe, folder / "run", data)
    training.fit(plan, params, data, folder / "run", tokenizer)
    return data, plan, folder / "run"


@CHECKS("create_balanced_dataset(df)", "random_split(balanced_df, 0.7, 0.1)")
def splits(row, trained):
    """14 of 40 texts are spam; 28 are kept."""
    data, _, _ = trained
    parsed = row.parse().recipe
    wanted = (parsed.classification.balance, parsed.data.val_fraction, parsed.data.test_fraction)
    assert wanted in (("undersample", 0.1, 0.0), ("none", 0.1, 0.2))
    assert {name: len(split) for name, split in data.by_split().items()} == {"train": 19, "val": 3, "test": 6}
    labels = np.concatenate([split.labels for split in data.by_split().values()])
    assert [(labels == i).sum() for i in (0, 1)] == [14, 14]


@CHECKS('SpamDataset("train.csv", tokenizer, max_length=120)')
def dataset(row, trained):
    data, plan, _ = trained
    tokenizer = gpt2_jax.load_tokenizer("shakespeare")
    texts = [tokenizer.decode(data.train.read(i)[0].tolist()) for i in range(len(data.train))]
    assert all(text.startswith(("Meet", "Win")[label]) for text, label in zip(texts, data.train.labels, strict=True))
    assert plan.n_tokens == data.longest


@CHECKS("model.out_head = torch.nn.Linear(768, num_classes)")
def out_head(row, params):
    assert row.run(params=params).shape == (CONFIG.n_embd, 2)
    assert set(params["score"]) == {"w"}


@CHECKS("for param in model.trf_blocks[-1].parameters(): param.requires_grad = True")
def last_block(row):
    classification = row.parse().recipe.classification
    recipe = dataclasses.replace(from_dict(training.Recipe, TINY), classification=classification)
    trained = training.make_plan(CONFIG, recipe).trained
    assert {name.split("/")[0] for name in trained} == {"h1", "ln_f", "score"}


@CHECKS("model(idx)[:, -1, :]")
def last_token(row, params, logits):
    tokens, mask = padded()
    found = row.compiled(config=CONFIG, params=params, tokens=tokens, mask=mask)
    assert naive.error(found, logits) < 5e-6  # measured: 3e-7


@CHECKS("calc_loss_batch(x, y, model, device)")
def loss_of_a_batch(row, params, logits):
    recipe = from_dict(training.Recipe, TINY | {"mesh": {"data": 1}})
    plan = training.make_plan(CONFIG, recipe, n_tokens=5)
    tokens, mask = padded()
    lengths = mask.sum(1).astype(np.int32)
    batch = Batch(tokens.astype(np.int32), np.array([1, 0], np.int32), np.ones(2, np.float32), lengths)
    known = row.run(plan=plan, params=params, batch=batch)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    assert float(known["nats"] / known["n"]) == pytest.approx(-(log_p[0, 1] + log_p[1, 0]) / 2, rel=1e-5)
    expected = np.zeros((2, 2), int)
    np.add.at(expected, ([1, 0], logits.argmax(-1)), 1)
    np.testing.assert_array_equal(known["counts"], expected)


@CHECKS("calc_accuracy_loader(test_loader, model, device)")
def accuracy(row, trained):
    data, _, run = trained
    assert row.code[0] == classifying.METRICS_OF_SPLITS
    found = json.loads((run / row.code[0]).read_text())["splits"]["test"]
    config, params = gpt2_jax.load(run)
    texts = [data.test.read(i)[0] for i in range(len(data.test))]
    got = gpt2_jax.classify(config, params, texts).argmax(-1)
    assert found["accuracy"] == (got == data.test.labels).mean()


@CHECKS("train_classifier_simple(...)")
def train_classifier(row):
    args = row.parse()
    assert args.config.stem == "classify_spam"
    recipe = training.Recipe.from_toml(coming_from.commands.ROOT / args.config)
    optimizer, classification = recipe.optimizer, recipe.classification
    assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay) == ("adamw", 5e-5, 0.1)
    assert (optimizer.betas, optimizer.clip, optimizer.decay) == ((0.9, 0.999), 0.0, ((".*", 1.0),))
    assert (recipe.batch_size, recipe.data.n_tokens, recipe.model.dropout) == (8, 120, 0.0)
    assert recipe.steps == 5 * (1046 // 8)
    assert (classification.train, classification.balance) == ("last_block", "undersample")


@CHECKS("plot_values(...)")
def plot_values(row, trained):
    _, _, run = trained
    assert row.code[0] == loop.CURVE
    assert classifying.CONFUSION in row.note
    for name in (loop.CURVE, classifying.CONFUSION):
        assert (run / name).read_bytes().startswith(b"\x89PNG")


@CHECKS("classify_review(text, model, tokenizer, device, max_length)")
def classify_review(row, params, logits):
    found = row.run(config=CONFIG, params=params, texts=TEXTS)
    assert naive.error(found, np.asarray(jax.nn.softmax(logits))) < 5e-6  # measured: 2e-7
