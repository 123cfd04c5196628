"""Examples of a classifier are read from any table, in any encoding; bad records are left out if the recipe says so."""

import numpy as np
import pytest
import tiny_runs

from gpt2_jax import training
from gpt2_jax.data.examples import Example, write_examples

ROWS = [("caf\xe9; bar", "a"), ("two", "b"), ("three", "a"), ("four", "b")]


def recipe_for(path, **settings):
    data = {"path": str(path), "val_fraction": 0.25} | settings
    return tiny_runs.small(objective="classification", data=data)


def test_a_table_in_another_encoding_with_a_bad_row(tmp_path, tokenizer):
    lines = ["text;label", *(f'"{text}";{label}' for text, label in ROWS), "five"]
    (tmp_path / "a.csv").write_bytes("\n".join(lines).encode("cp1252"))
    settings = {"encoding": "cp1252", "skip_bad_rows": True}
    with pytest.warns(UserWarning, match=r"left out: 1 bad record, the first is .*a\.csv, line 6: the row"):
        data = training.start_data(recipe_for(tmp_path / "a.csv", **settings), tokenizer, tmp_path / "run" / "data")
    assert data.labels == ("a", "b")
    assert (data.manifest["encoding"], data.manifest["skip_bad_rows"]) == ("cp1252", True)
    assert sum(data.manifest[split]["examples"] for split in ("train", "val")) == 4
    with pytest.raises(ValueError, match=r"a\.csv, line 6: the row has 1 columns, too few"):
        training.start_data(recipe_for(tmp_path / "a.csv", encoding="cp1252"), tokenizer, tmp_path / "other" / "data")


def test_what_cannot_be_examples_is_told(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"^objective classification needs a file of records, not standard input$"):
        training.start_data(recipe_for("-"), tokenizer, tmp_path / "run" / "data")
    unlabelled = [Example(np.array([3, 5, 7]), np.array([0, 1, 1])) for _ in range(4)]
    write_examples(tmp_path / "examples", unlabelled, tokenizer)
    data = training.start_data(recipe_for(tmp_path / "examples"), tokenizer, tmp_path / "run" / "data")
    with pytest.raises(ValueError, match=r'/examples has no labels, which objective = "classification" needs$'):
        training.start_model(recipe_for(tmp_path / "examples"), tmp_path / "run", data)
