"""Validation on texts of one's own: data.val_path and [data.validation]."""

import json

import commands
import numpy as np
import pytest
import tiny_runs
from tiny_runs import CONFIG, mean_nats, params, small

from gpt2_jax.recipe import Data, Monitor, Recipe
from gpt2_jax.training import described, fit, make_plan, objective, open_prepared, prepare, start_data, start_validation

pytestmark = pytest.mark.usefixtures("compiled_once")

EVERY = Monitor(evaluate_every=2, sample_every=0, tensorboard=False)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "train.txt").write_text(tiny_runs.TEXT)
    (folder / "wiki.txt").write_text("Thou and thee, and the lords of seven ladies. " * 5)
    (folder / "books.txt").write_text("O Romeo, Romeo, wherefore art thou Romeo? " * 7)
    return folder


@pytest.fixture
def run(tmp_path, texts, tokenizer):
    """run(**fields of Data) -> Fitted, as gpt2-train does it."""

    def call(name="run", **fields):
        recipe = small(data={"path": str(texts / "train.txt"), "n_tokens": 11} | fields, monitor=vars(EVERY))
        data = start_data(recipe, tokenizer, tmp_path / name / "data")
        validation = start_validation(recipe, tokenizer, tmp_path / name)
        return fit(make_plan(CONFIG, recipe), params(), data, tmp_path / name, tokenizer, validation=validation)

    return call


def evaluations(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "val_loss" in line]


def by_hand(model, text, tokenizer):
    """Nats a token of the initial or a trained model over the consecutive full windows of a whole text, by NumPy."""
    ids = np.array([*tokenizer.encode(text), tokenizer.eot])
    n = (len(ids) - 1) // 11 * 11
    return mean_nats(model, CONFIG.n_head, ids[:n].reshape(-1, 11), ids[1 : n + 1].reshape(-1, 11))


def test_a_text_of_ones_own_is_measured_whole_and_no_training_text_is_kept_back(run, tmp_path, texts, tokenizer):
    fitted = run(val_path=str(texts / "wiki.txt"))
    first, *_, last = evaluations(tmp_path / "run")
    wiki = (texts / "wiki.txt").read_text()
    assert first["val_loss"] == pytest.approx(by_hand(params(), wiki, tokenizer), abs=1e-5)
    assert last["val_loss"] == pytest.approx(by_hand(fitted.params, wiki, tokenizer), abs=1e-5)
    assert set(first) == {"step", "val_loss", "perplexity", "best"}
    whole = open_prepared(tmp_path / "run" / "data")
    alone = prepare([texts / "train.txt"], tmp_path / "alone", tokenizer, val_fraction=0, shown=False)
    assert (whole.train.n_tokens, whole.val) == (alone.train.n_tokens, None)


def test_several_by_name_and_the_first_decides(run, tmp_path, texts, tokenizer, capfd):
    """A prepared folder is used whole, or its validation part, if it has one."""
    prepare([texts / "books.txt"], tmp_path / "books", tokenizer, val_fraction=0.3, split="tail", shown=False)
    named = [["wiki", str(texts / "wiki.txt")], ["books", str(texts / "books.txt")], ["part", str(tmp_path / "books")]]
    fitted = run(validation=named)
    found = evaluations(tmp_path / "run")
    for name in ("wiki", "books"):
        text = (texts / f"{name}.txt").read_text()
        assert found[0][f"val/{name}"] == pytest.approx(by_hand(params(), text, tokenizer), abs=1e-5)
    part = open_prepared(tmp_path / "books").val
    ids, n = part.read(0, part.n_tokens)[0], (part.n_tokens - 1) // 11 * 11
    expected = mean_nats(params(), CONFIG.n_head, ids[:n].reshape(-1, 11), ids[1 : n + 1].reshape(-1, 11))
    assert found[0]["val/part"] == pytest.approx(expected, abs=1e-5)
    assert [line["val_loss"] for line in found] == [line["val/wiki"] for line in found]
    assert fitted.best_loss == min(line["val/wiki"] for line in found)
    assert f"; val/wiki {found[0]['val/wiki']:.4f}; val/books {found[0]['val/books']:.4f}; val/part " in (
        capfd.readouterr().err
    )


def test_packed_texts_are_read_once_and_not_in_each_evaluation(run, texts, monkeypatch):
    made = []

    class Counted(objective.PackedRows):
        def __init__(self, *args, **how):
            made.append(args)
            super().__init__(*args, **how)

    monkeypatch.setattr(objective, "PackedRows", Counted)
    objective._rows.cache_clear()
    fitted = run(validation=[[name, str(texts / f"{name}.txt")] for name in ("wiki", "books", "train")], pack=True)
    assert fitted.best_step is not None
    assert len(made) == 4


def test_the_names_and_the_texts_stay_when_a_run_resumes(run, tmp_path, texts):
    wiki, books = str(texts / "wiki.txt"), str(texts / "books.txt")
    run(validation=[["wiki", wiki]])
    moved = tmp_path / "moved.txt"
    moved.write_text((texts / "wiki.txt").read_text())
    assert run(validation=[["wiki", str(moved)]]).step == 4
    with pytest.raises(ValueError, match="has a run on a different text from"):
        run(validation=[["wiki", books]])
    with pytest.raises(ValueError, match=r"other settings: data\.validation\.wiki was \S* and is null, data\.valid"):
        run(validation=[["other", wiki]])


def test_the_start_counts_the_validation_texts(tmp_path, texts, tokenizer):
    prepare([texts / "books.txt"], tmp_path / "books", tokenizer, val_fraction=0.3, split="tail", shown=False)
    n_books = open_prepared(tmp_path / "books").val.n_tokens
    n_wiki = len(tokenizer.encode((texts / "wiki.txt").read_text()))
    for fields, said in (
        ({"val_path": str(texts / "wiki.txt")}, f", {n_wiki} validation tokens"),
        (
            {"validation": [["wiki", str(texts / "wiki.txt")], ["books", str(tmp_path / "books")]]},
            f", {n_wiki} validation tokens of wiki, {n_books} validation tokens of books",
        ),
        ({"val_fraction": 0.0}, " training tokens, 0 validation tokens"),
    ):
        recipe = small(data={"path": str(texts / "train.txt"), "n_tokens": 11} | fields)
        folder = tmp_path / str(len(said))
        data = start_data(recipe, tokenizer, folder / "data")
        validation = start_validation(recipe, tokenizer, folder)
        assert described(make_plan(CONFIG, recipe), data, validation)[0].endswith(said)


def test_a_table_and_options(tmp_path):
    (tmp_path / "r.toml").write_text('[data.validation]\nwiki = "a.txt"\nbooks = "b c.txt"\n')
    expected = (("wiki", "a.txt"), ("books", "b c.txt"))
    assert Recipe.from_toml(tmp_path / "r.toml").data.validation == expected
    options = ["--data.validation", "wiki", "a.txt", "books", "b c.txt"]
    assert commands.parse("gpt2-train", *options).recipe.data.validation == expected
    for fields, message in (
        ({"val_path": "a", "validation": expected}, "val_path must be empty if validation is set"),
        ({"validation": (("a/b", "c"),)}, "validation must be by names of letters and digits"),
        ({"validation": (("a", "b"), ("a", "c"))}, "validation must be by different names"),
    ):
        with pytest.raises(ValueError, match=message):
            Data(**fields)


def test_not_for_a_classifier(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"data\.val_path and data\.validation are not for classification"):
        start_validation(Recipe(objective="classification", data=Data(val_path="x")), tokenizer, tmp_path)
